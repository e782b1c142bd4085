"""Perplexity of a causal language model on documents.

Every document is followed by the end-of-document token, which is predicted too; the first document is preceded by one,
so that its first token has a context. A window reads ``seq_length`` tokens and predicts the token after each of them: the
last token that a window predicts is the first that the next one reads. So every token but the first of a stream is
predicted exactly once, as in training, and the loss belongs to the exact bytes of the text.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F

from megatron_midus.errors import UserError
from megatron_midus.evaluation.processes import ALONE, Processes
from megatron_midus.progress import SILENT, Progress

_IGNORED = -100


class Tokenizer(Protocol):
    """What an evaluation needs of a tokenizer; :class:`megatron_midus.data.Tokenizer` fits."""

    eod: int
    bos: int | None
    vocab_size: int

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``."""
        ...


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Loss of one model on one set of documents."""

    documents: int
    bytes: int
    """UTF-8 bytes of the documents."""
    tokens: int
    """Predicted tokens, one end-of-document token per document included."""
    nats: float
    """Sum of the losses, natural logarithm."""
    seconds: float
    """Time in the model alone."""
    tokens_read: int
    """Tokens that went through the model, padding excluded."""

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers."""
        return self.nats / math.log(2) / self.bytes

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_read / max(self.seconds, 1e-9)

    def to_dict(self) -> dict[str, float | None]:
        """Fields and figures; an infinite perplexity, which JSON lacks, is ``None``."""
        derived = ("loss", "perplexity", "bits_per_byte", "tokens_per_second")
        values = {**dataclasses.asdict(self), **{name: getattr(self, name) for name in derived}}
        return {name: value if math.isfinite(value) else None for name, value in values.items()}


