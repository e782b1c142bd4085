"""What one worker of preprocessing does: raw records in, token ids out. Imports neither torch nor Megatron."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence

import numpy

from megatron_midus.data.corpus import MalformedDocument, RawDocument
from megatron_midus.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class EncodeSettings:
    """How records become ids; the same in every worker."""

    tokenizer: Tokenizer
    keys: tuple[str, ...]
    dtype: str
    append_eod: bool
    prepend_bos: bool
    skip_bad_lines: bool
    with_digests: bool


@dataclasses.dataclass
class EncodedTexts:
    """The documents of a chunk under one JSON key, in order; records without text under that key are left out."""

    ids: numpy.ndarray  # all documents one after the other
    rows: list[int]  # the record of the chunk that each document comes from
    lengths: list[int]  # tokens of each document
    num_bytes: list[int]  # UTF-8 bytes of each document


@dataclasses.dataclass
class EncodedChunk:
    """A run of records of the corpus, encoded."""

    texts: list[EncodedTexts]  # one per key
    digests: list[bytes]  # one per well-formed record, b"" for one without text; empty when nobody asked
    num_records: int  # well-formed ones
    num_bytes_read: int
    malformed: list[str]


def text_digest(text: str) -> bytes:
    """16 bytes that are equal for texts that differ in white space only; none for a text of white space."""
    words = text.split()
    return hashlib.blake2b(" ".join(words).encode(), digest_size=16).digest() if words else b""


def encode_chunk(records: Sequence[RawDocument], settings: EncodeSettings) -> EncodedChunk:
    """Encodes a run of records.

    Raises:
        MalformedDocument: a record is no document and ``skip_bad_lines`` is off; the first one of the chunk.
    """
    malformed: list[str] = []
    rows: list[list[str]] = []
    for record in records:
        try:
            rows.append(record.parse(settings.keys))
        except MalformedDocument as error:
            if not settings.skip_bad_lines:
                raise
            malformed.append(str(error))
    return EncodedChunk(
        texts=[_encode_texts([row[i] for row in rows], settings) for i in range(len(settings.keys))],
        digests=[_record_digest(row) for row in rows] if settings.with_digests else [],
        num_records=len(rows),
        num_bytes_read=sum(len(record.content) for record in records),
        malformed=malformed,
    )


def _record_digest(row: list[str]) -> bytes:
    """Of the first text that is not empty: all keys of a record go to the same side of a split."""
    return next(filter(None, map(text_digest, row)), b"")


def _encode_texts(texts: list[str], settings: EncodeSettings) -> EncodedTexts:
    kept = [row for row, text in enumerate(texts) if text and not text.isspace()]
    encoded = settings.tokenizer.encode_batch([texts[row] for row in kept]) if kept else []
    head = [settings.tokenizer.bos] if settings.prepend_bos else []
    tail = [settings.tokenizer.eod] if settings.append_eod else []
    flat: list[int] = []
    rows, lengths, num_bytes = [], [], []
    for row, ids in zip(kept, encoded):
        if not ids:
            continue
        flat += head
        flat += ids
        flat += tail
        rows.append(row)
        lengths.append(len(head) + len(ids) + len(tail))
        num_bytes.append(len(texts[row].encode()))
    return EncodedTexts(_narrow(flat, settings), rows, lengths, num_bytes)


def _narrow(flat: list[int], settings: EncodeSettings) -> numpy.ndarray:
    # Through int64, so that an id beyond the dtype is seen here instead of wrapping around.
    ids = numpy.array(flat, dtype=numpy.int64)
    if ids.size and int(ids.max()) >= settings.tokenizer.vocab_size:
        raise ValueError(
            f"the tokenizer gave the id {int(ids.max())} although it has {settings.tokenizer.vocab_size} ids; "
            "its files do not fit together"
        )
    return ids.astype(settings.dtype)


_settings: EncodeSettings | None = None


def initialize_worker(settings: EncodeSettings) -> None:
    """Once in every worker process."""
    global _settings
    _settings = settings
    # One thread a worker: the workers are the parallelism.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def encode_in_worker(records: Sequence[RawDocument]) -> EncodedChunk:
    assert _settings is not None
    return encode_chunk(records, _settings)
