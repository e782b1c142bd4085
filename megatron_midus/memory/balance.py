"""The balance loss inside a model: how a loss that no other layer sees gets into the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class BalanceLoss:
    """Adds ``coeff * mean over the block's heads of ops.balance_loss`` to the training loss, for every Memory block.

    The loss is taken over what a rank reads at once: one micro-batch, its slice under context parallelism. Over
    micro-batches and data- and context-parallel ranks it is averaged like the main loss: each alike, or with
    ``calculate_per_token_loss`` by its number of tokens (positions, whatever the loss mask says of them). Heads are
    independent, so tensor parallelism needs no communication: the gradients of a rank's queries and sub-keys are whole.

    Args:
        coeff: weight of the loss.
        num_microbatches: tells how many micro-batches the current step has.

    Attributes:
        total, passes: sum of the losses of this rank's heads, without gradient, and how many were added; to be read
            and reset by whoever reports them.
    """

    def __init__(self, coeff: float, num_microbatches: Callable[[], int]) -> None:
        self.coeff = coeff
        self.num_microbatches = num_microbatches
        self.total: torch.Tensor | None = None
        self.passes = 0

    def attach(
        self, output: torch.Tensor, losses: torch.Tensor, *, num_heads: int, num_tokens: int, config: TransformerConfig
    ) -> torch.Tensor:
        """``output``, whose backward pass gives the losses their gradient as well.

        Args:
            losses: ``[H/p]`` of this rank's heads.
            num_heads: of all ranks.
            num_tokens: that the losses are of.
        """
        loss = losses.sum() / num_heads
        total = loss.detach().double()
        self.total = total if self.total is None else self.total + total
        self.passes += 1
        # As Megatron-Core's schedules scale the main loss; the data-parallel reduction treats both alike afterwards.
        share = float(num_tokens) if config.calculate_per_token_loss else 1 / self.num_microbatches()
        scale = torch.full((), self.coeff * share, dtype=loss.dtype, device=loss.device)
        if config.grad_scale_func is not None:
            scale = config.grad_scale_func(scale)
        return _Attach.apply(output, loss, scale)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, loss: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.scale, ctx.dtype = scale, loss.dtype
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:  # type: ignore[override]
        return gradient, ctx.scale.to(ctx.dtype).reshape(()), None
