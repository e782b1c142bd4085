"""The look-up of a memory in two steps, selecting slots and reading them, so that either can be watched or exchanged.

Nothing in the model's own file changes: a memory gets another ``look_up`` for as long as a context lasts. With the steps
below it computes what its own does, bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_midus.hf.lookup_midus import activate, no_autocast, pieces, read_values, select_slots

Selected = tuple[torch.Tensor, torch.Tensor]
"""Slots int64 and their weights, ``[T, M, K]`` each, best first."""
Select = Callable[[Any, torch.Tensor], Selected]
Read = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]


def select(memory: Any, query_TMD: torch.Tensor) -> Selected:
    slots, scores = select_slots(query_TMD, memory.row_keys, memory.col_keys, memory.config.memory_topk)
    return slots, activate(scores, memory.config.memory_score_activation)


def read(memory: Any, slots_TMK: torch.Tensor, weights_TMK: torch.Tensor) -> torch.Tensor:
    """What the slots hold, weighted and projected: ``[T, M, O]``, for ``block`` ``[T, 1, d]``."""
    found = read_values(slots_TMK, weights_TMK, memory.value_bank, memory.config.memory_variant)
    if memory.head_proj is not None:
        found = torch.einsum("tml,mlo->tmo", found.to(memory.head_proj.dtype), memory.head_proj)
    return found


@contextlib.contextmanager
def look_up_with(memory: Any, *, select: Select = select, read: Read = read) -> Iterator[None]:
    """The memory looks up with these steps. Contexts on one memory do not nest."""

    def look_up(query_TMD: torch.Tensor) -> torch.Tensor:
        with no_autocast(query_TMD.device.type):
            found = [read(memory, *select(memory, part)) for part in pieces(query_TMD, memory.row_keys.shape[1])]
        return torch.cat(found).to(query_TMD.dtype)

    memory.look_up = look_up
    try:
        yield
    finally:
        del memory.look_up
