"""Corpus -> Megatron-Core indexed dataset. The bytes written depend neither on the number of workers nor on kills."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from megatron_midus.data.corpus import TEXT_KEY, Record, find_inputs, open_parquet, read_raw, unescape
from megatron_midus.data.encoding import (
    EncodedChunk,
    EncodeSettings,
    LengthFilter,
    encode_chunk,
    encode_in_worker,
    initialize_worker,
)
from megatron_midus.data.journal import Journal
from megatron_midus.data.statistics import PreprocessResult, statistics_path
from megatron_midus.data.tokenizer import make_tokenizer
from megatron_midus.data.writer import DatasetWriter, dtype_of
from megatron_midus.errors import UserError

SPLITS = ("train", "valid", "test")

# Work for one task of a worker: enough to hide the hand-over, little enough to keep memory and the end of a run short.
_CHUNK_BYTES = 1 << 19
_CHUNK_DOCUMENTS = 2048
_CHUNKS_AHEAD = 4


@dataclasses.dataclass(frozen=True)
class PreprocessConfig:
    """Preprocessing"""

    input: list[str]
    """Files (.jsonl or .txt, also .gz or .zst, and .parquet), directories of such files, or glob patterns. Must be given."""

    output_prefix: str
    """P of the outputs P_KEY_document.bin, .idx and .json (statistics). Must be given. Until they are whole, everything is in the
    directory .P.partial beside them; a run that was killed goes on from there when it is started again."""

    tokenizer_model: str
    """Directory of a HuggingFaceTokenizer, or .model file of a SentencePieceTokenizer. Must be given."""

    tokenizer_type: Literal["HuggingFaceTokenizer", "SentencePieceTokenizer", "NullTokenizer"] = "HuggingFaceTokenizer"
    """Kind of tokenizer. NullTokenizer takes texts of numbers; its --tokenizer-model is the number of ids."""

    json_keys: list[str] = dataclasses.field(default_factory=lambda: [TEXT_KEY])
    """Keys of the texts in a JSON line, or columns of a parquet file; each key makes a dataset of its own."""

    append_eod: bool = False
    """End every document with the tokenizer's end-of-sequence token. Training wants this."""

    prepend_bos: bool = False
    """Start every document with the tokenizer's beginning-of-sequence token."""

    split_special_tokens: bool = False
    """Encode special tokens that are spelled out in a text as plain characters, not as the tokens themselves."""

    workers: int = 1
    """Processes that encode. The output does not depend on it."""

    text_document_separator: str = "\\f"
    """What divides a .txt file into documents; \\n, \\t, \\f (form feed) and \\r are understood. A file without it is
    one document."""

    skip_bad_lines: bool = False
    """Leave malformed lines out and list them in P_malformed.txt, instead of ending at the first."""

    min_document_bytes: int | None = None
    """Leave out documents of fewer UTF-8 bytes."""

    max_document_bytes: int | None = None
    """Leave out documents of more UTF-8 bytes."""

    min_document_tokens: int | None = None
    """Leave out documents of fewer tokens, the beginning-of-sequence and end-of-document tokens not counted."""

    max_document_tokens: int | None = None
    """Leave out documents of more tokens, counted likewise."""

    split_by_hash: list[str] | None = None
    """Shares of train, valid and test, such as 98,1,1. Makes P_train_KEY_document and so on; a document goes by the
    hash of its text (white space aside), so the same text is always on the same side."""

    dedup: bool = dataclasses.field(default=False, metadata={"aliases": ["deduplicate"]})
    """Leave out documents whose text came before (white space aside), the first stays. Takes about 100 bytes of memory
    a document."""

    commit_seconds: float = 15.0
    """Seconds between the points from which a killed run can go on."""

    overwrite: bool = False
    """Replace outputs that exist, and throw away an unfinished run that had other settings."""

    def __post_init__(self) -> None:
        for name in ("input", "output_prefix", "tokenizer_model", "json_keys"):
            if not getattr(self, name):
                raise UserError(f"--{name.replace('_', '-')} is missing")
        if self.workers < 1:
            raise UserError(f"workers={self.workers} must be at least 1")
        if len(set(self.json_keys)) != len(self.json_keys):
            raise UserError(f"--json-keys {' '.join(self.json_keys)} names a key twice")
        for key in self.json_keys:
            if not re.fullmatch(r"[^/\0]+", key):
                raise UserError(f"--json-keys {key!r} cannot be part of a file name")
        for kind in ("bytes", "tokens"):
            low, high = getattr(self, f"min_document_{kind}"), getattr(self, f"max_document_{kind}")
            if (low is not None and low < 0) or (high is not None and high < max(1, low or 0)):
                raise UserError(
                    f"--min-document-{kind} {low} and --max-document-{kind} {high} leave no document; "
                    "give 0 <= min <= max"
                )
        if not self.commit_seconds >= 0:
            raise UserError(f"commit_seconds={self.commit_seconds} must be 0 or more")
        self.shares()

    def shares(self) -> list[float]:
        """``--split-by-hash`` as numbers, separated by commas or blanks; ``[1.0]`` without it."""
        if self.split_by_hash is None:
            return [1.0]
        words = [str(value) for value in self.split_by_hash]
        try:
            shares = [float(part) for word in words for part in word.split(",") if part]
        except ValueError:
            shares = []
        if not 1 <= len(shares) <= 3 or min(shares) < 0 or not 0 < sum(shares) < float("inf") or shares[0] == 0:
            raise UserError(f"--split-by-hash {' '.join(words)} is not shares of train, valid and test, such as 98,1,1")
        return shares


