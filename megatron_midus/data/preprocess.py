"""Corpus -> Megatron-Core indexed dataset. The bytes written depend neither on the number of workers nor on kills."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from megatron_midus.config.preprocess import DEFAULT_SPLIT, PreprocessConfig
from megatron_midus.data import conversations
from megatron_midus.data.chat_template import ChatTemplate
from megatron_midus.data.corpus import Record, unescape
from megatron_midus.data.encoding import (
    EncodedChunk,
    EncodeSettings,
    LengthFilter,
    encode_chunk,
    encode_in_worker,
    initialize_worker,
)
from megatron_midus.data.inputs import Input, find
from megatron_midus.data.journal import Journal
from megatron_midus.data.shards import inputs_of_shard
from megatron_midus.data.statistics import PreprocessResult, statistics_path
from megatron_midus.data.tokenizer import make_tokenizer
from megatron_midus.data.writer import DatasetWriter, dtype_of
from megatron_midus.errors import UserError
from megatron_midus.hub import local_model
from megatron_midus.progress import SILENT, Progress

SPLITS = ("train", "valid", "test")

# Work for one task of a worker: enough to hide the hand-over, little enough to keep memory and the end of a run short.
_CHUNK_BYTES = 1 << 19
_CHUNK_DOCUMENTS = 2048
_CHUNKS_AHEAD = 4


def preprocess(config: PreprocessConfig, progress: Progress = SILENT) -> PreprocessResult:
    """Encodes a corpus into indexed datasets, written beside their targets and renamed when all are whole.

    A run that ended early goes on from its last commit when it is started again with the same settings and inputs;
    ``workers``, ``skip_bad_lines`` and ``commit_seconds`` may be others.

    Raises:
        ValueError: inputs, tokenizer or outputs that cannot be used, a malformed line, no document at all.
    """
    shard = config.shard_of_files()
    inputs = find(config.input, _keys(config), split=config.split or DEFAULT_SPLIT, with_sizes=shard is not None)
    return preprocess_inputs(config, inputs if shard is None else inputs_of_shard(inputs, shard), progress)


def preprocess_inputs(config: PreprocessConfig, inputs: list[Input], progress: Progress = SILENT) -> PreprocessResult:
    """``preprocess`` of what was found already: all that ``config.input`` and ``config.shard`` mean."""
    separator = unescape(config.text_document_separator)
    settings = _encode_settings(config)
    provenance = _provenance(config, settings)
    directory = Path(config.written_prefix).parent / f".{Path(config.written_prefix).name}.partial"
    what = {**provenance, "json_keys": config.dataset_names, "separator": separator}
    what["inputs"] = [each.fingerprint for each in inputs]
    with Journal(directory, what, restart=config.overwrite) as journal:
        writer = DatasetWriter(
            output_prefixes(config),
            journal,
            dtype=settings.dtype,
            shares=config.shares(),
            dedup=config.dedup,
            malformed_path=f"{config.written_prefix}_malformed.txt",
            is_shard=config.shard is not None,
        )
        if not config.overwrite and not writer.is_complete:
            _check_absent(config)
        started = time.monotonic()
        try:
            _fill(writer, inputs, settings, config, progress)
            writer.result.seconds = time.monotonic() - started
            writer.finish(provenance)
        except BaseException:
            if journal.state is not None:
                print(f"{directory} keeps what was done; the same command goes on from there", file=sys.stderr)
            raise
    return writer.result


def _keys(config: PreprocessConfig) -> tuple[str, ...]:
    """What is read of a record."""
    return conversations.KEYS if config.sft else tuple(config.json_keys)


def _encode_settings(config: PreprocessConfig) -> EncodeSettings:
    tokenizer = make_tokenizer(
        config.tokenizer_type, config.tokenizer_model, split_special_tokens=config.split_special_tokens
    )
    if config.prepend_bos and tokenizer.bos is None:
        raise UserError(f"--prepend-bos: the tokenizer {config.tokenizer_model} has no beginning-of-sequence token")
    return EncodeSettings(
        tokenizer=tokenizer,
        keys=_keys(config),
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
        chat=_chat_template(config),
    )


def _chat_template(config: PreprocessConfig) -> ChatTemplate | None:
    if not config.sft:
        return None
    return ChatTemplate(
        local_model(config.tokenizer_model), template=config.chat_template, append_eod=config.append_eod
    )


def _fill(
    writer: DatasetWriter, inputs: list[Input], settings: EncodeSettings, config: PreprocessConfig, progress: Progress
) -> None:
    """Encodes and writes what the writer has not got yet, and commits now and then."""
    if writer.is_complete:
        return
    committed = time.monotonic()
    records = _records_from(writer.position, inputs, settings.keys, unescape(config.text_document_separator))
    with progress("encode", total=_total_bytes(inputs), unit="B", initial=writer.result.bytes_read) as advance:
        for chunk, position in _encode_in_order(_chunks(records), settings, config.workers):
            writer.add(chunk, position)
            advance(chunk.num_bytes_read)
            if time.monotonic() - committed >= config.commit_seconds:
                writer.commit()
                committed = time.monotonic()


def output_prefixes(config: PreprocessConfig) -> list[list[str]]:
    """Prefixes ``[split][key]``; one split when ``split_by_hash`` is off, no prefix where a share is 0."""
    names = [""] if config.split_by_hash is None else [f"{name}_" for name in SPLITS]
    shares = config.shares()
    shares = shares + [0.0] * (len(names) - len(shares))
    return [
        [f"{config.written_prefix}_{name}{key}_document" for key in config.dataset_names] if share > 0 else []
        for name, share in zip(names, shares)
    ]


def _check_absent(config: PreprocessConfig) -> None:
    for prefix in (prefix for split in output_prefixes(config) for prefix in split):
        for path in (f"{prefix}.bin", f"{prefix}.idx", str(statistics_path(prefix))):
            if os.path.exists(path):
                raise UserError(f"{path} exists; choose another --output-prefix, or replace it with --overwrite")


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
        **({} if settings.chat is None else {"sft": True, "chat_template_sha256": settings.chat.digest}),
    }


def _records_from(
    position: tuple[int, int], inputs: list[Input], keys: Sequence[str], separator: str
) -> Iterator[tuple[Record, tuple[int, int]]]:
    """The records of the corpus after ``position``, each with the position behind it."""
    first, done = position
    for index in range(first, len(inputs)):
        start = done if index == first else 0
        records = inputs[index].records(keys, separator=separator, start=start)
        for number, record in enumerate(records, start=start + 1):
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
            f"a worker process died, most likely because memory ran out; use fewer than --workers {workers}"
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


def _total_bytes(inputs: list[Input]) -> int | None:
    """Bytes of text in the corpus; ``None`` where only reading it would tell."""
    sizes = [each.num_text_bytes for each in inputs]
    return None if None in sizes else sum(size or 0 for size in sizes)
