"""What every verb that reads text can be told about it, and a check that many configurations make."""

from __future__ import annotations

import dataclasses

from megatron_midus.errors import UserError

TEXT_KEY = "text"
# As it is written on a command line.
DEFAULT_SEPARATOR = "\\f"


def check_at_least_one(config: object, *names: str) -> None:
    """Raises ``UserError`` for the first of these fields that is below 1; ``None`` passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Text"""

    data: list[str] = dataclasses.field(default_factory=list, metadata={"metavar": "FILE", "append": True})
    """Held-out text, .jsonl or .txt (also .gz, .zst) or a directory of these; each gets its own rows."""

    json_key: str = TEXT_KEY
    """Key of the text in a JSON line."""

    text_document_separator: str = DEFAULT_SEPARATOR
    """What divides a .txt file into documents; \\f is a form feed."""

    seq_length: int = 512
    """Tokens that the model reads at once."""

    def __post_init__(self) -> None:
        check_at_least_one(self, "seq_length")
