"""Tables of messages in docs/: every message is one that the code has; every part of the code is in troubleshooting.md."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def messages(page: Path) -> list[str]:
    """What stands in backticks in the first column of the tables that are headed "message"."""
    tables = re.findall(r"^\| message \|.*\n\|---.*\n((?:\|.*\n)+)", page.read_text(), re.MULTILINE)
    cells = [row.split(" | ")[0] for table in tables for row in table.splitlines()]
    return [message for cell in cells for message in re.findall(r"`(.+?)`", cell)]


ON_PAGES = {page.name: messages(page) for page in sorted((ROOT / "docs").glob("*.md"))}
MESSAGES = ON_PAGES["troubleshooting.md"]
# Whose messages users meet through the tools.
PARTS = ("platform", "checkpoint", "conversion", "data", "evaluation", "training", "upscaling")


@functools.cache
def texts(part: str = "") -> tuple[str, ...]:
    """All texts of a part of the package, or of it and the tools, with … for what is filled in."""
    root = ROOT / "megatron_midus" / part
    files = [root] if root.is_file() else sorted(root.rglob("*.py"))
    found = []
    for path in files if part else [*files, *sorted((ROOT / "tools").glob("*.py"))]:
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
    assert sum(bool(found) for found in ON_PAGES.values()) >= 4


@pytest.mark.parametrize(
    ("page", "message"), [(page, message) for page, found in ON_PAGES.items() for message in found]
)
def test_the_code_has_the_message(page, message):
    assert says(message), f"no message of the code reads {message!r} any more"


@pytest.mark.parametrize("part", PARTS)
def test_every_part_is_on_the_page(part):
    assert [message for message in MESSAGES if says(message, part)]


def test_a_message_that_is_not_there_is_noticed():
    assert not says("backend nccl wants a CUDA device … and there is none")
