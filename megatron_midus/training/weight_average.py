"""An exponential moving average of the weights that learn (``--ema-decay``), in fp32 beside the model.

Update number ``t = 1, 2, …`` makes it ``a + (1 - d) * (w - a)`` with ``d = min(decay, t / (t + 9))``. It begins as the weights that the run
begins with, and by this warm-up forgets them: after ten updates their share is 1e-5. Checkpoints hold it under ``ema.{key}``; with adapters
the merged weights made of averaged adapters lie there too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer

from megatron_midus.checkpoint.layout import AVERAGE_PREFIX
from megatron_midus.training.weight_copies import WeightCopies


class WeightAverage(WeightCopies):
    """Of the parameters that learn on this rank.

    Args:
        model_chunks, optimizer: as of ``WeightCopies``.
        decay: share of the old average that stays in an update, from the end of the warm-up on.
    """

    def __init__(
        self, model_chunks: Sequence[torch.nn.Module], decay: float, optimizer: MegatronOptimizer | None
    ) -> None:
        super().__init__(model_chunks, optimizer, AVERAGE_PREFIX)
        self.decay = decay
        self.updates = 0

    def restart(self) -> None:
        super().restart()
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights of a step of the optimizer, which need not have been gathered yet."""
        self.updates += 1
        decay = min(self.decay, self.updates / (self.updates + 9))
        for part in self.parts():
            part.copy.lerp_(part.source.float(), 1 - decay)

    def state(self) -> dict[str, Any]:
        """For a checkpoint, of sharded tensors. The weights must be whole. Collective over data parallelism."""
        return {"weight_average": self.sharded(with_merged=True)}

    def load(self, directory: Path, updates: int) -> None:
        """Goes on from the average of a checkpoint that was trained alike. Collective over all ranks.

        Args:
            updates: that the stored average has seen.
        """
        self.load_copies(directory)
        self.updates = updates
