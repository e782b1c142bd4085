"""Revival of dead sub-keys: each is put beside a used one of its head, in the weights and wherever the optimizer keeps them.

Shapes: M memory heads, p tensor-parallel ranks, n sub-keys per half, C channels of a sub-key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from megatron.core.optimizer import MegatronOptimizer

from megatron_midus.memory import HeadWiseMemory
from megatron_midus.training.masters import find_master
from megatron_midus.training.memory.usage import MemoryUsage

NOISE = 0.1  # of the root mean square of the sub-key that a revived one is put beside
HALVES = ("row_keys", "col_keys")


@torch.no_grad()
def revive_dead_subkeys(
    memories: Sequence[HeadWiseMemory],
    usage: MemoryUsage,
    optimizer: MegatronOptimizer,
    *,
    dead_threshold: float,
    seed: int,
    iteration: int,
) -> dict[int, int]:
    """Moves every dead sub-key beside a used one of its head and half, drawn by usage, and zeroes its moments.

    What it becomes depends on the weights, the usage, ``seed``, ``iteration``, the block and the head alone, so
    data-parallel ranks agree without a word and the tensor-parallel split does not matter. Weights must be whole on
    every rank (no gathering of parameters under way).

    Returns:
        How many sub-keys of all heads moved, by the block's layer index.
    """
    moved = {}
    for memory in memories:
        relative_usage = usage.subkeys(memory.layer_index)  # [M, 2, n]
        dead = relative_usage < dead_threshold
        moved[memory.layer_index] = int(dead.sum())
        if not moved[memory.layer_index]:
            continue
        first = memory.tp_group.rank() * memory.num_memory_heads
        own = slice(first, first + memory.num_memory_heads)
        for half, name in enumerate(HALVES):
            keys = getattr(memory, name)
            label = f"{seed}/{iteration}/{memory.layer_index}/{name}"
            reseeded = reseed_keys(keys, dead[own, half], relative_usage[own, half], label=label, first_head=first)
            write_keys(optimizer, keys, dead[own, half], reseeded)
        usage.grant_share(memory.layer_index, dead)
    return moved


def reseed_keys(
    keys_MNC: torch.Tensor, dead_MN: torch.Tensor, usage_MN: torch.Tensor, *, label: str, first_head: int
) -> torch.Tensor:
    """The sub-keys with the dead ones replaced, in fp32, ``[M/p, n, C]``.

    Args:
        label: part of the seed.
        first_head: position of the first head among all heads, part of the seed as well.
    """
    reseeded = keys_MNC.detach().float()
    reseeded = reseeded.clone() if reseeded.data_ptr() == keys_MNC.data_ptr() else reseeded
    for head in dead_MN.any(1).nonzero().flatten().tolist():
        # On the CPU: generators of devices differ from each other.
        dead, weights = dead_MN[head].cpu(), usage_MN[head].cpu()
        generator = _generator(f"{label}/{first_head + head}")
        donors = torch.multinomial(weights.masked_fill(dead, 0), int(dead.sum()), replacement=True, generator=generator)
        beside = reseeded[head].cpu()[donors]  # [dead, C]
        noise = torch.randn(beside.shape, generator=generator)
        beside += NOISE * beside.square().mean(-1, keepdim=True).sqrt() * noise
        reseeded[head, dead_MN[head]] = beside.to(reseeded.device)
    return reseeded


def write_keys(
    optimizer: MegatronOptimizer, keys: torch.nn.Parameter, dead_MN: torch.Tensor, reseeded_MNC: torch.Tensor
) -> None:
    """Puts the dead rows of ``reseeded_MNC`` into weights and master weights, and zeroes their moments."""
    rows = dead_MN[..., None].expand_as(reseeded_MNC).flatten()
    found = find_master(optimizer, keys)
    if found is not None:
        master = found.tensor
        part = slice(found.begin, found.begin + master.numel())
        for tensor in found.state.values():
            if isinstance(tensor, torch.Tensor) and tensor.shape == master.shape:
                tensor.view(-1)[rows[part]] = 0
        master.data.view(-1)[rows[part]] = reseeded_MNC.flatten()[part][rows[part]].to(master.dtype)
    keys.data.view(-1)[rows] = reseeded_MNC.flatten()[rows].to(keys.dtype)


def _generator(label: str) -> torch.Generator:
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(label.encode()).digest()[:7], "little"))
