"""Chat templates and conversations of the tests of supervised fine-tuning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BASE = Path(__file__).parents[3] / "examples" / "tiny_base"

# With marks, and as ChatML does it: a line break behind the token that ends a turn.
MARKED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}Bot:{% generation %} {{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{{ '\\n' }}{% else %}{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Bot:{% endif %}"
)
UNMARKED = (
    "{% for m in messages %}[{{ m.role }}]\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
# Drops what the assistant said before, as templates of models that think do.
FORGETFUL = (
    "{% for m in messages %}{% if m.role != 'assistant' or loop.last %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
ENDLESS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """Messages of user and assistant in turn."""
    roles = ("user", "assistant")
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def write_records(path: Path, *records: Any) -> Path:
    """A .jsonl file; a text is a line as it stands."""
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def write_template(path: Path, text: str) -> Path:
    path.write_text(text)
    return path
