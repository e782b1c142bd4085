"""Writes encoded chunks into indexed datasets: splits by hash, duplicates, statistics, whole files or none.

The format of a dataset P is Megatron-Core's: P.bin holds the ids of all documents one after the other, P.idx their
lengths and places. It is written here and not by Megatron-Core's builder, which keeps a Python integer for every document
in memory and cannot go on with a file that a killed run has left.
"""

from __future__ import annotations

import dataclasses
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy

from megatron_midus.data.encoding import EncodedChunk, EncodedTexts
from megatron_midus.data.journal import Journal
from megatron_midus.data.statistics import DatasetStatistics, PreprocessResult, Skipped, statistics_path
from megatron_midus.errors import UserError

_DTYPE_CODES = {"uint16": 8, "int32": 4}
_DIGEST_BYTES = 16
# What the merge of shards needs of every document to leave out those that an earlier shard has.
DOCUMENT = numpy.dtype([("digest", f"V{_DIGEST_BYTES}"), ("bytes", "<i8")])
DIGESTS_SUFFIX = ".digests"
_EXAMPLES = 5


def dtype_of(vocab_size: int) -> Literal["uint16", "int32"]:
    """The type of the ids: two bytes where they suffice, by Megatron-Core's limit.

    Raises:
        ValueError: a vocabulary that no type can hold.
    """
    if vocab_size > 2**31:
        raise UserError(f"{vocab_size} ids do not fit into 32 bits; use a tokenizer of at most {2**31} ids")
    return "uint16" if vocab_size < 65500 else "int32"


