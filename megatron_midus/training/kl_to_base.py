"""--kl-to-base: the divergence of the model's next-token distribution from the base's, as a second term of the loss.

Shapes: ``s`` tokens of a sample (``s / cp`` under context parallel), ``b`` samples of a micro-batch, ``v/p`` rows of the
padded vocabulary on a tensor-parallel rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from megatron_midus.model.base import as_base
from megatron_midus.model.builder import unwrap
from megatron_midus.training.architecture import Architecture
from megatron_midus.training.arguments import Arguments
from megatron_midus.upscaling import UpscalePlan

# Logits that are computed with at a time, with some five temporaries of as many fp32 numbers: what a CPU's cache holds, what
# keeps a GPU busy.
_CHUNK = {"cpu": 2**18, "cuda": 2**24}


class KlToBase:
    """KL(base || model) of every token, nats, from a forward pass of the base before each one of the model.

    The base's logits stay until the model's are there; what the backward pass needs is then written over them. So the term
    costs one more tensor of the size and precision of the logits, and the base's forward pass without activations.

    Args:
        gpt: the whole model, unwrapped.
        plan: its blocks; the base's weights must be frozen (``plan.keeps_base``).
        coefficient: weight of the term in the loss.
    """

    def __init__(self, gpt: GPTModel, plan: UpscalePlan, coefficient: float) -> None:
        self.gpt, self.plan, self.coefficient = gpt, plan, coefficient
        self._base: torch.Tensor | None = None
        self._divergence: torch.Tensor | None = None
        # Behind the hooks that scale, cap and mask logits. Before the cross-entropy, which writes over fp32 logits.
        gpt.output_layer.register_forward_hook(self._compare)

    @torch.no_grad()
    def run_base(self, tokens: torch.Tensor, position_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        """The base's pass over a micro-batch, with the arguments of the model's pass, which must come next."""
        with as_base(self.gpt, self.plan):
            logits = self.gpt(tokens, position_ids, attention_mask)  # [b, s, v/p]
        self._base = logits.transpose(0, 1)

    def _compare(self, module: torch.nn.Module, inputs: Any, output: tuple) -> None:
        if self._base is not None:
            divergence = kl_divergence(output[0], self._base, self.gpt.pg_collection.tp)
            self._base, self._divergence = None, divergence.transpose(0, 1)

    def take(self) -> torch.Tensor:
        """``[b, s]``, nats, of the last pass of the model, alike on all tensor-parallel ranks."""
        divergence, self._divergence = self._divergence, None
        assert divergence is not None, "a pass of the model follows each pass of the base"
        return divergence


def kl_to_base(
    arguments: Arguments, architecture: Architecture, model_chunks: Sequence[torch.nn.Module]
) -> KlToBase | None:
    """``None`` without the flag, and where nothing is trained."""
    training = arguments.training
    if not training.kl_to_base or training.skip_train:
        return None
    (chunk,) = model_chunks
    return KlToBase(unwrap(chunk), architecture.plan, training.kl_to_base)


def kl_divergence(
    logits: torch.Tensor, base: torch.Tensor, group: torch.distributed.ProcessGroup | None = None
) -> torch.Tensor:
    """KL(softmax(base) || softmax(logits)) over a vocabulary that the ranks of ``group`` share.

    Sums are in fp32, in fp64 of fp64 logits. Rows of padding have the same very low logit on both sides, so no probability.

    Args:
        logits: ``[s, b, v/p]``; gets the gradient, the difference of the two distributions.
        base: ``[s, b, v/p]``, without a gradient. Overwritten.

    Returns:
        ``[s, b]``, nats, alike on all ranks.
    """
    return _KlDivergence.apply(logits, base, group)


class _KlDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, base: torch.Tensor, group: Any) -> torch.Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        both = (logits, base)
        rows = max(1, _CHUNK[logits.device.type] // (logits.shape[1] * logits.shape[2]))
        chunks = [slice(start, start + rows) for start in range(0, logits.shape[0], rows)]

        maxima = torch.stack([side.amax(-1).to(wide) for side in both])  # [2, s, b]
        _reduce(maxima, torch.distributed.ReduceOp.MAX, group)
        sums = torch.empty_like(maxima)
        for chunk in chunks:
            for side, maximum, total in zip(both, maxima, sums):
                total[chunk] = (side[chunk].to(wide) - maximum[chunk, :, None]).exp_().sum(-1)
        _reduce(sums, torch.distributed.ReduceOp.SUM, group)
        log_partition = maxima + sums.log()

        # fp16 knows nothing below 6e-8, and probabilities have many of those.
        ctx.scale = 2.0**15 if base.dtype == torch.float16 else 1.0
        divergence = torch.empty_like(maxima[0])
        for chunk in chunks:
            log_p, log_q = (side[chunk].to(wide) - part[chunk, :, None] for side, part in zip(both, log_partition))
            q = log_q.exp()
            difference = log_p.exp() - q
            # The difference sums to 0. With it terms are small where the two are alike, and so is what is lost by rounding.
            divergence[chunk] = log_q.sub_(log_p).mul_(q).add_(difference).sum(-1)
            base[chunk] = difference.mul_(ctx.scale)
        _reduce(divergence, torch.distributed.ReduceOp.SUM, group)
        ctx.save_for_backward(base)
        return divergence

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        (difference,) = ctx.saved_tensors
        # Computed in the wider precision, written in that of the logits.
        out = torch.empty_like(difference)
        return torch.mul(difference, (gradient / ctx.scale).unsqueeze(-1), out=out), None, None


def _reduce(tensor: torch.Tensor, op: Any, group: Any) -> None:
    if group is not None and group.size() > 1:
        torch.distributed.all_reduce(tensor, op=op, group=group)
