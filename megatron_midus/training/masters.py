"""What an optimizer updates in place of a parameter: where its master weights and their state lie on this rank."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from megatron.core.optimizer import DistributedOptimizer, MegatronOptimizer


@dataclasses.dataclass(frozen=True)
class Master:
    """The part of a parameter that an optimizer on this rank updates.

    Attributes:
        optimizer: torch's, or one with its interface.
        group: its parameter group.
        position: in the group.
        begin: where in the flattened parameter the part begins.
    """

    optimizer: torch.optim.Optimizer
    group: dict[str, Any]
    position: int
    begin: int = 0

    @property
    def tensor(self) -> torch.Tensor:
        """fp32; flat where it is a part, else of the parameter's shape."""
        return self.group["params"][self.position]

    @property
    def state(self) -> dict[str, Any]:
        """Moments and the like; empty before the first step."""
        return self.optimizer.state[self.tensor]


def find_master(optimizer: MegatronOptimizer, parameter: torch.nn.Parameter) -> Master | None:
    """``None`` where a distributed optimizer keeps all of the parameter on other ranks."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    for part in parts:
        if isinstance(part, DistributedOptimizer):
            if parameter not in part.model_param_group_index_map:
                continue
            assert not part.config.use_precision_aware_optimizer, "its master weights are not where they are looked for"
            group, position = part.model_param_group_index_map[parameter]
            begin = part._get_model_param_range_map(parameter)["param"].start
            return Master(part.optimizer, part.optimizer.param_groups[group], position, begin)
        master = getattr(parameter, "main_param", None)
        master = parameter if master is None else master
        for group in part.param_groups:
            for position, candidate in enumerate(group["params"]):
                if candidate is master:
                    return Master(part.optimizer, group, position)
    assert any(isinstance(part, DistributedOptimizer) for part in parts), "a parameter that no optimizer trains"
    return None