class DatasetWriter:
    """All datasets of a run, in the files of a journal until ``finish``.

    Args:
        prefixes: ``[split][key]``; an empty list for a split that gets nothing.
        journal: entered; what it holds already is gone on with.
        dtype: of the ids.
        shares: shares of the splits; a record belongs to the one in which the hash of its text falls.
        dedup: leave out records whose digest came before.
        malformed_path: gets the malformed lines, ``file:line: reason``, if there are any.
        is_shard: of a corpus: a dataset may stay empty, and with ``dedup`` P.digests says what its documents are.
    """

    def __init__(
        self,
        prefixes: list[list[str]],
        journal: Journal,
        *,
        dtype: Literal["uint16", "int32"],
        shares: Sequence[float],
        dedup: bool = False,
        malformed_path: str,
        is_shard: bool = False,
    ) -> None:
        self.is_shard = is_shard
        self.malformed_path = malformed_path
        self.prefixes = prefixes
        self.journal = journal
        self.dtype = dtype
        self.bounds = split_bounds(shares)
        self.dedup = dedup
        self.seen: set[bytes] = set()
        self.result = PreprocessResult({prefix: DatasetStatistics() for split in prefixes for prefix in split})
        self.position = (0, 0)
        """Input file and records of it that are done."""
        self.is_complete = False
        """Whether all that is left to do is ``finish``."""
        if journal.state is not None:
            self._restore(journal.state)
        if not self.is_complete:
            kinds = ["bin", "lengths", *(["digests"] if dedup and is_shard else [])]
            names = [f"{self._name(prefix)}.{kind}" for prefix in self.result.datasets for kind in kinds]
            for name in [*names, "malformed.txt", *(["digests"] if dedup else [])]:
                journal.stream(name)

    def add(self, chunk: EncodedChunk, position: tuple[int, int]) -> None:
        """Appends the next chunk of the corpus, which ends at ``position``."""
        skipped = self.result.skipped
        self.result.bytes_read += chunk.num_bytes_read
        skipped.malformed += len(chunk.malformed)
        skipped.malformed_examples += chunk.malformed[: _EXAMPLES - len(skipped.malformed_examples)]
        self.journal.stream("malformed.txt").write("".join(f"{line}\n" for line in chunk.malformed).encode())
        splits = self._splits(chunk)
        for key_index, texts in enumerate(chunk.texts):
            self._add_texts(key_index, texts, splits, chunk.digests)
        self.position = position

    def commit(self, *, complete: bool = False) -> None:
        """Makes what was added so far the point from which a later run goes on."""
        self.journal.commit(
            {
                "position": self.position,
                "bytes_read": self.result.bytes_read,
                "skipped": dataclasses.asdict(self.result.skipped),
                "datasets": [dataclasses.asdict(statistics) for statistics in self.result.datasets.values()],
                "complete": complete,
            }
        )

    def finish(self, provenance: dict[str, Any]) -> None:
        """Finishes all datasets and gives them their names.

        Args:
            provenance: further entries of the statistics files.

        Raises:
            ValueError: a dataset got no document.
        """
        if not self.is_complete:
            if not self.is_shard:
                self._check_filled()
            for prefix, statistics in self.result.datasets.items():
                self._write_index(prefix, statistics)
                text = statistics.to_json(**self.result.skipped.to_json(), **provenance)
                (self.journal.directory / f"{self._name(prefix)}.json").write_text(text)
            self.commit(complete=True)
        # An index never stands before its data, nor beside the data of another run.
        targets = {"malformed.txt": self.malformed_path} if self.result.skipped.malformed else {}
        for prefix in self.result.datasets:
            if (self.journal.directory / f"{self._name(prefix)}.bin").exists():
                Path(prefix + ".idx").unlink(missing_ok=True)
            digests = [DIGESTS_SUFFIX] if self.dedup and self.is_shard else []
            for suffix in (".bin", *digests, ".json", ".idx"):
                target = str(statistics_path(prefix)) if suffix == ".json" else prefix + suffix
                targets[self._name(prefix) + suffix] = target
        self.journal.finish(targets)

    # -- a chunk -------------------------------------------------------------------------------------------------
    def _splits(self, chunk: EncodedChunk) -> numpy.ndarray:
        """``[records]``: the split of every record of the chunk, -1 for one that is left out."""
        splits = numpy.full(chunk.num_records, -1)
        skipped = self.result.skipped
        alive = numpy.unique(numpy.concatenate([texts.rows for texts in chunk.texts]))
        for row in numpy.setdiff1d(numpy.arange(chunk.num_records), alive).tolist():
            reason = chunk.texts[0].left_out[row]
            setattr(skipped, reason, getattr(skipped, reason) + 1)
        if not chunk.digests:
            splits[alive] = 0
            return splits
        for row in alive.tolist():
            digest = chunk.digests[row]
            if self.dedup and digest in self.seen:
                skipped.duplicates += 1
                continue
            if self.dedup:
                self.seen.add(digest)
                self.journal.stream("digests").write(digest)
            splits[row] = split_of(digest, self.bounds)
        return splits

    def _add_texts(self, key_index: int, texts: EncodedTexts, splits: numpy.ndarray, digests: Sequence[bytes]) -> None:
        split_of_text = splits[texts.rows]
        for split in numpy.unique(split_of_text[split_of_text >= 0]).tolist():
            chosen = split_of_text == split
            lengths = texts.lengths[chosen]
            ids = texts.ids if chosen.all() else texts.ids[numpy.repeat(chosen, texts.lengths)]
            prefix = self.prefixes[split][key_index]
            name = self._name(prefix)
            self.journal.stream(f"{name}.bin").write(ids.tobytes())
            self.journal.stream(f"{name}.lengths").write(lengths.tobytes())
            if self.dedup and self.is_shard:
                documents = numpy.zeros(len(lengths), DOCUMENT)
                documents["digest"] = [numpy.void(digests[row]) for row in texts.rows[chosen].tolist()]
                documents["bytes"] = texts.num_bytes[chosen]
                self.journal.stream(f"{name}{DIGESTS_SUFFIX}").write(documents.tobytes())
            self.result.datasets[prefix].add(
                documents=len(lengths),
                tokens=len(ids),
                num_bytes=int(texts.num_bytes[chosen].sum()),
                max_token_id=int(ids.max()),
            )

    # -- the whole -----------------------------------------------------------------------------------------------
    def _restore(self, state: dict[str, Any]) -> None:
        self.position = tuple(state["position"])
        self.is_complete = state["complete"]
        self.result.bytes_read = self.result.bytes_resumed = state["bytes_read"]
        self.result.skipped = Skipped(**state["skipped"])
        for prefix, statistics in zip(self.result.datasets, state["datasets"]):
            self.result.datasets[prefix] = DatasetStatistics(**statistics)
        if self.dedup and not self.is_complete:
            self.journal.stream("digests").flush()
            content = (self.journal.directory / "digests").read_bytes()
            self.seen = {content[i : i + _DIGEST_BYTES] for i in range(0, len(content), _DIGEST_BYTES)}

    def _write_index(self, prefix: str, statistics: DatasetStatistics) -> None:
        name = self._name(prefix)
        self.journal.stream(f"{name}.lengths").flush()
        lengths = numpy.fromfile(self.journal.directory / f"{name}.lengths", dtype=numpy.int32)
        assert len(lengths) == statistics.documents and int(lengths.sum(dtype=numpy.int64)) == statistics.tokens
        write_index(self.journal.directory / f"{name}.idx", lengths, self.dtype)

    def _check_filled(self) -> None:
        total = sum(statistics.documents for statistics in self.result.datasets.values())
        for prefix, statistics in self.result.datasets.items():
            if statistics.documents:
                continue
            if not total:
                counts = ", ".join(f"{n} {name}" for name, n in self.result.skipped.counts().items() if n)
                raise UserError(f"the inputs hold no document with any text that is kept ({counts or 'no line'})")
            raise UserError(f"none of the {total} documents falls into {prefix}; give it a larger share, or 0")

    def _name(self, prefix: str) -> str:
        return Path(prefix).name


def write_index(path: Path, lengths: numpy.ndarray, dtype: Literal["uint16", "int32"]) -> None:
    """Megatron-Core's .idx of documents of ``lengths`` ids ``[documents]`` int32, each a sequence of its own."""
    ends = numpy.cumsum(lengths, dtype=numpy.int64) * numpy.dtype(dtype).itemsize
    starts = numpy.concatenate([[0], ends[:-1]]).astype(numpy.int64)
    with open(path, "wb") as stream:
        stream.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, _DTYPE_CODES[dtype], len(lengths), len(lengths) + 1))
        for array in (lengths.astype(numpy.int32), starts, numpy.arange(len(lengths) + 1, dtype=numpy.int64)):
            array.tofile(stream)
        stream.flush()
        os.fsync(stream.fileno())


def split_bounds(shares: Sequence[float]) -> list[float]:
    """Cumulated shares; exactly 1 from the last share above 0 on, so that rounding opens no gap."""
    cumulated = (numpy.cumsum(shares) / sum(shares)).tolist()
    last = max(index for index, share in enumerate(shares) if share > 0)
    return cumulated[:last] + [1.0] * (len(cumulated) - last)


def split_of(digest: bytes, bounds: Sequence[float]) -> int:
    """Index of the split in which a digest falls: the first whose bound lies above it."""
    # Integers: the quotient of a digest of all ones and 2**64 rounds up to 1.
    position = int.from_bytes(digest[:8], "big")
    return next(index for index, bound in enumerate(bounds) if position < int(bound * 2**64))
