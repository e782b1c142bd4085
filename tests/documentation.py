"""Command blocks of README, CONTRIBUTING and docs/, with what is said about running them, and the commands in them.

A comment in the line above a block of ```bash says whether a test runs it, or, in a line of its own that begins with
"page", for all of a page:

    <!-- not run: why -->
    <!-- run by FILE -->             a test that runs it
    <!-- page run by FILE -->
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(
    r"(?:^ *<!-- (?P<note>(?:not run|run by)[^\n]*?) -->\n+)?^(?P<indent> *)```bash\n(?P<text>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)
_SEPARATORS = frozenset(("&&", "||", ";", "|", "&", "(", ")", ";;"))
_KEYWORDS = frozenset(("do", "then", "else", "{", "!"))


@dataclasses.dataclass(frozen=True)
class Block:
    """One block of commands.

    Attributes:
        note: what is said about running it.
    """

    page: str
    line: int
    text: str
    note: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> list[list[str]]:
        """The words of every simple command, without assignments and redirections."""
        without_documents = re.sub(r"(<<-?'?(\w+)'?.*?\n).*?^\2$", r"\1", self.text, flags=re.MULTILINE | re.DOTALL)
        lines = re.sub(r"\\\n\s*", " ", without_documents).splitlines()
        return [command for line in lines for command in _split(line)]


def _split(line: str) -> Iterator[list[str]]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word not in _SEPARATORS:
            words.append(word)
            continue
        while words and (words[0] in _KEYWORDS or re.match(r"\w+=", words[0])):
            words.pop(0)
        redirection = next((i for i, w in enumerate(words) if set(w) <= set("<>") or w == "<<<"), len(words))
        if words[:redirection]:
            yield words[:redirection]
        words = []


def blocks(path: Path) -> list[Block]:
    """All command blocks of a page."""
    content = path.read_text()
    page_note = re.search(r"^<!-- page (.*?) -->$", content, re.MULTILINE)
    found = []
    for match in _BLOCK.finditer(content):
        text = re.sub(rf"^{match['indent']}", "", match["text"], flags=re.MULTILINE)
        note = match["note"] or (page_note[1] if page_note else "")
        line = content.count("\n", 0, match.start("text"))
        found.append(Block(str(path.relative_to(ROOT)), line, text, note))
    return found


ALL_BLOCKS = [block for page in PAGES for block in blocks(page)]
