"""BackgroundConfig: what midus background counts, and at which layout."""

from __future__ import annotations

import dataclasses

from megatron_midus.config.data import DataConfig
from megatron_midus.config.fields import part
from megatron_midus.config.parallel import ParallelConfig
from megatron_midus.errors import UserError


@dataclasses.dataclass(frozen=True)
class BackgroundConfig:
    """Background of the slots

    Counts which memory slots text of the old domain reads, and keeps the counts in the checkpoint: training with
    --memory-update-slots spares those slots. One process, or several: torchrun -m megatron_midus background.
    """

    load: str
    """Checkpoint directory, of midus upscale or of a training run. The counts are written into its iter_* directory and
    travel with the run from there."""

    ckpt_step: int | None = None
    """Iteration to count with; the latest when absent."""

    num_batches: int = 100
    """Background batches B. A slot's count is how many of them read it."""

    global_batch_size: int | None = None
    """Sequences of a batch; take that of the training to come. micro-batch-size * data-parallel size when absent."""

    micro_batch_size: int = 1
    """Sequences per forward pass of one model replica."""

    bf16: bool = False
    """Compute in bfloat16."""

    seed: int = 1234
    """Seed of the order of the samples."""

    data: DataConfig = part(DataConfig)
    parallel: ParallelConfig = part(ParallelConfig)

    def __post_init__(self) -> None:
        for name in ("num_batches", "micro_batch_size", "global_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1")
        if not self.data.has_data:
            raise UserError("no text of the old domain was given; give --data-path or --train-data-path")
