"""The loss with fewer slots per look-up, fewer sub-keys, fewer slots and a narrower bank, without any retraining.

What is dropped is chosen on every other window of the text, and the loss is measured on those between: a slot that a
text never reads costs nothing on the same text.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from megatron_midus.analysis.algebra import table_directions, table_width, truncate_table
from megatron_midus.analysis.lookup import Selected, look_up_with, select
from megatron_midus.analysis.passes import (
    Progress,
    Variant,
    measure,
    memories,
    memories_off,
    replaced,
)
from megatron_midus.analysis.usage import SlotCounts, count_slots
from megatron_midus.analysis.windows import Estimate, Windows, loss_change

SHARES_OF_SLOTS = (1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125)


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """Rises of the loss, nats per token, all Memory blocks changed at once.

    Attributes:
        topk: by number of slots that a look-up reads.
        num_keys: by number of sub-keys kept, the most read ones.
        share_of_slots: by share of the slots kept, the most read ones; the others read as zeros.
        rank: by rank of the block's table, its best approximation with all slots alike.
        rank_by_use: the same, with slots weighted by how much they are read.
        off: with all memories off, for scale.
    """

    topk: dict[int, Estimate]
    num_keys: dict[int, Estimate]
    share_of_slots: dict[float, Estimate]
    rank: dict[int, Estimate]
    rank_by_use: dict[int, Estimate]
    off: Estimate


def measure_sensitivity(
    model: Any, windows: Windows, *, batch_size: int, progress: Progress | None = None
) -> Sensitivity:
    """Chooses on every other window, measures on those between; ``ValueError`` with fewer than four."""
    first, second = windows.halves()
    counts = count_slots(model, first, batch_size=batch_size, progress=progress)
    variants = sensitivity_variants(model, counts)
    own, changed = measure(model, second, variants, batch_size=batch_size, progress=progress)
    rises = {key: loss_change(nats, own, second.inputs.shape[1]) for key, nats in changed.items()}

    def curve(kind: str) -> dict[Any, Estimate]:
        return {key[1]: rise for key, rise in rises.items() if key[0] == kind}

    return Sensitivity(
        topk=curve("topk"),
        num_keys=curve("num_keys"),
        share_of_slots=curve("slots"),
        rank=curve("rank"),
        rank_by_use=curve("rank_by_use"),
        off=rises["off", 0],
    )


def num_sensitivity_passes(model: Any) -> float:
    """Passes over the whole text that ``measure_sensitivity`` makes."""
    config = model.config
    ranks = 2 * len(halvings(table_width(next(iter(memories(model).values())))))
    curves = len(topks(config)) + len(halvings(config.memory_num_keys, config.memory_topk))
    return (3 + curves + len(SHARES_OF_SLOTS) + ranks) / 2


def halvings(largest: int, smallest: int = 1) -> list[int]:
    """``largest``, its half, its quarter … down to ``smallest``."""
    numbers = [largest]
    while numbers[-1] > smallest:
        numbers.append(max(smallest, numbers[-1] // 2))
    return numbers


def topks(config: Any) -> list[int]:
    """Numbers of slots to try: twice the model's where there are as many sub-keys, its own, and halvings of that."""
    twice = [2 * config.memory_topk] if 2 * config.memory_topk <= config.memory_num_keys else []
    return twice + halvings(config.memory_topk)


