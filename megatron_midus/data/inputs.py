"""What preprocessing reads: files here, and datasets of the Hugging Face hub, in the order in which the user named them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from megatron_midus.config.preprocess import HUB
from megatron_midus.data import conversations
from megatron_midus.data.corpus import (
    DEFAULT_SEPARATOR,
    TEXT_KEY,
    Record,
    columns_of,
    find_inputs,
    open_parquet,
    read_raw,
)
from megatron_midus.data.hub_dataset import hub_files
from megatron_midus.errors import UserError


class Input(Protocol):
    """A part of a corpus that is read from its beginning, or from one of its records on."""

    @property
    def name(self) -> str:
        """A path or an address; no two inputs of a run have the same."""

    @property
    def num_bytes(self) -> int:
        """As they are stored: what shards are balanced by."""

    @property
    def num_text_bytes(self) -> int | None:
        """Of the text; ``None`` where only reading would tell."""

    @property
    def fingerprint(self) -> str:
        """What tells that an input is still the same."""

    def records(self, keys: Sequence[str], *, separator: str = DEFAULT_SEPARATOR, start: int = 0) -> Iterator[Record]:
        """The records in order, without the first ``start``."""


@dataclasses.dataclass(frozen=True)
class InputFile:
    """A file of the kinds of ``data/corpus.py``."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def num_bytes(self) -> int:
        return self.path.stat().st_size

    @property
    def num_text_bytes(self) -> int | None:
        return None if self.path.suffix in (".gz", ".zst", ".parquet") else self.num_bytes

    @property
    def fingerprint(self) -> str:
        return f"{self.path} {(status := self.path.stat()).st_size} {status.st_mtime_ns}"

    def check(self, keys: Sequence[str]) -> None:
        """Raises ``UserError`` where the texts ``keys``, or conversations, cannot be in it: before hours of work."""
        is_parquet, is_text = self.path.suffix == ".parquet", ".jsonl" not in self.path.name
        if tuple(keys) == conversations.KEYS:
            if is_parquet:
                conversations.check_columns(columns_of(self.path), self.name)
            elif is_text:
                raise UserError(f"{self.path} is plain text and holds no conversations; --sft needs .jsonl or .parquet")
        elif is_parquet:
            open_parquet(self.path, keys).close()
        elif is_text and list(keys) != [TEXT_KEY]:
            raise UserError(
                f"{self.path} is plain text and has no keys; --json-keys {' '.join(keys)} needs .jsonl or .parquet"
            )

    def records(self, keys: Sequence[str], *, separator: str = DEFAULT_SEPARATOR, start: int = 0) -> Iterator[Record]:
        if tuple(keys) == conversations.KEYS and self.path.suffix == ".parquet":
            # The columns of conversations are not in every file.
            keys = [key for key in columns_of(self.path) if key in keys]
        return read_raw(self.path, keys=keys, separator=separator, start=start)


def find(names: Sequence[str], keys: Sequence[str], *, split: str, with_sizes: bool) -> list[Input]:
    """The inputs that ``names`` mean: those of ``find_inputs``, and ``hf://datasets/…``; what is named twice is read once.

    Args:
        keys: of the texts, or ``conversations.KEYS``.
        split: of the datasets of the hub.
        with_sizes: whether ``num_bytes`` is asked for, which costs requests to the hub.

    Raises:
        UserError: an input that is not there, or whose texts are not under ``keys``.
    """
    found: dict[str, Input] = {}
    for name in names:
        if name.startswith(HUB):
            found.update((each.name, each) for each in hub_files(name, keys, split=split, with_sizes=with_sizes))
            continue
        for path in find_inputs([name]):
            if str(path) not in found:
                file = InputFile(path)
                file.check(keys)
                found[file.name] = file
    return list(found.values())
