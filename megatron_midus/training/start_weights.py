"""Decay towards the weights that a run began with (``--l2-to-start``), which hold a model near its base: L2-SP of Li et al. 2018
(arXiv 1802.01483), decoupled from the gradient as AdamW's decay is.

Before an optimizer makes a step, each weight ``w`` that learns becomes ``w - lr * coefficient * (w - start)``, with the learning rate of
its group. Checkpoints hold the start under ``start.{key}``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer

from megatron_midus.checkpoint.layout import START_PREFIX
from megatron_midus.training.weight_copies import WeightCopies


class StartWeights(WeightCopies):
    """The start, and what pulls the weights back to it.

    Args:
        model_chunks, optimizer: as of ``WeightCopies``.
        coefficient: above 0.
    """

    def __init__(
        self, model_chunks: Sequence[torch.nn.Module], coefficient: float, optimizer: MegatronOptimizer
    ) -> None:
        super().__init__(model_chunks, optimizer, START_PREFIX)
        self.coefficient = coefficient
        for each in {part.master.optimizer for part in self.parts() if part.master is not None}:
            # Not called for a step that is skipped.
            each.register_step_pre_hook(self._pull)

    @torch.no_grad()
    def _pull(self, optimizer: torch.optim.Optimizer, arguments: Any, keywords: Any) -> None:
        for part in self.parts():
            if part.master is not None and part.master.optimizer is optimizer:
                part.source.lerp_(part.copy, min(part.master.group["lr"] * self.coefficient, 1.0))

    def state(self) -> dict[str, Any]:
        """For a checkpoint, of sharded tensors. The weights must be whole. Collective over data parallelism."""
        return {"start_weights": self.sharded(with_merged=False)}
