"""Fuses two layers after aligning the first to the second by optimal transport (OpT-DeUS, Cao et al. 2025, arXiv 2508.08011).

The rows of a weight are its neurons. Entropic transport between the rows of both layers gives ``T [n, n]``, whose rows
and columns each sum to ``1/n``; ``T^T W_first`` are the first layer's neurons in the order of the second's.
The paper's own program uses T as it is, so what it averages with is n times too small and the result is about half of
the second layer (``scale="literal"``). ``scale="normalised"`` multiplies T by n, as the method's text intends.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal

import torch

from megatron_midus.upscaling.tensors import ATTENTION_OUTPUT

Scale = Literal["normalised", "literal"]
Read = Callable[[int, str], torch.Tensor]

REGULARISATION = 0.06  # weight of the entropy, that of the paper's program
MAX_ITERATIONS = 1000
WARM_ITERATIONS = 20
TOLERANCE = 1e-3  # largest relative error of a row's mass

ALIGNED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")
BEHIND_ATTENTION = ("mlp.gate_proj", "mlp.up_proj")  # their inputs are the attention's outputs
NORM_BEHIND_ATTENTION = "post_attention_layernorm.weight"


def transport_plan(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Entropic optimal transport between the rows of two weights, Euclidean cost, equal masses.

    Sinkhorn's iteration in the logarithm: at this regularisation the kernel itself underflows.

    Args:
        first, second: ``[n, d]``.

    Returns:
        ``[n, n]`` fp32, entry ``(i, j)`` the mass that row i of ``first`` sends to row j of ``second``; sums to 1.
    """
    rows = first.shape[0]
    # In fp64: the exponents are costs over the regularisation, maybe thousands, and their difference must be exact.
    cost = torch.cdist(first.double(), second.double())
    log_mass = -math.log(rows)
    sent, received = cost.new_zeros(2, rows)  # the potentials of both sides, in units of the cost
    # From a blurred plan to a sharp one: started sharp, far rows need thousands of iterations.
    regularisation = max(REGULARISATION, cost.max().item())
    while True:
        for _ in range(MAX_ITERATIONS if regularisation == REGULARISATION else WARM_ITERATIONS):
            sent = regularisation * (log_mass - torch.logsumexp((received - cost) / regularisation, dim=1))
            received = regularisation * (log_mass - torch.logsumexp((sent[:, None] - cost) / regularisation, dim=0))
            log_plan = (sent[:, None] + received - cost) / regularisation
            if (torch.logsumexp(log_plan, dim=1) - log_mass).exp().sub(1).abs().max() < TOLERANCE:
                break
        if regularisation == REGULARISATION:
            return log_plan.exp().float()
        regularisation = max(REGULARISATION, regularisation / 2)


class LayerFusion:
    """The tensors of one block made of the layers ``first`` and ``second``, one at a time; outputs are zero.

    Args:
        read: ``(layer, suffix) -> tensor`` of the base.
        first, second: 0-based base layers; ``first`` is aligned to ``second``.
        scale: of the transport plan.
    """

    def __init__(self, read: Read, first: int, second: int, scale: Scale) -> None:
        self._read = read
        self._layers = (first, second)
        self._scale = scale
        # The embedding and MLP of a real model are thousands of rows: a plan is made once, and only the ones in use kept.
        self._plan = functools.lru_cache(maxsize=2)(self._make_plan)

    def tensor(self, suffix: str) -> torch.Tensor:
        """The fused tensor, in the dtype of the base's."""
        first, second = (self._read(layer, suffix) for layer in self._layers)
        module = suffix.rpartition(".")[0]
        aligned = first.float()
        if module in BEHIND_ATTENTION and suffix.endswith("bias"):
            weights = [self._read(layer, f"{module}.weight").float() for layer in self._layers]
            neurons = self._scaled(transport_plan(weights[0] @ self._plan(ATTENTION_OUTPUT), weights[1]))
            aligned = neurons.T @ aligned
        elif module in BEHIND_ATTENTION:
            aligned = aligned @ self._plan(ATTENTION_OUTPUT)
            aligned = self._scaled(transport_plan(aligned, second)).T @ aligned
        elif module in ALIGNED:
            aligned = self._plan(f"{module}.weight").T @ aligned
        elif suffix == NORM_BEHIND_ATTENTION:
            # Half of the stream comes from the attention, half past it.
            aligned = (aligned @ self._plan(ATTENTION_OUTPUT) + aligned) / 2
        return ((aligned + second.float()) / 2).to(second.dtype)

    def _make_plan(self, suffix: str) -> torch.Tensor:
        first, second = (self._read(layer, suffix) for layer in self._layers)
        return self._scaled(transport_plan(first, second))

    def _scaled(self, plan: torch.Tensor) -> torch.Tensor:
        return plan * plan.shape[0] if self._scale == "normalised" else plan