@dataclasses.dataclass(frozen=True)
class _Window:
    """Reads tokens ``start … stop - 1`` of a stream and predicts tokens ``first … stop``."""

    ids: torch.Tensor  # [stream] int64
    labels: torch.Tensor  # [stream] int64, _IGNORED where a token is never predicted
    start: int
    stop: int
    first: int

    def inputs_and_labels(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``[stop - start]`` each."""
        labels = self.labels[self.start + 1 : self.stop + 1].clone()
        labels[: self.first - self.start - 1] = _IGNORED
        return self.ids[self.start : self.stop], labels


def measure_perplexity(
    model: Any,
    tokenizer: Tokenizer,
    documents: Sequence[str],
    *,
    seq_length: int = 512,
    stride: int | None = None,
    mode: Literal["packed", "document"] = "packed",
    add_bos: bool = False,
    batch_size: int = 8,
    progress: Progress = SILENT,
    title: str = "perplexity",
    processes: Processes = ALONE,
) -> Perplexity:
    """Measures the loss of ``model`` on every token of ``documents``.

    Args:
        model: called as ``model(input_ids=[b, s], use_cache=False)``; gives ``logits [b, s, vocabulary]``.
        tokenizer: of this model.
        documents: texts.
        seq_length: tokens that a window reads.
        stride: tokens by which the next window starts later; ``seq_length`` when absent. A smaller one gives every
            prediction at least ``seq_length - stride`` tokens of context, at ``seq_length / stride`` times the cost.
        mode: ``packed`` = one stream of all documents; ``document`` = every document is a stream of its own.
        add_bos: start every document with the tokenizer's beginning-of-sequence token, which is read, not predicted.
        batch_size: windows in one call.
        progress: shows how many tokens have been read, under ``title``.
        processes: share the batches, which are those of one process.

    Raises:
        ValueError: no document, a setting out of range, or a loss that is not finite.
    """
    stride = seq_length if stride is None else stride
    _check_settings(tokenizer, documents, seq_length, stride, batch_size, add_bos)
    streams = _streams(tokenizer, documents, mode=mode, add_bos=add_bos)
    windows = [window for stream in streams for window in _cut(stream, seq_length, stride)]
    # Short windows of a batch are padded to its longest one.
    windows.sort(key=lambda window: window.start - window.stop)
    device = next(model.parameters()).device
    # The first call of a model allocates and selects kernels; the shortest window takes that out of the timing.
    _batch_nats(model, windows[-1:], device)
    batches = processes.own([windows[start : start + batch_size] for start in range(0, len(windows), batch_size)])
    found, seconds = [], 0.0
    total = sum(window.stop - window.start for batch in batches for window in batch)
    with progress(title, total=total, unit="token") as advance:
        for batch in batches:
            began = time.perf_counter()
            found.append(_batch_nats(model, batch, device))
            seconds += time.perf_counter() - began
            advance(sum(window.stop - window.start for window in batch))
    # In the order of one process, so that the sum is the same to the last bit.
    losses, counts = zip(*processes.all_of(found))
    nats = sum(losses)
    if not math.isfinite(nats):
        raise UserError("the loss is not finite; the weights hold NaN or infinity, or overflow in this dtype")
    num_bytes = sum(len(text.encode()) for text in documents)
    tokens_read = sum(window.stop - window.start for window in windows)
    seconds = max(processes.all_of([seconds]))
    return Perplexity(len(documents), num_bytes, sum(counts), nats, seconds, tokens_read)


def limit_documents(documents: Iterable[str], tokenizer: Tokenizer, max_tokens: int) -> list[str]:
    """The first documents that make at most ``max_tokens`` tokens; the last one is cut at a character."""
    if max_tokens < 1:
        raise UserError(f"max_tokens={max_tokens} must be at least 1")
    kept: list[str] = []
    left = max_tokens
    for text in documents:
        # No token of an ordinary text stands for more than 64 characters on average: a bound on the work, not on the result.
        piece = text[: 64 * left]
        count = len(tokenizer.encode_batch([piece])[0])
        while count > left and piece:
            piece = piece[: min(len(piece) - 1, len(piece) * left // count)]
            count = len(tokenizer.encode_batch([piece])[0])
        if piece.strip():
            kept.append(piece)
            left -= count
        if left <= 0 or piece != text:
            break
    return kept


def _check_settings(
    tokenizer: Tokenizer, documents: Sequence[str], seq_length: int, stride: int, batch_size: int, add_bos: bool
) -> None:
    if not documents:
        raise UserError("there is no document to evaluate")
    if seq_length < 1:
        raise UserError(f"seq_length={seq_length} must be at least 1")
    if not 1 <= stride <= seq_length:
        raise UserError(f"stride={stride} is out of range; choose 1 to seq_length={seq_length}")
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1")
    if add_bos and tokenizer.bos is None:
        raise UserError("the tokenizer has no beginning-of-sequence token to start documents with")


def _streams(
    tokenizer: Tokenizer, documents: Sequence[str], *, mode: str, add_bos: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """``(ids, labels)`` per stream, ``[stream]`` each; the first token of a stream is never predicted."""
    if mode not in ("packed", "document"):
        raise UserError(f"mode={mode!r} is not known; choose packed or document")
    ids: list[int] = []
    labels: list[int] = []
    for encoded in tokenizer.encode_batch(documents):
        body = [*encoded, tokenizer.eod]
        if add_bos:
            head = [tokenizer.bos]
        else:
            # The end of the document before is the context of this one.
            head = [] if ids else [tokenizer.eod]
        ids += [*head, *body]
        labels += [*([_IGNORED] * len(head)), *body]
        if mode == "document":
            yield torch.tensor(ids), torch.tensor(labels)
            ids, labels = [], []
    if ids:
        yield torch.tensor(ids), torch.tensor(labels)


def _cut(stream: tuple[torch.Tensor, torch.Tensor], seq_length: int, stride: int) -> Iterator[_Window]:
    """Windows that together predict every token of a stream but the first exactly once."""
    ids, labels = stream
    last = len(ids) - 1
    first = 1
    for start in range(0, last, stride):
        stop = min(start + seq_length, last)
        yield _Window(ids, labels, start, stop, first)
        first = stop + 1
        if stop == last:
            return


@torch.inference_mode()
def _batch_nats(model: Any, batch: list[_Window], device: torch.device) -> tuple[float, int]:
    """Sum of the losses of a batch, added in float64, and the number of predictions in it."""
    longest = max(window.stop - window.start for window in batch)
    inputs = torch.zeros(len(batch), longest, dtype=torch.int64)
    labels = torch.full((len(batch), longest), _IGNORED)
    for row, window in enumerate(batch):
        # Padding stands on the right, where a causal model cannot see it.
        length = window.stop - window.start
        inputs[row, :length], labels[row, :length] = window.inputs_and_labels()
    predicted = int((labels != _IGNORED).sum())
    logits = model(input_ids=inputs.to(device), use_cache=False).logits  # [b, s, vocabulary]
    labels = labels.to(device)
    nats = 0.0
    for row in range(len(batch)):
        # Row by row: in float32 the logits of a whole batch take gigabytes at a vocabulary of 128k.
        losses = F.cross_entropy(logits[row].float(), labels[row], ignore_index=_IGNORED, reduction="none")  # [s]
        nats += losses.double().sum().item()
    return nats, predicted