def sensitivity_variants(model: Any, counts: dict[int, SlotCounts]) -> dict[Any, Variant]:
    """Keys ``(curve, number)``; every curve holds the model as it is, with the number that it has."""
    config, found = model.config, memories(model)
    first = min(found)
    variants: dict[Any, Variant] = {("off", 0): Variant(first, lambda _: memories_off(found.values()))}
    for topk in topks(config):
        variants["topk", topk] = Variant(first, lambda _, topk=topk: _with_topk(config, topk))
    for num_keys in halvings(config.memory_num_keys, config.memory_topk):
        kept = {block: kept_keys(counts[block], memory, num_keys) for block, memory in found.items()}
        variants["num_keys", num_keys] = Variant(first, lambda _, kept=kept: _everywhere(found, _with_keys, kept))
    for share in SHARES_OF_SLOTS:
        dropped = {block: dropped_slots(counts[block], memory, share) for block, memory in found.items()}
        variants["slots", share] = Variant(first, lambda _, dropped=dropped: _everywhere(found, _without, dropped))
    for kind in ("rank", "rank_by_use"):
        directions = {
            block: table_directions(memory, counts[block].mass.sum(0) if kind == "rank_by_use" else None)[0]
            for block, memory in found.items()
        }
        largest = table_width(found[first])
        for rank in halvings(largest):
            # At full rank the approximation is the table itself; rounding would only blur that.
            kept_directions = {b: None if rank == largest else d[:, :rank] for b, d in directions.items()}
            variants[kind, rank] = Variant(first, lambda _, kept=kept_directions: _everywhere(found, _truncated, kept))
    return variants


@contextlib.contextmanager
def _everywhere(found: dict[int, Any], change: Any, arguments: dict[int, Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for block, memory in found.items():
            stack.enter_context(change(memory, arguments[block]))
        yield


# -- k -----------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def _with_topk(config: Any, topk: int) -> Iterator[None]:
    original = config.memory_topk
    config.memory_topk = topk
    try:
        yield
    finally:
        config.memory_topk = original


# -- n -----------------------------------------------------------------------------------------------------------
def kept_keys(counts: SlotCounts, memory: Any, num_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns to keep, ascending, ``[M, n']`` each: those most read.

    Where heads share a bank they keep the same rows and columns, so that what is left is a bank of n'^2 slots.
    """
    grid = counts.reads.view(len(counts.reads), memory.config.memory_num_keys, -1)
    if memory.config.memory_variant != "full":
        grid = grid.sum(0, keepdim=True).expand_as(grid)
    rows, cols = (
        grid.sum(axis).sort(dim=-1, descending=True, stable=True).indices[:, :num_keys].sort(dim=-1).values
        for axis in (2, 1)
    )
    return rows, cols


@contextlib.contextmanager
def _with_keys(memory: Any, kept: tuple[torch.Tensor, torch.Tensor]) -> Iterator[None]:
    """Only these sub-keys can be chosen; what they choose has the numbers of the whole bank."""
    rows, cols = (index.to(memory.row_keys.device) for index in kept)
    num_keys, head = memory.config.memory_num_keys, torch.arange(len(rows), device=rows.device)[:, None]
    smaller = {"row_keys": memory.row_keys.detach()[head, rows], "col_keys": memory.col_keys.detach()[head, cols]}
    left = rows.shape[1]

    def among_kept(memory: Any, query_TMD: torch.Tensor) -> Selected:
        slots, weights = select(memory, query_TMD)
        heads = torch.arange(slots.shape[1], device=slots.device)[:, None]  # [M, 1], against [T, M, K]
        return rows[heads, slots // left] * num_keys + cols[heads, slots % left], weights

    with replaced(memory, **smaller), look_up_with(memory, select=among_kept):
        yield


# -- slots -------------------------------------------------------------------------------------------------------
def dropped_slots(counts: SlotCounts, memory: Any, share: float) -> torch.Tensor:
    """Bool ``[N]``, or ``[M, N]`` where heads have banks of their own: all but the most read ``share`` of the slots."""
    reads = counts.reads if memory.config.memory_variant == "full" else counts.reads.sum(0)
    flat = reads.flatten()
    order = flat.sort(descending=True, stable=True).indices
    dropped = torch.zeros_like(flat, dtype=torch.bool)
    dropped[order[max(1, round(share * len(flat))) :]] = True
    return dropped.view_as(reads)


@contextlib.contextmanager
def _without(memory: Any, dropped: torch.Tensor) -> Iterator[None]:
    """These slots are still found, and hold zeros."""
    values = memory.value_bank.detach()
    with replaced(memory, value_bank=values.masked_fill(dropped.to(values.device)[..., None], 0)):
        yield


# -- d_l ---------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def _truncated(memory: Any, directions: torch.Tensor | None) -> Iterator[None]:
    with replaced(memory, **({} if directions is None else truncate_table(memory, directions))):
        yield
