"""What one worker of preprocessing does: raw records in, token ids out. Imports neither torch nor Megatron."""

from __future__ import annotations

import dataclasses
import hashlib
import multiprocessing
import os
import threading
from collections.abc import Sequence
from multiprocessing.connection import wait

import numpy

from megatron_midus.data.chat_template import ChatTemplate
from megatron_midus.data.conversations import read_conversation
from megatron_midus.data.corpus import MalformedDocument, Record
from megatron_midus.data.tokenizer import Tokenizer
from megatron_midus.errors import UserError


@dataclasses.dataclass(frozen=True)
class LengthFilter:
    """Which documents are long enough and short enough; ``None`` = no bound. Both bounds are allowed themselves."""

    min_bytes: int | None = None
    max_bytes: int | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None

    def of_bytes(self, size: int) -> str | None:
        """``too_short`` or ``too_long`` by the UTF-8 bytes of the text, or ``None``."""
        return _outside(size, self.min_bytes, self.max_bytes)

    def of_tokens(self, count: int) -> str | None:
        """``too_short`` or ``too_long`` by the tokens of the text, or ``None``."""
        return _outside(count, self.min_tokens, self.max_tokens)


def _outside(value: int, low: int | None, high: int | None) -> str | None:
    if low is not None and value < low:
        return "too_short"
    return "too_long" if high is not None and value > high else None


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
    lengths: LengthFilter = LengthFilter()
    chat: ChatTemplate | None = None
    """Records are conversations; two datasets are made of them, the ids and the loss mask."""


@dataclasses.dataclass
class EncodedTexts:
    """The documents of a chunk under one JSON key, in order."""

    ids: numpy.ndarray  # all documents one after the other
    rows: numpy.ndarray  # [documents] int64, the record of the chunk that each comes from
    lengths: numpy.ndarray  # [documents] int32, tokens
    num_bytes: numpy.ndarray  # [documents] int64, UTF-8 bytes
    left_out: dict[int, str]  # by record: empty, too_short or too_long


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


def encode_chunk(records: Sequence[Record], settings: EncodeSettings) -> EncodedChunk:
    """Encodes a run of records.

    Raises:
        MalformedDocument: a record is no document and ``skip_bad_lines`` is off; the first one of the chunk.
    """
    if settings.chat is not None:
        return _encode_conversations(records, settings, settings.chat)
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
        num_bytes_read=sum(record.size for record in records),
        malformed=malformed,
    )


def _encode_conversations(records: Sequence[Record], settings: EncodeSettings, chat: ChatTemplate) -> EncodedChunk:
    malformed: list[str] = []
    left_out: dict[int, str] = {}
    flat: tuple[list[int], list[int]] = ([], [])  # ids and loss mask
    kept: list[tuple[int, int, int]] = []  # row, tokens, bytes
    digests: list[bytes] = []
    for record in records:
        try:
            ids, learnt, text = chat.encode(read_conversation(record.parse_object(), record.where), record.where)
        except MalformedDocument as error:
            if not settings.skip_bad_lines:
                raise
            malformed.append(str(error))
            continue
        row, size = len(digests), len(text.encode())
        digests.append(text_digest(text))
        reason = settings.lengths.of_bytes(size) or settings.lengths.of_tokens(len(ids))
        if reason is not None:
            left_out[row] = reason
            continue
        flat[0].extend(ids)
        flat[1].extend(learnt)
        kept.append((row, len(ids), size))
    rows, lengths, num_bytes = numpy.array(kept, dtype=numpy.int64).reshape(-1, 3).T
    return EncodedChunk(
        texts=[
            EncodedTexts(_narrow(ids, settings), rows, lengths.astype(numpy.int32), num_bytes, left_out) for ids in flat
        ],
        digests=digests if settings.with_digests else [],
        num_records=len(digests),
        num_bytes_read=sum(record.size for record in records),
        malformed=malformed,
    )


def _record_digest(row: list[str]) -> bytes:
    """Of the first text that is not empty: all keys of a record go to the same side of a split."""
    return next(filter(None, map(text_digest, row)), b"")


def _encode_texts(texts: list[str], settings: EncodeSettings) -> EncodedTexts:
    left_out: dict[int, str] = {}
    candidates: list[tuple[int, int]] = []  # row and bytes
    for row, text in enumerate(texts):
        size = len(text.encode())
        reason = "empty" if not text or text.isspace() else settings.lengths.of_bytes(size)
        if reason is None:
            candidates.append((row, size))
        else:
            left_out[row] = reason
    encoded = settings.tokenizer.encode_batch([texts[row] for row, _ in candidates]) if candidates else []
    head = [settings.tokenizer.bos] if settings.prepend_bos else []
    tail = [settings.tokenizer.eod] if settings.append_eod else []
    flat: list[int] = []
    kept: list[tuple[int, int, int]] = []  # row, tokens, bytes
    for (row, size), ids in zip(candidates, encoded):
        reason = settings.lengths.of_tokens(len(ids)) if ids else "empty"
        if reason is not None:
            left_out[row] = reason
            continue
        flat += head
        flat += ids
        flat += tail
        kept.append((row, len(head) + len(ids) + len(tail), size))
    rows, lengths, num_bytes = numpy.array(kept, dtype=numpy.int64).reshape(-1, 3).T
    return EncodedTexts(_narrow(flat, settings), rows, lengths.astype(numpy.int32), num_bytes, left_out)


def _narrow(flat: list[int], settings: EncodeSettings) -> numpy.ndarray:
    # Through int64, so that an id beyond the dtype is seen here instead of wrapping around.
    ids = numpy.array(flat, dtype=numpy.int64)
    if ids.size and int(ids.max()) >= settings.tokenizer.vocab_size:
        raise UserError(
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
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    """A parent that is killed closes nothing: its workers would wait for their next task for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def encode_in_worker(records: Sequence[Record]) -> EncodedChunk:
    assert _settings is not None
    return encode_chunk(records, _settings)
