"""A text as windows of equal length, and what a loss is of them: a mean, and a difference paired over the windows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch

from megatron_midus.errors import UserError
from megatron_midus.evaluation.perplexity import Tokenizer


@dataclasses.dataclass(frozen=True)
class Windows:
    """What a model reads and what it has to predict.

    Attributes:
        inputs: int64 ``[W, S]``, the tokens of each window.
        labels: int64 ``[W, S]``, the token after each of them.
    """

    inputs: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def num_tokens(self) -> int:
        return self.inputs.numel()

    def batches(self, size: int) -> Iterator[Windows]:
        for inputs, labels in zip(self.inputs.split(size), self.labels.split(size)):
            yield Windows(inputs, labels)

    def halves(self) -> tuple[Windows, Windows]:
        """Every other window, on which something is fitted, and those between, on which it is measured.

        Not the first and the second half: a text whose parts differ, as files of several sources do, would be fitted on
        one kind and measured on another.

        Raises:
            ValueError: fewer than four windows.
        """
        if len(self) < 4:
            raise UserError(
                f"the text makes {len(self)} windows, and fitting on one half and measuring on the other needs 4; give "
                "more text, or a smaller seq_length"
            )
        return Windows(self.inputs[1::2], self.labels[1::2]), Windows(self.inputs[::2], self.labels[::2])


def make_windows(tokenizer: Tokenizer, documents: Sequence[str], *, seq_length: int) -> Windows:
    """Cuts all documents, in one stream, into windows of ``seq_length`` tokens.

    The stream is that of ``evaluation/perplexity.py``: an end-of-document token before the first document and after
    each one. Tokens that do not fill a window at the end are left out, so that all windows weigh the same.

    Raises:
        ValueError: no document, a length below 1, or a text shorter than one window.
    """
    if seq_length < 1:
        raise UserError(f"seq_length={seq_length} must be at least 1")
    if not documents:
        raise UserError("there is no document to analyse")
    stream = [tokenizer.eod]
    for ids in tokenizer.encode_batch(documents):
        stream += [*ids, tokenizer.eod]
    count = (len(stream) - 1) // seq_length
    if count == 0:
        raise UserError(
            f"the text has {len(stream) - 1} tokens, less than one window of seq_length={seq_length}; give more text, or "
            "a smaller seq_length"
        )
    ids = torch.tensor(stream[: count * seq_length + 1])
    return Windows(ids[:-1].view(count, seq_length), ids[1:].view(count, seq_length))


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure and its standard error over windows; ``None`` with a single window."""

    value: float
    stderr: float | None

    @property
    def is_clear(self) -> bool:
        """Whether the figure is more than two standard errors away from zero."""
        return self.stderr is not None and abs(self.value) > 2 * self.stderr

    def text(self, *, scale: float = 1.0, digits: int = 4, sign: str = "") -> str:
        error = "" if self.stderr is None else f" ± {self.stderr * scale:.{digits}f}"
        return f"{self.value * scale:{sign}.{digits}f}{error}"


def mean_loss(nats_W: torch.Tensor, tokens_per_window: int) -> Estimate:
    """Nats per token of windows of equal length.

    Args:
        nats_W: float64 ``[W]``, sum of the losses of each window.
    """
    return estimate(nats_W / tokens_per_window)


def loss_change(changed_W: torch.Tensor, own_W: torch.Tensor, tokens_per_window: int) -> Estimate:
    """Mean of the windows' differences, nats per token. Windows are hard or easy for both, so the error is of the
    differences, not of the losses."""
    return estimate((changed_W - own_W) / tokens_per_window)


def estimate(values_W: torch.Tensor) -> Estimate:
    """Mean and standard error of the mean."""
    count = len(values_W)
    error = values_W.std().item() / math.sqrt(count) if count > 1 else None
    return Estimate(values_W.mean().item(), error)
