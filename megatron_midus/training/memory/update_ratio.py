"""How far a step moves the weights: the norm of the update over the norm of the weights, per parameter group."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import DistributedOptimizer, MegatronOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

SAMPLED = 1 << 16  # elements per tensor and rank that are compared; all of a smaller tensor
GROUPS = ("matrices", "norms-and-biases", "memory-values")


class UpdateRatio:
    """Compares the fp32 (master) weights before and after a step. Of large tensors an evenly spread sample stands for all."""

    def __init__(self, optimizer: MegatronOptimizer) -> None:
        self.optimizer = optimizer
        self._before: list[torch.Tensor] = []

    def before_step(self) -> None:
        self._before = [_sample(parameter).clone() for _, parameter, _ in self._counted()]

    def after_step(self) -> dict[str, float]:
        """Ratio of each group that has trained parameters. Collective over all ranks."""
        sums = torch.zeros(len(GROUPS), 2, dtype=torch.float64, device="cuda")
        for (group, parameter, copies), before in zip(self._counted(), self._before):
            after = _sample(parameter)
            factor = parameter.numel() / max(1, after.numel()) / copies
            squares = torch.stack([(after - before).double().square().sum(), before.double().square().sum()])
            sums[GROUPS.index(group)] += squares * factor
        self._before = []
        torch.distributed.all_reduce(sums)
        ratios = (sums[:, 0] / sums[:, 1].clamp(min=torch.finfo(torch.float64).tiny)).sqrt().tolist()
        # Values that are zero yet have no ratio.
        return {name: ratio for name, ratio, (_, weight) in zip(GROUPS, ratios, sums.tolist()) if weight > 0}

    def _counted(self) -> list[tuple[str, torch.Tensor, int]]:
        """``(group, this rank's part of a tensor, ranks that count the same part)``."""
        found = []
        for part in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            is_sharded = isinstance(part, DistributedOptimizer)
            copies = 1 if is_sharded else parallel_state.get_data_parallel_world_size(with_context_parallel=True)
            for group in part.param_groups:
                found += [(group_name(group), p, copies) for p in group["params"] if _is_counted_here(p)]
        return found


def group_name(group: dict[str, Any]) -> str:
    """What a parameter group holds."""
    if group.get("is_memory_values"):
        return "memory-values"
    return "matrices" if group["wd_mult"] else "norms-and-biases"


def _is_counted_here(parameter: torch.Tensor) -> bool:
    """Tied embeddings and what tensor parallelism does not split lie on several ranks, and count on one."""
    tensor = parallel_state.get_tensor_model_parallel_group()
    return param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter, tensor)


def _sample(parameter: torch.Tensor) -> torch.Tensor:
    # An odd stride visits every column of a matrix whose width is a power of two.
    stride = (parameter.numel() // SAMPLED) | 1
    return parameter.detach().view(-1)[::stride].float()
