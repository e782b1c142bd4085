"""The load-balancing loss of the routers that learn, for the log: Megatron-Core collects it, nobody else reads it."""

from __future__ import annotations

from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.transformer.moe.moe_utils import clear_aux_losses_tracker, track_moe_metrics

from megatron_midus.training.architecture import Architecture
from megatron_midus.training.arguments import Arguments
from megatron_midus.training.summary import learning_mixtures

NAME = "load_balancing_loss"  # of Megatron-Core


class RouterLosses:
    """Counts micro-batches between two reports.

    Args:
        learning: 0-based positions of the blocks whose routers learn.
        num_layers: of the model.
    """

    def __init__(self, learning: list[int], num_layers: int) -> None:
        self.frequency = [int(index in learning) for index in range(num_layers)]
        self._micro_batches = 0
        clear_aux_losses_tracker()

    def count_step(self) -> None:
        self._micro_batches += get_num_microbatches()

    def take(self, iteration: int) -> float:
        """Mean over micro-batches, routers and replicas since the last call; 1 is perfect balance. Every rank calls it."""
        found: dict = {}
        track_moe_metrics(
            loss_scale=1 / self._micro_batches,
            iteration=iteration,
            total_loss_dict=found,
            force_initialize=True,  # a pipeline stage may hold no router
            track_names=[NAME],
            num_layers=len(self.frequency),
            moe_layer_freq=self.frequency,
        )
        self._micro_batches = 0
        return float(found[NAME])


def router_losses(arguments: Arguments, architecture: Architecture) -> RouterLosses | None:
    """``None`` where no router has a load-balancing loss."""
    coeff = arguments.training.moe_aux_loss_coeff
    coeff = architecture.model.moe_aux_loss_coeff if coeff is None else coeff
    _, learning = learning_mixtures(architecture)
    if architecture.model.num_moe_experts is None or not (coeff and learning) or arguments.training.skip_train:
        return None
    return RouterLosses(learning, architecture.plan.num_layers)
