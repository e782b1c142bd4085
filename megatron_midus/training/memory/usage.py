"""Moving averages of how much slots and sub-keys are used: what is dead, kept over checkpoints and changes of layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_midus.checkpoint.common_state import read_common_state
from megatron_midus.megatron_compat import load_checkpoint
from megatron_midus.memory import HeadWiseMemory
from megatron_midus.training.memory.counters import BlockCounts

STATE = "memory_usage"


class BlockUsage:
    """Moving averages of relative usage of one Memory block: 1 is an equal share.

    Kept in fp64 and made of whole numbers, so all ranks hold the same bits, at every layout.

    Attributes:
        slots: ``[N]``, or ``[M/p, N]`` where each head has a bank of its own.
        subkeys: ``[M, 2, n]``: rows and columns.
    """

    def __init__(self, memory: HeadWiseMemory) -> None:
        self.memory = memory
        n, heads, device = memory.memory.memory_num_keys, memory.num_memory_heads, memory.row_keys.device
        shape = (heads, n * n) if memory.memory.memory_variant == "full" else (n * n,)
        self.slots = torch.zeros(shape, dtype=torch.float64, device=device)
        self.subkeys = torch.zeros(heads * memory.tp_group.size(), 2, n, dtype=torch.float64, device=device)

    def update(self, counts: BlockCounts, decay: float) -> None:
        # Out of place: a checkpoint that is written in the background may still read the old ones.
        self.slots = decay * self.slots + (1 - decay) * relative(counts.slots, of_rows=counts.slots.dim() == 2)
        self.subkeys = decay * self.subkeys + (1 - decay) * relative(counts.subkeys, of_rows=True)

    def sharded_state(self) -> dict[str, ShardedTensor]:
        """As tensors of a checkpoint that any layout can read."""
        group, prefix = self.memory.tp_group, f"{STATE}.layers.{self.memory.layer_index}"
        replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        is_split = self.slots.dim() == 2
        return {
            "slots": ShardedTensor.from_rank_offsets(
                f"{prefix}.slots",
                self.slots,
                *([(0, group.rank(), group.size())] if is_split else []),
                replica_id=(0 if is_split else group.rank(), replica, 0),
            ),
            "subkeys": ShardedTensor.from_rank_offsets(
                f"{prefix}.subkeys", self.subkeys, replica_id=(group.rank(), replica, 0)
            ),
        }


class MemoryUsage:
    """The moving averages of this rank's Memory blocks.

    Attributes:
        reports: how many reports went into them.
    """

    def __init__(self, memories: list[HeadWiseMemory], decay: float) -> None:
        self.blocks = {memory.layer_index: BlockUsage(memory) for memory in memories}
        self.decay = decay
        self.reports = 0

    def correction(self) -> float:
        """What the averages are too small by, because they began at zero (Kingma and Ba 2015, section 3)."""
        return 1 - self.decay**self.reports

    def slots(self, layer_index: int) -> torch.Tensor:
        return self.blocks[layer_index].slots / self.correction()

    def subkeys(self, layer_index: int) -> torch.Tensor:
        return self.blocks[layer_index].subkeys / self.correction()

    def grant_share(self, layer_index: int, revived_M2N: torch.Tensor) -> None:
        """Counts revived sub-keys as used like all others, so that they have time before they can be dead again."""
        block = self.blocks[layer_index]
        block.subkeys = torch.where(revived_M2N, self.correction(), block.subkeys)

    # -- checkpoints ---------------------------------------------------------------------------------------------
    def state(self) -> dict[str, Any]:
        """For a checkpoint; empty before the first report."""
        if not self.reports:
            return {}
        return {STATE: {"reports": self.reports, **self._sharded()}}

    def _sharded(self) -> dict[str, Any]:
        return {str(index): block.sharded_state() for index, block in self.blocks.items()}

    def load(self, directory: Path) -> None:
        """Goes on from a checkpoint, where it has such averages. Collective."""
        common = read_common_state(directory)
        reports = common.get(STATE, {}).get("reports", 0)
        if not reports:
            return
        # A pipeline stage without Memory blocks asks for nothing and gets nothing, not even the key.
        loaded = load_checkpoint({STATE: self._sharded()}, directory).get(STATE, {})
        for index, block in self.blocks.items():
            block.slots, block.subkeys = loaded[str(index)]["slots"], loaded[str(index)]["subkeys"]
        self.reports = reports


def relative(counts: torch.Tensor, *, of_rows: bool) -> torch.Tensor:
    """Counts over their mean, the mean of all or of each row; fp64, 1 is an equal share."""
    mean = counts.double().mean(-1, keepdim=True) if of_rows else counts.double().mean()
    return counts.double() / mean.clamp(min=torch.finfo(torch.float64).tiny)
