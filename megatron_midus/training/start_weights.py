"""Decay towards the weights that a run began with (``--l2-to-start``), which hold a model near its base: L2-SP of Li et al. 2018
(arXiv 1802.01483), decoupled from the gradient as AdamW's decay is.

Before an optimizer makes a step, each weight ``w`` that learns becomes ``w - lr * coefficient * (w - start)``, with the learning rate of
its group. A checkpoint holds the start under the keys of the weights behind ``start.`` (``checkpoint.layout.START_PREFIX``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer

from megatron_midus.checkpoint.layout import START_PREFIX
from megatron_midus.megatron_compat import load_checkpoint
from megatron_midus.model.builder import unwrap
from megatron_midus.model.checkpoint import sharded_state_dict
from megatron_midus.training.masters import Master, find_master


class StartWeights:
    """A copy of the parameters that learn on this rank, in their dtype; replicas hold the same.

    Args:
        model_chunks: of this rank, in DDP, loaded and frozen where nothing learns.
        optimizer: of the same.
        coefficient: above 0.
    """

    def __init__(
        self, model_chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer, coefficient: float
    ) -> None:
        self.model_chunks = model_chunks
        self.coefficient = coefficient
        parameters = [{n: p for n, p in unwrap(chunk).named_parameters() if p.requires_grad} for chunk in model_chunks]
        self._starts = [{name: p.detach().clone() for name, p in chunk.items()} for chunk in parameters]
        self._pulls: dict[torch.optim.Optimizer, list[tuple[Master, torch.Tensor]]] = {}
        for chunk, starts in zip(parameters, self._starts):
            for name, parameter in chunk.items():
                master = find_master(optimizer, parameter)
                if master is not None:
                    self._pulls.setdefault(master.optimizer, []).append((master, starts[name]))
        for each in self._pulls:
            # Not called for a step that is skipped.
            each.register_step_pre_hook(self._pull)

    @torch.no_grad()
    def _pull(self, optimizer: Any, arguments: Any, keywords: Any) -> None:
        for master, start in self._pulls[optimizer]:
            weight, share = master.tensor.detach().view(-1), min(master.group["lr"] * self.coefficient, 1.0)
            weight.lerp_(start.view(-1)[master.begin : master.begin + weight.numel()].to(weight.dtype), share)

    def num_bytes(self) -> int:
        """On this rank."""
        return sum(start.numel() * start.element_size() for chunk in self._starts for start in chunk.values())

    # -- checkpoints ---------------------------------------------------------------------------------------------
    def state(self) -> dict[str, Any]:
        """For a checkpoint, of sharded tensors."""
        chunks = sharded_state_dict(self.model_chunks).values()
        return {
            "start_weights": {
                str(index): {name: _renamed(state[name], start) for name, start in starts.items()}
                for index, (state, starts) in enumerate(zip(chunks, self._starts))
            }
        }

    def load(self, directory: Path) -> None:
        """Goes on from the start in a checkpoint that was trained alike. Collective over all ranks."""
        loaded = load_checkpoint(self.state(), directory)["start_weights"]
        for index, starts in enumerate(self._starts):
            for name, start in starts.items():
                start.copy_(loaded[str(index)][name])


def _renamed(entry: Any, start: torch.Tensor) -> Any:
    """A sharded tensor, or a factory of several, that holds ``start`` under its key."""
    return dataclasses.replace(entry, key=START_PREFIX + entry.key, data=start)
