"""How the values of Memory blocks are updated where that is not as the rest: some slots a step, or by an optimizer of their
own (Lin et al. 2025, arXiv 2510.15103; Goyal et al. 2026, arXiv 2604.05248).

Shapes: N slots of a value bank, M/p memory heads of this rank, R rows: N where the heads of a block share a bank, else
M/p * N.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from megatron.core.optimizer import MegatronOptimizer

from megatron_midus.checkpoint.background import (
    BackgroundHeader,
    SlotBackground,
    read_background,
    read_header,
)
from megatron_midus.config.optimizer import OptimizationConfig
from megatron_midus.memory import HeadWiseMemory
from megatron_midus.training.masters import find_master
from megatron_midus.training.memory.counters import memories
from megatron_midus.training.memory.row_step import RowStep, elements_of_rows, restricted
from megatron_midus.training.memory.selection import highest_slots, slot_scores
from megatron_midus.training.memory.slot_reads import SlotReads, bank_shape


class ValueUpdates:
    """Told of every step by ``train_step``.

    Args:
        settings: ``value_optimizer``, ``memory_update_slots`` and ``memory_update_score``.
        model_chunks: of this rank, in DDP.
        optimizer: of the same.
        background: file of midus background; needed for ``memory_update_slots`` alone.

    Raises:
        UserError: a background of other Memory blocks.
    """

    def __init__(
        self,
        settings: OptimizationConfig,
        model_chunks: Sequence[torch.nn.Module],
        optimizer: MegatronOptimizer,
        background: Path | None,
    ) -> None:
        self.settings = settings
        self.optimizer = optimizer
        self.memories = [memory for memory in memories(model_chunks) if memory.value_bank.requires_grad]
        self.header: BackgroundHeader | None = None
        self._reads: SlotReads | None = None
        if settings.memory_update_slots:
            assert background is not None
            self.header = read_header(background)
            self._background = [read_block(background, memory) for memory in self.memories]
            self._reads = SlotReads(self.memories)

    def begin(self) -> None:
        """Before the forward and backward passes of a step, and before they are computed again."""
        if self._reads is not None:
            self._reads.clear()

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Around the optimizer's step, once the gradients are those of the global batch. Collective.

        Gradients of slots that are left out become zero first: they count in no norm, and clipping sees the others alone.
        """
        chosen = self._choose()
        steps = []
        for memory, rows in zip(self.memories, chosen):
            bank = memory.value_bank
            width = bank.shape[-1]
            if rows is not None:
                bank.main_grad.view(-1, width).masked_fill_(~rows[:, None], 0)
            master = find_master(self.optimizer, bank)
            if master is not None:
                elements = None if rows is None else elements_of_rows(rows, width, master)
                steps.append(RowStep(master, elements, by_sgd=self.settings.value_optimizer == "sgd"))
        with restricted(steps):
            yield

    def _choose(self) -> list[torch.Tensor | None]:
        """Per memory the slots to update, bool ``[R]``; ``None`` = all."""
        if self._reads is None:
            return [None] * len(self.memories)
        assert self.header is not None
        found: list[torch.Tensor | None] = []
        for reads, background in zip(self._reads.take(), self._background):
            scores = slot_scores(self.settings.memory_update_score, reads, background, self.header.num_batches)
            found.append(highest_slots(scores, reads, self.settings.memory_update_slots).flatten())
        return found

    def describe(self) -> str:
        """One line for the log."""
        settings, said = self.settings, []
        if self.header is not None:
            said.append(
                f"{settings.memory_update_slots} slots of a bank a step, by {settings.memory_update_score} against "
                f"{self.header.num_batches} background batches of {self.header.batch_size} samples, counted at iteration "
                f"{self.header.iteration}"
            )
        if settings.value_optimizer is not None:
            said.append(f"by {settings.value_optimizer}")
        return f"memory values: {', '.join(said)}"


def read_block(path: Path, memory: HeadWiseMemory) -> SlotBackground:
    """What this rank needs of the background of a block, on its device."""
    first, heads = memory.tp_group.rank() * memory.num_memory_heads, memory.num_memory_heads
    shape = bank_shape(memory)
    own = slice(first, first + heads) if len(shape) == 2 else None
    found, device = read_background(path, memory.layer_index, shape, own), memory.row_keys.device
    return SlotBackground(found.batches.to(device), found.reads.to(device))
