"""Corpora of real text that every machine with this project has: Python's standard library, English documentation, C++ headers.

``stdlib``  source files of the standard library, without its tests: what the tiny base model was trained on.
``docs``    English prose: the language reference in pydoc_data.topics, and the docstrings and package descriptions of the
            installed packages. No code files. What the quickstart continues pre-training on.
``headers`` torch's C++ headers: a third domain, to see what becomes of text that is neither old nor new.

Each is written as train.jsonl and heldout.jsonl, one document a line. Documents are split by a hash of their name, so
a document is held out on every machine or on none, whatever else is there.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from megatron_midus.cli import run
from megatron_midus.config.parser import ArgumentParser
from megatron_midus.errors import UserError
from megatron_midus.files import write_text_atomically
from megatron_midus.progress import Bars

# Not text: tests repeat each other, the tables hold numbers, and pydoc_data is the other corpus.
STDLIB_SKIPPED = {"test", "tests", "idle_test", "site-packages", "pydoc_data", "encodings", "lib2to3", "__pycache__"}
MIN_DOCUMENT_CHARACTERS = 200
MIN_DOCSTRING_CHARACTERS = 120
# Generated API listings repeat one sentence thousands of times.
MAX_DOCUMENT_CHARACTERS = 60_000


# A document is named before it is read, so that a corpus of a few megabytes does not read every installed package.
Document = tuple[str, Callable[[], str]]


def stdlib_documents() -> Iterator[Document]:
    """The source files of the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        if STDLIB_SKIPPED.isdisjoint(name.parts[:-1]) and not name.name.startswith("_sysconfigdata"):
            yield f"stdlib/{name.as_posix()}", partial(path.read_text, encoding="utf-8", errors="replace")


def language_topics() -> Iterator[Document]:
    """The chapters of the language reference that ship with ``pydoc``."""
    from pydoc_data.topics import topics

    for name, text in topics.items():
        yield f"topics/{name}", lambda text=text: text


def docstrings(path: Path, seen: set[str]) -> str:
    """The docstrings of a module, top to bottom, that are long enough to be prose and stood in no module before."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError, RecursionError):
        return ""  # templates and files for other interpreters are no loss
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node, clean=True)
            if text and len(text) >= MIN_DOCSTRING_CHARACTERS and text not in seen:
                seen.add(text)
                found.append(text)
    return "\n\n".join(found)


def package_documents() -> Iterator[Document]:
    """The description of every installed package and the docstrings of each of its modules."""
    seen: set[str] = set()
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"].lower()
        yield f"{name}/description", lambda d=distribution: str(d.metadata.get_payload() or "")
        for file in distribution.files or []:
            if file.suffix == ".py" and not {"tests", "test", "testing", "_vendor"} & set(file.parts):
                yield f"{name}/{file.as_posix()}", partial(docstrings, Path(str(file.locate())), seen)


def header_documents() -> Iterator[Document]:
    """The C++ headers that ship with torch."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    root = Path(spec.origin).parent / "include"
    for path in root.rglob("*.h"):
        name = path.relative_to(root).as_posix()
        yield f"headers/{name}", partial(path.read_text, encoding="utf-8", errors="replace")


def clean(text: str) -> str:
    text = re.sub(r"[ \t]+\n", "\n", text.replace("\r\n", "\n"))
    return re.sub(r"\n{4,}", "\n\n\n", text)[:MAX_DOCUMENT_CHARACTERS].strip() + "\n"


def name_hash(name: str) -> float:
    """A number in [0, 1) that is the same for the same name everywhere: it orders documents and splits them."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def collect(
    documents: list[Document], budget_bytes: float, advance: Callable[[int, int], None]
) -> Iterator[tuple[str, str]]:
    """Yields ``(name, text)`` in the order of the names' hashes until the budget is spent; each text once.

    ``advance`` is called with the documents looked at and the bytes taken since its last call.
    """
    seen: set[str] = set()
    spent = 0
    for name, read in sorted(documents, key=lambda document: name_hash(document[0] + "/order")):
        text = clean(read())
        if len(text) < MIN_DOCUMENT_CHARACTERS or text in seen:
            advance(1, 0)
            continue
        seen.add(text)
        size = len(text.encode())
        if spent + size > budget_bytes:
            advance(1, round(budget_bytes - spent))  # the rest of the budget is too small for a document
            return
        spent += size
        advance(1, size)
        yield name, text


def collect_corpus(corpus: str, budget_bytes: float) -> list[tuple[str, str]]:
    """All documents of a corpus, with one bar: over bytes where there is a budget, over documents where there is none."""
    parts = {
        "stdlib": [stdlib_documents],
        "docs": [language_topics, package_documents],
        "headers": [header_documents],
    }
    sources = [list(part()) for part in parts[corpus]]
    is_limited = budget_bytes != float("inf")
    total = round(budget_bytes) if is_limited else sum(map(len, sources))
    collected: list[tuple[str, str]] = []
    with Bars()("collecting", total=total, unit="B" if is_limited else "document") as bar:
        for source in sources:
            left = budget_bytes - sum(len(text.encode()) for _, text in collected)
            collected += collect(source, left, lambda documents, size: bar(size if is_limited else documents))
    return collected


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(description=inspect.cleandoc(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", choices=["stdlib", "docs", "headers"], required=True, help="which text to collect")
    parser.add_argument("--output-dir", type=Path, required=True, help="receives train.jsonl and heldout.jsonl")
    parser.add_argument("--held-out", type=float, default=0.05, help="fraction of documents held out (default: 0.05)")
    parser.add_argument(
        "--max-megabytes", type=float, default=float("inf"), help="text to collect, 1e6 bytes (default: all of it)"
    )
    args = parser.parse_args(argv)
    if not 0 < args.held_out < 1:
        raise UserError(f"--held-out {args.held_out} must lie between 0 and 1")
    if args.max_megabytes <= 0:
        raise UserError(f"--max-megabytes {args.max_megabytes} must be positive")

    collected = collect_corpus(args.corpus, args.max_megabytes * 1e6)
    for half, wanted in (("train", False), ("heldout", True)):
        chosen = [(name, text) for name, text in collected if (name_hash(name) < args.held_out) == wanted]
        if not chosen:
            raise UserError(f"corpus {args.corpus} has no documents for {half}; collect more or change --held-out")
        path = args.output_dir / f"{half}.jsonl"
        lines = (json.dumps({"name": name, "text": text}, ensure_ascii=False) for name, text in chosen)
        write_text_atomically(path, "\n".join(lines) + "\n")
        print(f"{path}: {len(chosen)} documents, {sum(len(text.encode()) for _, text in chosen) / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    run(main)
