"""docs/troubleshooting.md: every message on the page is one that the code has, and every part of the code is on the page."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
MESSAGES = re.findall(r"^\| `(.+?)` \| ", PAGE, re.MULTILINE)
# Whose messages users meet through the tools.
PARTS = ("platform.py", "conversion", "data", "evaluation", "training", "upscaling")


@functools.cache
def texts(part: str = "") -> tuple[str, ...]:
    """All texts of the package, with … for what is filled in."""
    root = ROOT / "megatron_midus" / part
    found = []
    for path in [root] if root.is_file() else sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return tuple(found)


def says(message: str, part: str = "") -> bool:
    """Whether one text has all pieces of ``message`` in their order."""
    pattern = re.compile(".*".join(re.escape(piece.strip()) for piece in message.split("…") if piece.strip()))
    return any(pattern.search(text) for text in texts(part))


def test_there_are_messages():
    assert len(MESSAGES) >= 40


@pytest.mark.parametrize("message", MESSAGES)
def test_the_code_has_the_message(message):
    assert says(message), f"no message of the code reads {message!r} any more"


@pytest.mark.parametrize("part", PARTS)
def test_every_part_is_on_the_page(part):
    assert [message for message in MESSAGES if says(message, part)]


def test_a_message_that_is_not_there_is_noticed():
    assert not says("backend nccl wants a CUDA device … and there is none")
