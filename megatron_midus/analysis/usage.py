"""Which slots a text reads: shares, dead slots, entropy, marginals, overlap of heads, and how loud a memory is."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from megatron_midus.analysis.passes import Pass, Progress, memories, own_passes
from megatron_midus.analysis.windows import Windows


class SlotCounts:
    """Reads of every slot by every head of one memory: how often, and with how much weight.

    Attributes:
        reads: int64 ``[M, N]``.
        mass: float64 ``[M, N]``, sums of the weights.
    """

    def __init__(self, num_heads: int, num_slots: int) -> None:
        self.reads = torch.zeros(num_heads, num_slots, dtype=torch.int64)
        self.mass = torch.zeros(num_heads, num_slots, dtype=torch.float64)

    def add(self, slots_TMK: torch.Tensor, weights_TMK: torch.Tensor) -> None:
        slots = slots_TMK.transpose(0, 1).flatten(1).cpu()  # [M, T * K]
        weights = weights_TMK.transpose(0, 1).flatten(1).double().cpu()
        self.reads.scatter_add_(1, slots, torch.ones_like(slots))
        self.mass.scatter_add_(1, slots, weights)


def count_slots(
    model: Any, windows: Windows, *, batch_size: int, progress: Progress | None = None
) -> dict[int, SlotCounts]:
    """Counts of every memory over a text, by block."""
    counts = empty_counts(model)
    for done in own_passes(model, windows, batch_size=batch_size, progress=progress):
        for block, entry in counts.items():
            entry.add(*done.slots_and_weights(block))
    return counts


def empty_counts(model: Any) -> dict[int, SlotCounts]:
    return {i: SlotCounts(m.config.num_lookup_heads(), m.config.memory_num_keys**2) for i, m in memories(model).items()}


# -- figures of a distribution -----------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Distribution:
    """How reads spread over slots.

    Attributes:
        num_slots: slots there are.
        share_used: of the slots, read at least once.
        share_used_if_uniform: what chance alone would reach with as many reads.
        entropy: of the reads, nats; ``None`` without any read.
        kl_to_uniform: ``ln(num_slots) - entropy``, nats.
        effective_slots: ``exp(entropy)``: so many equally popular slots would have that entropy.
    """

    num_slots: int
    share_used: float
    share_used_if_uniform: float
    entropy: float | None
    kl_to_uniform: float | None
    effective_slots: float | None

    @property
    def num_dead(self) -> int:
        """Slots that the text never read."""
        return self.num_slots - round(self.share_used * self.num_slots)


def distribution(reads: torch.Tensor) -> Distribution:
    """Figures of the reads ``[slots]``."""
    count, total = reads.numel(), int(reads.sum())
    used = reads[reads > 0]
    entropy = None
    if total:
        shares = used.double() / total
        entropy = -(shares * shares.log()).sum().item()
    by_chance = -math.expm1(total * math.log1p(-1 / count)) if count > 1 else float(total > 0)
    return Distribution(
        num_slots=count,
        share_used=len(used) / count,
        share_used_if_uniform=by_chance,
        entropy=entropy,
        kl_to_uniform=None if entropy is None else math.log(count) - entropy,
        effective_slots=None if entropy is None else math.exp(entropy),
    )


def head_overlap(reads: torch.Tensor) -> torch.Tensor:
    """Of reads ``[M, N]``: ``sum_s min(p_h(s), p_g(s))`` for every pair of heads, float64 ``[M, M]``; 1 = the same slots
    equally often, 0 = no slot in common."""
    shares = reads.double() / reads.sum(-1, keepdim=True).clamp(min=1)
    return torch.stack([torch.minimum(row, shares).sum(-1) for row in shares])


def concentration(reads: torch.Tensor, points: int = 60) -> list[tuple[float, float]]:
    """``(share of the slots, share of the reads on the most popular such share)`` from 1 slot to all, log-spaced."""
    ordered = reads.flatten().double().sort(descending=True).values.cumsum(0)
    count = len(ordered)
    places = sorted({round(count ** (i / (points - 1))) for i in range(points)})
    total = max(ordered[-1].item(), 1.0)
    return [(place / count, ordered[place - 1].item() / total) for place in places]


# -- the report of a block ---------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class BlockUsage:
    """What one memory did on the text.

    Attributes:
        bank: over the slots that exist: those that the heads share, or with variant ``full`` those of all heads.
        heads: of each head.
        row_shares, col_shares: share of each head's reads that fell on each row and column sub-key, ``[M][n]``.
        overlap: ``head_overlap``; ``None`` where heads have banks of their own.
        concentration: ``concentration`` of the bank.
        top1_mass: mean share of a look-up's weight on its best slot; ``None`` when no look-up had any weight.
        silent_lookups: share of the look-ups (token and head) without any weight; only ``relu`` has such.
        relative_norm, relative_norm_5, relative_norm_95: ``||HML(x)|| / ||x||``, mean over tokens and percentiles, x the
            hidden state that the block adds to.
        value_norm, max_value_norm: mean and largest norm of a row of the value bank.
        values_are_zero: whether the whole bank is zero.
    """

    bank: Distribution
    heads: list[Distribution]
    row_shares: list[list[float]]
    col_shares: list[list[float]]
    overlap: list[list[float]] | None
    concentration: list[tuple[float, float]]
    top1_mass: float | None
    silent_lookups: float
    relative_norm: float
    relative_norm_5: float
    relative_norm_95: float
    value_norm: float
    max_value_norm: float
    values_are_zero: bool


class _Loudness:
    """Sums over look-ups and tokens of one memory."""

    def __init__(self) -> None:
        self.top1, self.speaking, self.lookups = 0.0, 0, 0
        self.ratios: list[torch.Tensor] = []

    def add(self, weights_TMK: torch.Tensor, read: torch.Tensor, written: torch.Tensor) -> None:
        totals = weights_TMK.double().sum(-1)  # [T, M]
        speaks = totals > 0
        best = weights_TMK.amax(-1).double()
        self.top1 += (best[speaks] / totals[speaks]).sum().item()
        self.speaking += int(speaks.sum())
        self.lookups += speaks.numel()
        norms = (states.flatten(0, -2).float().norm(dim=-1) for states in (written, read))
        self.ratios.append((next(norms) / next(norms).clamp(min=1e-30)).cpu())


def measure_usage(
    model: Any, windows: Windows, *, batch_size: int, progress: Progress | None = None
) -> tuple[dict[int, BlockUsage], dict[int, SlotCounts], torch.Tensor]:
    """One pass over the text.

    Returns:
        Figures and counts by block, and the loss of each window, nats, float64 ``[W]``.
    """
    counts = empty_counts(model)
    loudness = {block: _Loudness() for block in counts}
    nats = []
    for done in own_passes(model, windows, batch_size=batch_size, progress=progress):
        nats.append(done.nats)
        for block in counts:
            _add(done, block, counts[block], loudness[block])
    found = {block: _summarise(memory, counts[block], loudness[block]) for block, memory in memories(model).items()}
    return found, counts, torch.cat(nats)


def _add(done: Pass, block: int, counts: SlotCounts, loudness: _Loudness) -> None:
    slots, weights = done.slots_and_weights(block)
    counts.add(slots, weights)
    loudness.add(weights, done.inputs[block], done.written[block])


def _summarise(memory: Any, counts: SlotCounts, loudness: _Loudness) -> BlockUsage:
    reads, num_keys = counts.reads, memory.config.memory_num_keys
    has_own_banks = memory.config.memory_variant == "full"
    bank = reads.flatten() if has_own_banks else reads.sum(0)
    grid = reads.double().view(len(reads), num_keys, num_keys)
    grid = grid / grid.sum((1, 2), keepdim=True).clamp(min=1)
    ratios = torch.cat(loudness.ratios).double()
    norms = memory.value_bank.detach().float().norm(dim=-1)
    return BlockUsage(
        bank=distribution(bank),
        heads=[distribution(row) for row in reads],
        row_shares=grid.sum(2).tolist(),
        col_shares=grid.sum(1).tolist(),
        overlap=None if has_own_banks else head_overlap(reads).tolist(),
        concentration=concentration(bank),
        top1_mass=loudness.top1 / loudness.speaking if loudness.speaking else None,
        silent_lookups=1 - loudness.speaking / loudness.lookups,
        relative_norm=ratios.mean().item(),
        relative_norm_5=_percentile(ratios, 0.05),
        relative_norm_95=_percentile(ratios, 0.95),
        value_norm=norms.double().mean().item(),
        max_value_norm=norms.max().item(),
        values_are_zero=not bool(norms.any()),
    )


def _percentile(values: torch.Tensor, share: float) -> float:
    """Not ``torch.quantile``, which refuses more than 16 million values."""
    return values.sort().values[min(len(values) - 1, round(share * (len(values) - 1)))].item()
