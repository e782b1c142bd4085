"""Step: one command of one of the tools, done once for what it reads and what it is told; its fingerprint and its marker."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_midus.errors import UserError
from megatron_midus.files import remove, remove_partials, write_text_atomically

_WHOLE = 1 << 20


class StepFailed(Exception):
    """A command that ended with an error; the message says which, and its last line."""


class FileHashes:
    """SHA-256 of what steps read; a file that kept size and time is not read again.

    Args:
        cache: JSON file that remembers them.
    """

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self._known: dict[str, list[Any]] = json.loads(cache.read_text()) if cache.is_file() else {}

    def of(self, path: str | Path) -> str:
        """Of a file, of the files in a directory, or of the dataset with this prefix; ``ValueError`` for none of them."""
        path = Path(path)
        if path.is_file():
            return self._of_file(path)
        if path.is_dir():
            files = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
            return _digest([[p.name, self._of_file(p)] for p in files])
        index, tokens = Path(f"{path}.idx"), Path(f"{path}.bin")
        if index.is_file() and tokens.is_file():
            # The index holds the length of every document; terabytes of tokens are not read for a fingerprint.
            return _digest([self._of_file(index), tokens.stat().st_size])
        raise UserError(f"{path} does not exist; the experiment reads it")

    def _of_file(self, path: Path) -> str:
        status = path.stat()
        key, state = str(path.resolve()), [status.st_size, status.st_mtime_ns]
        if self._known.get(key, [])[:2] != state:
            found = hashlib.sha256()
            with open(path, "rb") as stream:
                while block := stream.read(_WHOLE):
                    found.update(block)
            self._known[key] = [*state, found.hexdigest()]
            write_text_atomically(self.cache, json.dumps(self._known))
        return self._known[key][2]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: of its log and marker in ``directory``.
        directory: where they lie.
        words: program and arguments, without interpreter and launcher: what the result depends on.
        output: root of the experiment, which may move.
        launcher: interpreter and what else stands before ``words``.
        reads: files, directories and dataset prefixes that are no step's product; their content counts, not their names.
        after: steps whose products it reads.
        makes: what it leaves; deleted before it starts again.
        goes_on: whether it continues by itself from what an interrupted run of the same command left.
        check: called when the command has ended well; raises ``StepFailed`` when it did not do all of it.
    """

    name: str
    directory: Path
    words: tuple[str, ...]
    output: Path
    launcher: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    after: tuple[Step, ...] = ()
    makes: tuple[Path, ...] = ()
    goes_on: bool = False
    check: Callable[[], None] | None = None

    @property
    def log(self) -> Path:
        return self.directory / f"{self.name}.log"

    @property
    def marker(self) -> Path:
        return self.directory / f"{self.name}.done.json"

    @property
    def start_marker(self) -> Path:
        return self.directory / f"{self.name}.started.json"

    def fingerprint(self, hashes: FileHashes) -> str:
        """Of the command, of the content of what it reads, and of the steps before it."""
        words = list(self.words)
        # The longest first: a path may begin with another.
        for path in sorted(self.reads, key=len, reverse=True):
            content = hashes.of(path)
            words = [word.replace(path, f"<{content}>") for word in words]
        words = [word.replace(str(self.output), "<output>") for word in words]
        return _digest([words, [step.fingerprint(hashes) for step in self.after]])

    def is_done(self, fingerprint: str) -> bool:
        """Whether it ended well with this fingerprint and what it made is still there."""
        return read_marker(self.marker).get("fingerprint") == fingerprint and all(p.exists() for p in self.makes)

    def begin(self, fingerprint: str) -> None:
        """Clears what an earlier run left, unless the command goes on from it."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.marker.unlink(missing_ok=True)
        if not (self.goes_on and read_marker(self.start_marker).get("fingerprint") == fingerprint):
            for path in (*self.makes, self.log):
                remove(path)
                remove_partials(path)
        write_text_atomically(self.start_marker, json.dumps({"fingerprint": fingerprint}) + "\n")

    def finish(self, fingerprint: str, *, seconds: float, machine: dict[str, Any]) -> None:
        """Writes the marker; ``machine`` as of ``machine_facts``, for whoever reads the figures elsewhere or later."""
        words = [*self.launcher, *self.words]
        content = {"fingerprint": fingerprint, "seconds": seconds, "command": words, "machine": machine}
        write_text_atomically(self.marker, json.dumps(content, indent=1) + "\n")


def read_marker(path: Path) -> dict[str, Any]:
    """Its entries; none when it is missing or broken."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return content if isinstance(content, dict) else {}


def environment() -> dict[str, str]:
    """For the tools: this project first on the path, and no network."""
    from megatron_midus.comparison.experiment import REPOSITORY

    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    return {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ, "PYTHONPATH": path}
