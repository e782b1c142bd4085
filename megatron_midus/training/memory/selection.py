"""Which slots a sparse step updates: scores of use in a batch against a background, and the highest of them.

Shapes: ``[..., N]``, one row per value bank of N slots.
"""

from __future__ import annotations

import torch

from megatron_midus.checkpoint.background import SlotBackground


def tfidf(reads: torch.Tensor, background_batches: torch.Tensor, num_batches: int) -> torch.Tensor:
    """``reads * log((B + 1) / (b + 1))``, fp64 (Lin et al. 2025, arXiv 2510.15103).

    Args:
        reads: of every slot in a batch; their sum, by which the paper divides, is the same for all slots of a bank.
        background_batches: b, background batches that read the slot.
        num_batches: B.
    """
    return reads.double() * ((num_batches + 1) / (background_batches.double() + 1)).log()


def kl(reads: torch.Tensor, background_reads: torch.Tensor) -> torch.Tensor:
    """``p log(p / q)``, fp64, a slot's part of the divergence of the batch from the background (Goyal et al. 2026, arXiv
    2604.05248); 0 where nothing was read.

    Args:
        reads: of every slot in a batch; p is their share.
        background_reads: in the background; q is their share, each slot's count one higher so that none is zero.
    """
    p = reads.double() / reads.sum(-1, keepdim=True).clamp(min=1)
    q = background_reads.double() + 1
    return torch.special.xlogy(p, p / (q / q.sum(-1, keepdim=True)))


def slot_scores(kind: str, reads: torch.Tensor, background: SlotBackground, num_batches: int) -> torch.Tensor:
    """The score that ``--memory-update-score`` names."""
    if kind == "tfidf":
        return tfidf(reads, background.batches, num_batches)
    return kl(reads, background.reads)


def highest_slots(scores: torch.Tensor, reads: torch.Tensor, count: int) -> torch.Tensor:
    """Whether a slot is among the ``count`` with the highest scores of those that were read, bool ``[..., N]``.

    Of slots with equal scores the first are taken, so that ranks agree. Where fewer were read, they are all taken.
    """
    scores = scores.masked_fill(reads == 0, -torch.inf)
    lowest = scores.topk(min(count, scores.shape[-1])).values[..., -1:]
    above, tied = scores > lowest, scores == lowest
    room = count - above.sum(-1, keepdim=True)
    return (above | (tied & (tied.cumsum(-1) <= room))) & (reads > 0)
