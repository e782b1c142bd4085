"""Writes encoded chunks into indexed datasets: splits by hash, duplicates, statistics, whole files or none."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_midus.data.encoding import EncodedChunk, EncodedTexts
from megatron_midus.data.statistics import DatasetStatistics, PreprocessResult, statistics_path

_SUFFIXES = (".bin", ".json", ".idx")  # in the order of renaming: an index never stands before its data


class DatasetWriter:
    """All datasets of a run, a context manager: hidden partial files get their names in ``commit`` or vanish.

    Args:
        prefixes: ``[split][key]``; an empty list for a split that gets nothing.
        dtype: numpy name of the type of the ids.
        shares: shares of the splits; a record belongs to the one in which the hash of its text falls.
        dedup: leave out records whose digest came before.
        overwrite: replace outputs that exist.

    Raises:
        ValueError: an output exists and ``overwrite`` is off.
    """

    def __init__(
        self,
        prefixes: list[list[str]],
        *,
        dtype: str,
        shares: Sequence[float],
        dedup: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.prefixes = prefixes
        self.dtype = getattr(numpy, dtype)
        self.bounds = split_bounds(shares)
        self.dedup = dedup
        self.seen: set[bytes] = set()
        self.builders: dict[str, Any] = {}
        self.result = PreprocessResult({prefix: DatasetStatistics() for split in prefixes for prefix in split})
        for prefix in self.result.datasets:
            for suffix in _SUFFIXES:
                if os.path.exists(prefix + suffix) and not overwrite:
                    raise ValueError(
                        f"{prefix}{suffix} exists; choose another --output-prefix, or replace it with --overwrite"
                    )

    def __enter__(self) -> DatasetWriter:
        for prefix in self.result.datasets:
            Path(prefix).absolute().parent.mkdir(parents=True, exist_ok=True)
            self.builders[prefix] = IndexedDatasetBuilder(_partial(prefix, ".bin"), dtype=self.dtype)
        return self

    def __exit__(self, *_: object) -> None:
        for prefix, builder in self.builders.items():
            builder.data_file.close()
            for suffix in _SUFFIXES:
                Path(_partial(prefix, suffix)).unlink(missing_ok=True)

    def add(self, chunk: EncodedChunk) -> None:
        """Appends the next chunk of the corpus."""
        result = self.result
        result.bytes_read += chunk.num_bytes_read
        result.malformed += len(chunk.malformed)
        result.malformed_examples += chunk.malformed[: 5 - len(result.malformed_examples)]
        result.empty += chunk.num_records - len({row for texts in chunk.texts for row in texts.rows})
        splits = self._splits(chunk)
        for key_index, texts in enumerate(chunk.texts):
            self._add_texts(key_index, texts, splits)

    def _splits(self, chunk: EncodedChunk) -> list[int | None]:
        """The split of every record of the chunk; ``None`` for one that is left out."""
        if not chunk.digests:
            return [0] * chunk.num_records
        splits: list[int | None] = []
        for digest in chunk.digests:
            if self.dedup and digest in self.seen:
                self.result.duplicates += bool(digest)
                splits.append(None)
                continue
            if self.dedup:
                self.seen.add(digest)
            splits.append(split_of(digest, self.bounds))
        return splits

    def _add_texts(self, key_index: int, texts: EncodedTexts, splits: list[int | None]) -> None:
        start = 0
        for row, length, num_bytes in zip(texts.rows, texts.lengths, texts.num_bytes):
            ids = texts.ids[start : start + length]
            start += length
            split = splits[row]
            if split is not None:
                prefix = self.prefixes[split][key_index]
                self.builders[prefix].add_document(ids, [length])
                self.result.datasets[prefix].add(tokens=length, num_bytes=num_bytes, max_token_id=int(ids.max()))

    def commit(self, provenance: dict[str, Any]) -> None:
        """Finishes all datasets and gives them their names.

        Args:
            provenance: further entries of the statistics files.

        Raises:
            ValueError: a dataset got no document.
        """
        self._check_filled()
        skipped = {
            "skipped_empty": self.result.empty,
            "skipped_duplicates": self.result.duplicates,
            "skipped_malformed": self.result.malformed,
        }
        for prefix, builder in self.builders.items():
            builder.finalize(_partial(prefix, ".idx"))
            text = self.result.datasets[prefix].to_json(**skipped, **provenance)
            Path(_partial(prefix, ".json")).write_text(text)
        for prefix in self.builders:
            Path(prefix + ".idx").unlink(missing_ok=True)
            for suffix in _SUFFIXES:
                target = statistics_path(prefix) if suffix == ".json" else prefix + suffix
                os.replace(_partial(prefix, suffix), target)

    def _check_filled(self) -> None:
        total = sum(statistics.documents for statistics in self.result.datasets.values())
        for prefix, statistics in self.result.datasets.items():
            if statistics.documents:
                continue
            if not total:
                raise ValueError(
                    f"the inputs hold no document with any text ({self.result.empty} empty, "
                    f"{self.result.malformed} malformed)"
                )
            raise ValueError(f"none of the {total} documents belongs into {prefix}; give it a larger share, or 0")


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


def _partial(prefix: str, suffix: str) -> str:
    path = Path(prefix)
    return str(path.with_name(f".{path.name}.{os.getpid()}{suffix}.partial"))
