"""Counts what the look-ups of Memory blocks select, on each rank, and adds it up over the ranks.

Shapes: T tokens, M memory heads, p tensor-parallel ranks, K slots a head reads, n sub-keys per half, N = n * n slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_midus.memory import HeadWiseMemory
from megatron_midus.model.layer import MIDUSMemoryLayer

Observer = Callable[[torch.Tensor, torch.Tensor], None]


@dataclasses.dataclass
class BlockCounts:
    """What was counted in one Memory block, of all ranks together.

    Attributes:
        slots: reads of each slot, int64: ``[N]`` of all heads where they share a bank, else ``[M/p, N]`` of this rank's.
        subkeys: reads by row and by column, int64 ``[M, 2, n]``; each read counts in one row and one column.
        used: uint8 ``[M, N]``, whether a head read a slot; ``None`` where every head has a bank of its own.
        top1: mean over tokens of the largest weight, fp64 ``[M]``.
        lookups: reads in all, a token's and head's K each.
        output_norm, input_norm: root of the summed squares of what the block adds and of what it adds it to.
        balance_loss: mean of the auxiliary loss; ``None`` without one.
    """

    slots: torch.Tensor
    subkeys: torch.Tensor
    used: torch.Tensor | None
    top1: torch.Tensor
    lookups: int
    output_norm: float
    input_norm: float
    balance_loss: float | None


class BlockCounter:
    """Watches one Memory block between ``start`` and ``stop``; outside of that it leaves no trace in the model.

    Only passes that record gradients count: evaluation does not, and under activation recompute each micro-batch once.
    """

    def __init__(self, layer: MIDUSMemoryLayer) -> None:
        self.layer = layer
        memory = layer.self_attention.linear_proj
        assert isinstance(memory, HeadWiseMemory)
        self.memory = memory
        self.shares_bank = memory.memory.memory_variant != "full"
        self._hooks: list[Any] = []

    def start(self) -> None:
        """Begins to count at zero."""
        heads, n = self.memory.num_memory_heads, self.memory.memory.memory_num_keys
        device = self.memory.row_keys.device
        self._slots = torch.zeros((1 if self.shares_bank else heads) * n * n, dtype=torch.int64, device=device)
        self._used = torch.zeros(heads * n * n, dtype=torch.uint8, device=device) if self.shares_bank else None
        self._subkeys = torch.zeros(heads * 2 * n, dtype=torch.int64, device=device)
        # Sums of the largest weights per head, squares of output and input, balance loss, passes with one.
        self._sums = torch.zeros(heads + 4, dtype=torch.float64, device=device)
        self._tokens = 0
        watch(self.memory, self._observe)
        self._hooks = [
            self.layer.register_forward_pre_hook(self._see_input, with_kwargs=True),
            self.memory.register_forward_hook(self._see_output),
        ]
        self._take_balance_loss()

    def stop(self) -> BlockCounts:
        """Ends counting, and adds up over all ranks. Collective over tensor, data and context parallelism."""
        self._sums[-2:] += self._take_balance_loss()
        unwatch(self.memory, self._observe)
        for hook in self._hooks:
            hook.remove()
        counts = self._reduce()
        del self._slots, self._used, self._subkeys, self._sums  # tens of megabytes at n=512
        return counts

    # -- watching ------------------------------------------------------------------------------------------------
    def _observe(self, indices_THK: torch.Tensor, weights_THK: torch.Tensor) -> None:
        heads, n = indices_THK.shape[1], self.memory.memory.memory_num_keys
        slot_of_head = slots_of_heads(indices_THK, n * n)
        head = torch.arange(heads, dtype=indices_THK.dtype, device=indices_THK.device)[:, None]
        row = indices_THK // n
        if self._used is None:
            count(self._slots, slot_of_head)
        else:
            count(self._slots, indices_THK.flatten())
            self._used[slot_of_head] = 1
        first = head * (2 * n)
        count(self._subkeys, (row + first).flatten())
        count(self._subkeys, (indices_THK - row * n + (first + n)).flatten())
        self._sums[:heads] += weights_THK.amax(-1).sum(0, dtype=torch.float64)
        self._tokens += len(indices_THK)

    def _see_input(self, layer: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            self._sums[-3] += _squares(args[0] if args else kwargs["hidden_states"])

    def _see_output(self, memory: torch.nn.Module, args: tuple, output: tuple) -> None:
        if torch.is_grad_enabled():
            self._sums[-4] += _squares(output[0])

    def _take_balance_loss(self) -> torch.Tensor:
        """``[sum, passes]`` since it was taken last."""
        balance, found = self.memory.balance_loss, self._sums.new_zeros(2)
        if balance is not None and balance.total is not None:
            found[0], found[1] = balance.total, balance.passes
            balance.total, balance.passes = None, 0
        return found

    # -- adding up -----------------------------------------------------------------------------------------------
    def _reduce(self) -> BlockCounts:
        heads, n = self.memory.num_memory_heads, self.memory.memory.memory_num_keys
        over_data = parallel_state.get_data_parallel_group(with_context_parallel=True)
        tensor = self.memory.tp_group
        tokens = self._slots.new_tensor([self._tokens])
        counted = torch.cat([self._slots, self._subkeys, tokens])
        torch.distributed.all_reduce(counted, group=over_data)
        torch.distributed.all_reduce(self._sums, group=over_data)
        if self._used is not None:
            torch.distributed.all_reduce(self._used, op=torch.distributed.ReduceOp.MAX, group=over_data)
        slots, subkeys, tokens = counted.split([self._slots.numel(), self._subkeys.numel(), 1])
        total_tokens = int(tokens)
        if self.shares_bank:
            slots = slots.clone()
            torch.distributed.all_reduce(slots, group=tensor)
        top1, sums = self._sums[:heads], self._sums[heads:].clone()
        if not self.memory.config.sequence_parallel:
            sums[:2] /= tensor.size()  # without sequence parallelism each rank saw all tokens of the residual stream
        sums[3] /= tensor.size()
        torch.distributed.all_reduce(sums, group=tensor)
        output_square, input_square, balance, passes = sums.tolist()
        return BlockCounts(
            slots=slots if self.shares_bank else slots.view(heads, -1),
            subkeys=gather_heads(subkeys.view(heads, 2, n), tensor),
            used=None if self._used is None else gather_heads(self._used.view(heads, -1), tensor),
            top1=gather_heads(top1, tensor) / max(1, total_tokens),
            lookups=total_tokens * heads * tensor.size() * self.memory.memory.memory_topk,
            output_norm=output_square**0.5,
            input_norm=input_square**0.5,
            balance_loss=balance / passes if passes else None,
        )


def memory_layers(model_chunks: Any) -> list[MIDUSMemoryLayer]:
    """The Memory blocks on this rank, in the order of the model."""
    found = [m for chunk in model_chunks for m in chunk.modules() if isinstance(m, MIDUSMemoryLayer)]
    return sorted(found, key=lambda layer: layer.self_attention.linear_proj.layer_index)


def gather_heads(part: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    """``[M/p, ...]`` of each rank -> ``[M, ...]``."""
    if group.size() == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(group.size())]
    torch.distributed.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts)


def memories(model_chunks: Any) -> list[HeadWiseMemory]:
    """The memories on this rank, in the order of the model."""
    found = [m for chunk in model_chunks for m in chunk.modules() if isinstance(m, HeadWiseMemory)]
    return sorted(found, key=lambda memory: memory.layer_index)


class _Observers:
    """Shows one look-up to several."""

    def __init__(self) -> None:
        self.all: list[Observer] = []

    def __call__(self, indices: torch.Tensor, weights: torch.Tensor) -> None:
        for observer in self.all:
            observer(indices, weights)


def watch(memory: HeadWiseMemory, observer: Observer) -> None:
    """Shows the look-ups to ``observer`` as well."""
    if not isinstance(memory.observer, _Observers):
        assert memory.observer is None
        memory.observer = _Observers()
    memory.observer.all.append(observer)


def unwatch(memory: HeadWiseMemory, observer: Observer) -> None:
    """The reverse of ``watch``."""
    assert isinstance(memory.observer, _Observers)
    memory.observer.all.remove(observer)
    if not memory.observer.all:
        memory.observer = None


def slots_of_heads(indices_THK: torch.Tensor, num_slots: int) -> torch.Tensor:
    """``[T * M * K]``: where each read lies in the banks of all heads one after the other."""
    heads = indices_THK.shape[1]
    # int64 only where the slots of all heads are more than int32 reaches
    wide = indices_THK if heads * num_slots < 2**31 else indices_THK.long()
    return (wide + torch.arange(heads, dtype=wide.dtype, device=wide.device)[:, None] * num_slots).flatten()


def count(counts: torch.Tensor, entries: torch.Tensor) -> None:
    """Adds one to each of ``entries`` in place, as often as it occurs."""
    counts.index_add_(0, entries, counts.new_ones(()).expand(entries.numel()))


def _squares(tensor: torch.Tensor) -> torch.Tensor:
    # The norm converts element by element; squaring first would hold a copy in fp32.
    return torch.linalg.vector_norm(tensor.detach(), dtype=torch.float32).double().square()
