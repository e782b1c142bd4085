"""What the head-specific projections add while the retrieved slots and weights are held fixed, and how rich they are.

Every memory reads the slots of the model's own pass with the weights of that pass, and only what a head makes of them is
exchanged: its projection ``W[h]`` (variant ``hive``) or its table ``V[h]`` (``full``) by one that all heads share. What
is fitted is fitted on every other window of the text and measured on those between.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from megatron_midus.analysis.algebra import (
    Rank,
    flat_projection,
    noise_rank_of,
    rank_of,
    shared_projection,
    singular_values,
    table_directions,
    table_rows,
)
from megatron_midus.analysis.lookup import Read, read
from megatron_midus.analysis.passes import (
    Progress,
    Variant,
    fixed_retrieval,
    measure,
    memories,
    own_passes,
    replaced,
)
from megatron_midus.analysis.usage import SlotCounts, empty_counts
from megatron_midus.analysis.windows import Estimate, Windows, loss_change
from megatron_midus.hf.lookup_midus import read_values

SHARINGS = {
    "shared": "one for all heads, the best by least squares",
    "mean": "the mean over heads for all",
    "swapped": "each head takes its neighbour's",
    "off": "the block writes nothing",
}


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One way to exchange what the heads have of their own.

    Attributes:
        rise: of the loss, nats per token, the block's retrieval fixed.
        error: ``||m' - m||^2 / ||m||^2`` over tokens and heads, m what the heads read (before gate and mixer); ``None``
            when m is zero.
    """

    rise: Estimate
    error: float | None


@dataclasses.dataclass(frozen=True)
class BlockStructure:
    """Ranks of one block's parameters.

    Attributes:
        projections: of each head's ``W[h]`` (``hive``) or table ``V[h]`` (``full``); empty for ``block``.
        stacked: of the projections side by side, ``[L, M * O]``; ``None`` without projections.
        values: of the rows of the value bank that the text read, for ``full`` of the heads' tables side by side.
        table: of the block's whole table: what each slot holds for all heads side by side.
    """

    projections: list[Rank]
    stacked: Rank | None
    values: Rank
    table: Rank


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """The structural analysis.

    Attributes:
        exchanges: by Memory block and kind of ``SHARINGS``; only ``off`` where heads have nothing of their own.
        all_blocks: the same in all Memory blocks at once.
        structures: by Memory block.
        reason: why nothing can be exchanged, in words; ``None`` when it can.
    """

    exchanges: dict[int, dict[str, Exchange]]
    all_blocks: dict[str, Exchange]
    structures: dict[int, BlockStructure]
    reason: str | None


def reason_against(config: Any) -> str | None:
    """Why heads have nothing of their own that could be exchanged; ``None`` when they have."""
    if config.memory_variant == "block":
        return (
            "variant block has no head-specific projections: its heads read one bank and their outputs are summed, so "
            "there is nothing to share"
        )
    if config.num_lookup_heads() < 2:
        return "the memory has a single head, so its projection is shared by all heads already"
    return None


def measure_retrieval(model: Any, windows: Windows, *, batch_size: int, progress: Progress | None = None) -> Retrieval:
    """Fits on every other window, measures on those between; raises ``ValueError`` with fewer than four."""
    first, second = windows.halves()
    reason = reason_against(model.config)
    counts, grams = _fit(model, first, batch_size=batch_size, progress=progress)
    kinds = ["off"] if reason else list(SHARINGS)
    parameters: dict[tuple[int, str], Mapping[str, torch.Tensor]] = {
        (block, kind): exchanged(memory, kind, counts[block], grams.get(block))
        for block, memory in memories(model).items()
        for kind in kinds
        if kind != "off"
    }
    errors = {(block, kind): _Error() for block, kind in parameters}
    variants = _variants(model, kinds, parameters, errors)
    own, changed = measure(model, second, variants, batch_size=batch_size, progress=progress)
    rises = {key: loss_change(nats, own, second.inputs.shape[1]) for key, nats in changed.items()}

    def exchange(block: int | None, kind: str) -> Exchange:
        if kind == "off":
            return Exchange(rises[block, kind], 1.0)
        parts = [error for (i, k), error in errors.items() if k == kind and block in (i, None)]
        return Exchange(rises[block, kind], _Error.ratio(parts))

    return Retrieval(
        exchanges={block: {kind: exchange(block, kind) for kind in kinds} for block in memories(model)},
        all_blocks={kind: exchange(None, kind) for kind in kinds},
        structures={block: structure_of(m, counts[block]) for block, m in memories(model).items()},
        reason=reason,
    )


def num_retrieval_passes(model: Any) -> float:
    """Passes over the whole text that ``measure_retrieval`` makes."""
    kinds = 1 if reason_against(model.config) else len(SHARINGS)
    return (2 + kinds * (len(memories(model)) + 1)) / 2


