"""The figures of a Memory block, from what was counted: see docs/telemetry.md for what they mean.

Shapes: M memory heads, n sub-keys per half, N = n * n slots.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from megatron_midus.memory import HeadWiseMemory
from megatron_midus.training.memory.counters import BlockCounts
from megatron_midus.training.memory.usage import MemoryUsage, relative

OVERLAP_COLUMNS = 1 << 16  # slots whose use by all heads is compared at a time
NORM_EDGES = [0.0, *(2.0**power for power in range(-24, 11))]
SHARE_EDGES = [i / 20 for i in range(21)]


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Counts between edges; what lies beyond the last edge is in the last bin."""

    edges: list[float]
    counts: list[int]
    total: float
    total_squares: float


@dataclasses.dataclass(frozen=True)
class BlockFigures:
    """What is told about one Memory block: names as in docs/telemetry.md."""

    layer_index: int
    scalars: dict[str, float]
    histograms: dict[str, Histogram]


@torch.no_grad()
def block_figures(
    memory: HeadWiseMemory, counts: BlockCounts, usage: MemoryUsage, *, dead_threshold: float
) -> BlockFigures:
    """The same on every rank of the block's stage. Collective over tensor parallelism."""
    marginals = counts.subkeys.double()
    dead_subkeys = usage.subkeys(memory.layer_index) < dead_threshold
    norms, mean_norm = _value_norms(memory)
    scalars = {
        **_slot_figures(memory, counts, usage, dead_threshold),
        "subkeys-dead": float(dead_subkeys.double().mean()),
        "row-entropy": float(_entropies(marginals[:, 0]).mean()),
        "column-entropy": float(_entropies(marginals[:, 1]).mean()),
        "top1-mass": float(counts.top1.mean()),
        "output-to-input-norm": counts.output_norm / counts.input_norm if counts.input_norm else 0.0,
        "value-row-norm": mean_norm,
        "lookups": float(counts.lookups),
    }
    if counts.balance_loss is not None:
        scalars["balance-loss"] = counts.balance_loss
    shares = relative(counts.subkeys, of_rows=True)
    edges = _usage_edges(counts.subkeys.shape[-1])
    histograms = {
        "row-usage": histogram(shares[:, 0], edges),
        "column-usage": histogram(shares[:, 1], edges),
        "top1-mass-of-heads": histogram(counts.top1, SHARE_EDGES),
        "value-row-norms": norms,
    }
    if counts.used is not None and len(counts.used) > 1:
        jaccard, lift = head_overlap(counts.used)
        scalars |= {"head-overlap": float(jaccard.mean()), "head-overlap-lift": float(lift.mean())}
        histograms["head-overlap-of-pairs"] = histogram(jaccard, SHARE_EDGES)
    return BlockFigures(memory.layer_index, scalars, histograms)


def _slot_figures(
    memory: HeadWiseMemory, counts: BlockCounts, usage: MemoryUsage, dead_threshold: float
) -> dict[str, float]:
    """Figures of the distribution of reads over slots; over those of all heads where each has a bank of its own."""
    reads = counts.slots.double()
    dead = (usage.slots(memory.layer_index) < dead_threshold).double().sum()
    sums = torch.stack([(reads > 0).double().sum(), torch.xlogy(reads, reads).sum(), dead])
    size = reads.numel()
    if reads.dim() == 2:
        torch.distributed.all_reduce(sums, group=memory.tp_group)
        size *= memory.tp_group.size()
    used, c_log_c, num_dead = sums.tolist()
    entropy = math.log(counts.lookups) - c_log_c / counts.lookups if counts.lookups else 0.0
    entropy = max(0.0, entropy)  # rounding
    return {
        "slots-used": used / size,
        "slots-dead": num_dead / size,
        "entropy": entropy,
        "kl-to-uniform": max(0.0, math.log(size) - entropy),
        # Fewer reads than slots cannot reach all of them, which says nothing about the memory.
        "effective-share": math.exp(entropy) / max(1, min(size, counts.lookups)),
    }


def _entropies(counts: torch.Tensor) -> torch.Tensor:
    """``[..., n]`` counts -> entropies in nats."""
    probability = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return -torch.xlogy(probability, probability).sum(-1)


def head_overlap(used_MN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every pair of heads, ``[M (M - 1) / 2]`` each.

    Returns:
        Slots that both read over slots that either read (Jaccard), and slots that both read over what two heads that
        read as many slots each, independently, would have in common.
    """
    heads, slots = used_MN.shape
    common = torch.zeros(heads, heads, dtype=torch.float64, device=used_MN.device)
    for part in used_MN.split(OVERLAP_COLUMNS, dim=1):
        part = part.float()
        common += (part @ part.T).double()  # whole numbers below 2**24: exact in fp32, TF32 has ones and zeros only
    first, second = torch.triu_indices(heads, heads, 1, device=used_MN.device)
    sizes = common.diagonal()
    both = common[first, second]
    either = sizes[first] + sizes[second] - both
    expected = sizes[first] * sizes[second] / slots
    return both / either.clamp(min=1), both / expected.clamp(min=torch.finfo(torch.float64).tiny)


def _value_norms(memory: HeadWiseMemory) -> tuple[Histogram, float]:
    """L2 norms of the rows of the value bank, and their mean."""
    norms = torch.linalg.vector_norm(memory.value_bank.detach(), dim=-1, dtype=torch.float32)
    if memory.value_placement == "latent":
        squares = norms.double().square()
        torch.distributed.all_reduce(squares, group=memory.tp_group)
        norms = squares.sqrt()
    found = histogram(norms.flatten(), NORM_EDGES)
    rows = norms.numel()
    if memory.memory.memory_variant == "full" and memory.tp_group.size() > 1:
        sums = torch.tensor([*found.counts, found.total, found.total_squares], dtype=torch.float64, device=norms.device)
        torch.distributed.all_reduce(sums, group=memory.tp_group)
        *counts, total, squares_total = sums.tolist()
        found = Histogram(NORM_EDGES, [int(count) for count in counts], total, squares_total)
        rows *= memory.tp_group.size()
    return found, found.total / rows


def _usage_edges(num_keys: int) -> list[float]:
    """Relative usage lies between 0 (never) and n (everything in one sub-key)."""
    return [0.0, *(2.0**power for power in range(-7, math.ceil(math.log2(max(2, num_keys))) + 1))]


def histogram(values: torch.Tensor, edges: list[float]) -> Histogram:
    """``edges[i] <= value < edges[i + 1]``, counted where the values lie."""
    values = values.flatten().double()
    inner = torch.tensor(edges[1:-1], dtype=torch.float64, device=values.device)
    bins = torch.bucketize(values, inner, right=True)
    counts = torch.zeros(len(edges) - 1, dtype=torch.int64, device=values.device)
    counts.index_add_(0, bins, torch.ones_like(bins))
    return Histogram(list(edges), counts.tolist(), float(values.sum()), float(values.square().sum()))