def preprocess(config: PreprocessConfig) -> PreprocessResult:
    """Encodes a corpus into indexed datasets, written beside their targets and renamed when all are whole.

    A run that ended early goes on from its last commit when it is started again with the same settings and inputs;
    ``workers``, ``skip_bad_lines`` and ``commit_seconds`` may be others.

    Raises:
        ValueError: inputs, tokenizer or outputs that cannot be used, a malformed line, no document at all.
    """
    separator = unescape(config.text_document_separator)
    files = find_inputs(config.input)
    _check_keys(files, config)
    settings = _encode_settings(config)
    provenance = _provenance(config, settings)
    directory = Path(config.output_prefix).parent / f".{Path(config.output_prefix).name}.partial"
    what = {**provenance, "json_keys": config.json_keys, "separator": separator, "inputs": _fingerprints(files)}
    with Journal(directory, what, restart=config.overwrite) as journal:
        writer = DatasetWriter(
            output_prefixes(config),
            journal,
            dtype=settings.dtype,
            shares=config.shares(),
            dedup=config.dedup,
            malformed_path=f"{config.output_prefix}_malformed.txt",
        )
        if not config.overwrite and not writer.is_complete:
            _check_absent(config)
        started = time.monotonic()
        try:
            _fill(writer, files, settings, config, separator)
            writer.result.seconds = time.monotonic() - started
            writer.finish(provenance)
        except BaseException:
            if journal.state is not None:
                print(f"{directory} keeps what was done; the same command goes on from there", file=sys.stderr)
            raise
    return writer.result


def _encode_settings(config: PreprocessConfig) -> EncodeSettings:
    tokenizer = make_tokenizer(
        config.tokenizer_type, config.tokenizer_model, split_special_tokens=config.split_special_tokens
    )
    if config.prepend_bos and tokenizer.bos is None:
        raise UserError(f"--prepend-bos: the tokenizer {config.tokenizer_model} has no beginning-of-sequence token")
    return EncodeSettings(
        tokenizer=tokenizer,
        keys=tuple(config.json_keys),
        dtype=dtype_of(tokenizer.vocab_size),
        append_eod=config.append_eod,
        prepend_bos=config.prepend_bos,
        skip_bad_lines=config.skip_bad_lines,
        with_digests=config.dedup or config.split_by_hash is not None,
        lengths=LengthFilter(
            config.min_document_bytes,
            config.max_document_bytes,
            config.min_document_tokens,
            config.max_document_tokens,
        ),
    )


def _fill(
    writer: DatasetWriter, files: list[Path], settings: EncodeSettings, config: PreprocessConfig, separator: str
) -> None:
    """Encodes and writes what the writer has not got yet, and commits now and then."""
    if writer.is_complete:
        return
    committed = time.monotonic()
    records = _records_from(writer.position, files, settings.keys, separator)
    with _progress_bar(files, writer.result.bytes_read) as bar:
        for chunk, position in _encode_in_order(_chunks(records), settings, config.workers):
            writer.add(chunk, position)
            bar.update(chunk.num_bytes_read)
            if time.monotonic() - committed >= config.commit_seconds:
                writer.commit()
                committed = time.monotonic()


def output_prefixes(config: PreprocessConfig) -> list[list[str]]:
    """Prefixes ``[split][key]``; one split when ``split_by_hash`` is off, no prefix where a share is 0."""
    names = [""] if config.split_by_hash is None else [f"{name}_" for name in SPLITS]
    shares = config.shares()
    shares = shares + [0.0] * (len(names) - len(shares))
    return [
        [f"{config.output_prefix}_{name}{key}_document" for key in config.json_keys] if share > 0 else []
        for name, share in zip(names, shares)
    ]


