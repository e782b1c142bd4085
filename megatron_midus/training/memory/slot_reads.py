"""Counts the reads of every slot, and adds them up over the ranks: all that sparse updates and the background need.

Shapes: B Memory blocks of this rank, T tokens, M memory heads, p tensor-parallel ranks, K slots a head reads, N slots of a
bank, R = N where the heads of a block share a bank, else M/p * N.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core import parallel_state

from megatron_midus.memory import HeadWiseMemory
from megatron_midus.training.memory.counters import Observer, count, slots_of_heads, watch


def bank_shape(memory: HeadWiseMemory) -> tuple[int, ...]:
    """``[N]`` of a bank that the heads share, ``[M/p, N]`` of this rank's banks where every head has its own."""
    slots = memory.memory.memory_num_keys**2
    return (memory.num_memory_heads, slots) if memory.memory.memory_variant == "full" else (slots,)


class SlotReads:
    """Counts from the moment it is made, in every pass that records gradients: with activation recompute once a micro-batch.

    Args:
        memories: of this rank, all of one shape.
    """

    def __init__(self, memories: Sequence[HeadWiseMemory]) -> None:
        self.memories = list(memories)
        if not self.memories:
            return
        shape = (len(self.memories), *bank_shape(self.memories[0]))
        self._reads = torch.zeros(shape, dtype=torch.int64, device=self.memories[0].row_keys.device)
        for memory, reads in zip(self.memories, self._reads):
            watch(memory, _counter(reads))

    def clear(self) -> None:
        """Begins again at zero."""
        if self.memories:
            self._reads.zero_()

    def take(self) -> list[torch.Tensor]:
        """Reads since the last ``clear`` of all ranks together, int64 ``[N]`` or ``[M/p, N]`` per memory. Collective over
        data and context parallelism, and over tensor parallelism where its ranks share a bank."""
        if not self.memories:
            return []
        total = self._reads.clone()
        torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        if total.dim() == 2:
            torch.distributed.all_reduce(total, group=self.memories[0].tp_group)
        return list(total)


def _counter(reads: torch.Tensor) -> Observer:
    num_slots, flat = reads.shape[-1], reads.view(-1)
    shares_bank = reads.dim() == 1

    def observe(indices_THK: torch.Tensor, weights_THK: torch.Tensor) -> None:
        count(flat, indices_THK.flatten() if shares_bank else slots_of_heads(indices_THK, num_slots))

    return observe
