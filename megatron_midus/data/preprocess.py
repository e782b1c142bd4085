"""Corpus -> Megatron-Core indexed dataset. The bytes written do not depend on the number of workers."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from megatron_midus.data.corpus import TEXT_KEY, RawDocument, find_inputs, read_raw, unescape
from megatron_midus.data.encoding import EncodedChunk, EncodeSettings, encode_chunk, encode_in_worker, initialize_worker
from megatron_midus.data.statistics import PreprocessResult
from megatron_midus.data.tokenizer import make_tokenizer

SPLITS = ("train", "valid", "test")

# Work for one task of a worker: enough to hide the hand-over, little enough to keep memory and the end of a run short.
_CHUNK_BYTES = 1 << 19
_CHUNK_DOCUMENTS = 2048
_CHUNKS_AHEAD = 4


@dataclasses.dataclass(frozen=True)
class PreprocessConfig:
    """Preprocessing"""

    input: list[str]
    """Files (.jsonl or .txt, also .gz or .zst), directories of such files, or glob patterns."""

    output_prefix: str
    """P of the outputs P_KEY_document.bin, .idx and .json (statistics)."""

    tokenizer_model: str
    """Directory of a HuggingFaceTokenizer, or .model file of a SentencePieceTokenizer."""

    tokenizer_type: Literal["HuggingFaceTokenizer", "SentencePieceTokenizer", "NullTokenizer"] = "HuggingFaceTokenizer"
    """Kind of tokenizer. NullTokenizer takes texts of numbers; its --tokenizer-model is the number of ids."""

    json_keys: list[str] = dataclasses.field(default_factory=lambda: [TEXT_KEY])
    """Keys of the texts in a JSON line; each key makes a dataset of its own."""

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
    """Count and report malformed lines instead of ending at the first."""

    split_by_hash: list[float] | None = None
    """Shares of train, valid and test. Makes P_train_KEY_document and so on; a document goes by the hash of its text,
    so the same text is always on the same side."""

    dedup: bool = False
    """Leave out documents whose text came before (white space aside); keeps 16 bytes a document in memory."""

    overwrite: bool = False
    """Replace outputs that exist."""

    def __post_init__(self) -> None:
        for name in ("input", "output_prefix", "tokenizer_model", "json_keys"):
            if not getattr(self, name):
                raise ValueError(f"--{name.replace('_', '-')} is missing")
        if self.workers < 1:
            raise ValueError(f"workers={self.workers} must be at least 1")
        if len(set(self.json_keys)) != len(self.json_keys):
            raise ValueError(f"--json-keys {' '.join(self.json_keys)} names a key twice")
        for key in self.json_keys:
            if not re.fullmatch(r"[^/\0]+", key):
                raise ValueError(f"--json-keys {key!r} cannot be part of a file name")
        shares = self.split_by_hash
        if shares is not None and (
            len(shares) > 3 or min(shares) < 0 or not 0 < sum(shares) < float("inf") or shares[0] == 0
        ):
            raise ValueError(f"--split-by-hash {' '.join(map(str, shares))} is not shares of train, valid and test")


def preprocess(config: PreprocessConfig) -> PreprocessResult:
    """Encodes a corpus into indexed datasets, written beside their targets and renamed when all are whole.

    Raises:
        ValueError: inputs, tokenizer or outputs that cannot be used, a malformed line, no document at all.
    """
    started = time.monotonic()
    separator = unescape(config.text_document_separator)
    files = find_inputs(config.input)
    _check_keys(files, config)
    tokenizer = make_tokenizer(
        config.tokenizer_type, config.tokenizer_model, split_special_tokens=config.split_special_tokens
    )
    if config.prepend_bos and tokenizer.bos is None:
        raise ValueError(f"--prepend-bos: the tokenizer {config.tokenizer_model} has no beginning-of-sequence token")
    # Here, because it imports Megatron: the workers do without, and a wrong input is told in a second.
    from megatron_midus.data.writer import DatasetWriter

    settings = EncodeSettings(
        tokenizer=tokenizer,
        keys=tuple(config.json_keys),
        dtype=_dtype_name(tokenizer.vocab_size),
        append_eod=config.append_eod,
        prepend_bos=config.prepend_bos,
        skip_bad_lines=config.skip_bad_lines,
        with_digests=config.dedup or config.split_by_hash is not None,
    )
    writer = DatasetWriter(
        output_prefixes(config),
        dtype=settings.dtype,
        shares=config.split_by_hash or [1.0],
        dedup=config.dedup,
        overwrite=config.overwrite,
    )
    with writer, _progress_bar(files) as bar:
        records = (record for file in files for record in read_raw(file, separator=separator))
        for chunk in _encode_in_order(_chunks(records), settings, config.workers):
            writer.add(chunk)
            bar.update(chunk.num_bytes_read)
        writer.commit(_provenance(config, settings))
    writer.result.seconds = time.monotonic() - started
    return writer.result


def output_prefixes(config: PreprocessConfig) -> list[list[str]]:
    """Prefixes ``[split][key]``; one split when ``split_by_hash`` is off, no prefix where a share is 0."""
    names = [""] if config.split_by_hash is None else [f"{name}_" for name in SPLITS]
    shares = config.split_by_hash or [1.0]
    shares = shares + [0.0] * (len(names) - len(shares))
    return [
        [f"{config.output_prefix}_{name}{key}_document" for key in config.json_keys] if share > 0 else []
        for name, share in zip(names, shares)
    ]


def _provenance(config: PreprocessConfig, settings: EncodeSettings) -> dict[str, Any]:
    """What the statistics file says about how a dataset was made."""
    tokenizer = settings.tokenizer
    return {
        "dtype": settings.dtype,
        "tokenizer": tokenizer.unique_identifiers,
        "append_eod": config.append_eod,
        "prepend_bos": config.prepend_bos,
        "split_special_tokens": config.split_special_tokens,
        "split_by_hash": config.split_by_hash,
        "dedup": config.dedup,
    }


def _check_keys(files: list[Path], config: PreprocessConfig) -> None:
    text_file = next((file for file in files if ".jsonl" not in file.name), None)
    if text_file is not None and config.json_keys != [TEXT_KEY]:
        raise ValueError(
            f"{text_file} is plain text and has no keys; --json-keys {' '.join(config.json_keys)} needs .jsonl"
        )


def _dtype_name(vocab_size: int) -> str:
    from megatron.core.datasets.indexed_dataset import DType

    return DType.optimal_dtype(vocab_size).__name__


def _chunks(records: Iterable[RawDocument]) -> Iterator[list[RawDocument]]:
    chunk: list[RawDocument] = []
    size = 0
    for record in records:
        chunk.append(record)
        size += len(record.content)
        if size >= _CHUNK_BYTES or len(chunk) >= _CHUNK_DOCUMENTS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encode_in_order(
    chunks: Iterator[list[RawDocument]], settings: EncodeSettings, workers: int
) -> Iterator[EncodedChunk]:
    """The encoded chunks in the order of the corpus, at most ``_CHUNKS_AHEAD`` a worker in flight."""
    if workers == 1:
        with _environment("TOKENIZERS_PARALLELISM", "false"):
            yield from (encode_chunk(chunk, settings) for chunk in chunks)
        return
    # Not multiprocessing.Pool: it reads the whole corpus ahead, and hangs when a worker is killed. Not fork: the parent
    # has threads.
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=initialize_worker, initargs=(settings,)
    )
    pending: deque[Future[EncodedChunk]] = deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(encode_in_worker, chunk))
            if len(pending) >= workers * _CHUNKS_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise ValueError(
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


def _progress_bar(files: list[Path]) -> Any:
    from tqdm import tqdm

    is_compressed = any(file.suffix in (".gz", ".zst") for file in files)
    total = None if is_compressed else sum(file.stat().st_size for file in files)
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(total=total, unit="B", unit_scale=True, desc="encode", mininterval=interval, smoothing=0.05)