def _check_absent(config: PreprocessConfig) -> None:
    for prefix in (prefix for split in output_prefixes(config) for prefix in split):
        for path in (f"{prefix}.bin", f"{prefix}.idx", str(statistics_path(prefix))):
            if os.path.exists(path):
                raise UserError(f"{path} exists; choose another --output-prefix, or replace it with --overwrite")


def _fingerprints(files: list[Path]) -> list[str]:
    """What tells that an input is still the same: its path, size and time of change."""
    return [f"{file} {(status := file.stat()).st_size} {status.st_mtime_ns}" for file in files]


def _provenance(config: PreprocessConfig, settings: EncodeSettings) -> dict[str, Any]:
    """What the statistics file says about how a dataset was made."""
    tokenizer = settings.tokenizer
    return {
        "dtype": settings.dtype,
        "tokenizer": tokenizer.unique_identifiers,
        "append_eod": config.append_eod,
        "prepend_bos": config.prepend_bos,
        "split_special_tokens": config.split_special_tokens,
        "split_by_hash": config.shares() if config.split_by_hash else None,
        "dedup": config.dedup,
        "document_lengths": dataclasses.asdict(settings.lengths),
    }


def _check_keys(files: list[Path], config: PreprocessConfig) -> None:
    """Plain text has no keys, and every parquet file must have the columns: told before hours of work."""
    for file in files:
        if file.suffix == ".parquet":
            open_parquet(file, config.json_keys).close()
        elif ".jsonl" not in file.name and config.json_keys != [TEXT_KEY]:
            raise UserError(
                f"{file} is plain text and has no keys; --json-keys {' '.join(config.json_keys)} needs .jsonl or .parquet"
            )


def _records_from(
    position: tuple[int, int], files: list[Path], keys: Sequence[str], separator: str
) -> Iterator[tuple[Record, tuple[int, int]]]:
    """The records of the corpus after ``position``, each with the position behind it."""
    first, done = position
    for index in range(first, len(files)):
        start = done if index == first else 0
        for number, record in enumerate(
            read_raw(files[index], keys=keys, separator=separator, start=start), start=start + 1
        ):
            yield record, (index, number)


def _chunks(records: Iterable[tuple[Record, tuple[int, int]]]) -> Iterator[tuple[list[Record], tuple[int, int]]]:
    """Runs of records, each with the position behind it."""
    chunk: list[Record] = []
    size, position = 0, (0, 0)
    for record, position in records:
        chunk.append(record)
        size += record.size
        if size >= _CHUNK_BYTES or len(chunk) >= _CHUNK_DOCUMENTS:
            yield chunk, position
            chunk, size = [], 0
    if chunk:
        yield chunk, position


def _encode_in_order(
    chunks: Iterator[tuple[list[Record], tuple[int, int]]], settings: EncodeSettings, workers: int
) -> Iterator[tuple[EncodedChunk, tuple[int, int]]]:
    """The encoded chunks in the order of the corpus, at most ``_CHUNKS_AHEAD`` a worker in flight."""
    if workers == 1:
        with _environment("TOKENIZERS_PARALLELISM", "false"):
            yield from ((encode_chunk(chunk, settings), position) for chunk, position in chunks)
        return
    # Not multiprocessing.Pool: it reads the whole corpus ahead, and hangs when a worker is killed. Not fork: the parent
    # has threads.
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=initialize_worker, initargs=(settings,)
    )
    pending: deque[tuple[Future[EncodedChunk], tuple[int, int]]] = deque()
    try:
        for chunk, position in chunks:
            pending.append((pool.submit(encode_in_worker, chunk), position))
            if len(pending) >= workers * _CHUNKS_AHEAD:
                future, position = pending.popleft()
                yield future.result(), position
        while pending:
            future, position = pending.popleft()
            yield future.result(), position
    except BrokenProcessPool:
        raise UserError(
            f"a worker process died, most likely for want of memory; use fewer than --workers {workers}"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _progress_bar(files: list[Path], done: int) -> Any:
    from tqdm import tqdm

    is_compressed = any(file.suffix in (".gz", ".zst", ".parquet") for file in files)
    total = None if is_compressed else sum(file.stat().st_size for file in files)
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(
        total=total, initial=done, unit="B", unit_scale=True, desc="encode", mininterval=interval, smoothing=0.05
    )