# -- fitting -----------------------------------------------------------------------------------------------------
def _fit(
    model: Any, windows: Windows, *, batch_size: int, progress: Progress | None
) -> tuple[dict[int, SlotCounts], dict[int, torch.Tensor]]:
    """Slot counts, and with ``hive`` ``sum_t z z^T`` of each head ``[M, L, L]``, by block."""
    counts, grams = empty_counts(model), {}
    for done in own_passes(model, windows, batch_size=batch_size, progress=progress):
        for block, memory in memories(model).items():
            slots, weights = done.slots_and_weights(block)
            counts[block].add(slots, weights)
            if memory.head_proj is not None:
                latent = read_values(slots, weights, memory.value_bank.detach(), "hive").double().cpu()  # [T, M, L]
                part = torch.einsum("tml,tmk->mlk", latent, latent)
                grams[block] = grams.get(block, 0) + part
    return counts, grams


def exchanged(memory: Any, kind: str, counts: SlotCounts, latent_grams: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Parameters of the memory in which what each head has of its own is exchanged as ``SHARINGS`` says."""
    name = "value_bank" if memory.head_proj is None else "head_proj"
    own = getattr(memory, name).detach()
    if kind == "swapped":
        return {name: own.roll(1, 0)}
    if kind == "mean":
        shared = own.double().cpu().mean(0)
    elif latent_grams is not None:
        shared = shared_projection(latent_grams, own.cpu())
    else:
        shared = _shared_table(own, counts)
    return {name: shared.to(own.dtype).expand_as(own)}


def _shared_table(values: torch.Tensor, counts: SlotCounts) -> torch.Tensor:
    """Variant ``full``: every slot's mean over heads, weighted by how much each head reads it; plain where none does."""
    mass = counts.mass / counts.mass.sum(0).clamp(min=1e-300)  # [M, N]
    mass[:, counts.mass.sum(0) == 0] = 1 / len(mass)
    shared = torch.zeros(values.shape[1:], dtype=torch.float64)
    for share, table in zip(mass, values):
        shared += share[:, None] * table.double().cpu()
    return shared


# -- measuring ---------------------------------------------------------------------------------------------------
class _Error:
    """Sums of squares of what the heads read and of how an exchange changes it."""

    def __init__(self) -> None:
        self.own, self.difference = 0.0, 0.0

    def add(self, own: torch.Tensor, changed: torch.Tensor) -> None:
        self.own += own.double().square().sum().item()
        self.difference += (changed.double() - own.double()).square().sum().item()

    @staticmethod
    def ratio(parts: list[_Error]) -> float | None:
        own = sum(part.own for part in parts)
        return sum(part.difference for part in parts) / own if own else None


def _variants(
    model: Any,
    kinds: list[str],
    parameters: Mapping[tuple[int, str], Mapping[str, torch.Tensor]],
    errors: Mapping[tuple[int, str], _Error],
) -> dict[Any, Variant]:
    """One block at a time, key ``(block, kind)``, and all at once, key ``(None, kind)``."""
    found = memories(model)

    def variant(blocks: list[int], kind: str, count_error: bool) -> Variant:
        reads: dict[int, Read] = {}
        for block in blocks:
            error = errors[block, kind] if count_error and kind != "off" else None
            reads[block] = _silent if kind == "off" else _reading_with(parameters[block, kind], error)
        return Variant(min(blocks), lambda done: fixed_retrieval(model, done, reads))

    found = list(memories(model))
    variants: dict[Any, Variant] = {(b, kind): variant([b], kind, True) for b in found for kind in kinds}
    return {**variants, **{(None, kind): variant(found, kind, False) for kind in kinds}}


def _silent(memory: Any, slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(read(memory, slots, weights))


def _reading_with(parameters: Mapping[str, torch.Tensor], error: _Error | None) -> Read:
    """Reads with other parameters; ``error`` collects by how much that differs."""

    def exchanged_read(memory: Any, slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        with replaced(memory, **parameters):
            changed = read(memory, slots, weights)
        if error is not None:
            error.add(read(memory, slots, weights), changed)
        return changed

    return exchanged_read


# -- ranks -------------------------------------------------------------------------------------------------------
def structure_of(memory: Any, counts: SlotCounts) -> BlockStructure:
    """Ranks of the memory's parameters; ``counts`` say which rows are used."""
    _, directions = table_directions(memory)
    used = counts.reads.sum(0) > 0
    values = table_rows(memory)[used.to(memory.value_bank.device)]
    if memory.head_proj is not None:
        parts = list(memory.head_proj.detach().double().cpu())
        flat = flat_projection(memory)
        stacked = noise_rank_of(torch.linalg.svdvals(flat), (flat.shape[0], flat.shape[1]))
    else:
        parts = list(memory.value_bank.detach()) if memory.config.memory_variant == "full" else []
        stacked = None
    return BlockStructure(
        projections=[noise_rank_of(_singular_values(part), (part.shape[0], part.shape[1])) for part in parts],
        stacked=stacked,
        values=noise_rank_of(singular_values(values), (values.shape[0], values.shape[1])),
        table=rank_of(directions, (memory.value_bank.shape[-2], len(directions))),
    )


def _singular_values(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(matrix.double().cpu()) if len(matrix) <= 4096 else singular_values(matrix)
