"""Backend "triton": the head-wise memory as one autograd function over fused kernels.

Kept for the backward pass besides the arguments: slots int32 and weights fp32 [T, H, K], and for hive the latent sums
[T, H, L] in the dtype of the values. Slots are never selected a second time within one forward and backward pass, and
selecting again from equal inputs (activation recompute) gives equal bits.

Triton is imported by the first call. Shapes: T tokens, H heads, D channels of a query, N sub-keys per half, K top-k,
L latent.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from megatron_midus.ops.reference import activation_backward

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_TOPK = 128
MAX_CHANNELS = 512  # of a query
MAX_LATENT = 256
MIN_CAPABILITY = (8, 0)


def unsupported_reason(
    query_THD: torch.Tensor,
    *others: torch.Tensor | None,
    topk: int,
    variant: str,
    automatic: bool = False,
    **settings: Any,
) -> str | None:
    """Why this backend cannot run, ``None`` when it can. ``automatic``: nobody named it, so it must be fast as well.

    Where there is no query, as in ``aggregate_values``, its place is taken by any tensor of two dimensions.
    """
    tensors = [query_THD, *(t for t in others if t is not None)]
    interpreted = query_THD.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if query_THD.device.type != "cuda" and (automatic or not interpreted):
        return f"its kernels need CUDA tensors and these are on {query_THD.device.type}"
    if not _installed():
        return "the package triton is not installed; run pip install triton"
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            return f"it computes in fp32, bf16 and fp16, not {tensor.dtype}; choose torch"
        if interpreted and tensor.dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 wrongly; unset TRITON_INTERPRET or use float32"
    if topk > MAX_TOPK:
        return f"topk={topk} is more than the {MAX_TOPK} that its kernels hold; choose torch"
    if query_THD.dim() == 3 and query_THD.shape[2] > MAX_CHANNELS:
        return f"{query_THD.shape[2]} channels per head are more than the {MAX_CHANNELS} that its kernels hold; choose torch"
    if variant == "hive" and len(others) > 2 and others[2] is not None and others[2].shape[1] > MAX_LATENT:
        return f"latent size {others[2].shape[1]} is more than the {MAX_LATENT} that its kernels hold; choose torch"
    return None if interpreted else _unsupported_device(query_THD.device)


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _unsupported_device(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "its kernels are made for NVIDIA GPUs; choose torch"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"the GPU has compute capability {capability} and its kernels need {MIN_CAPABILITY}; choose torch"
    return None


def head_wise_memory(
    query_THD: torch.Tensor,
    row_keys_HND: torch.Tensor,
    col_keys_HND: torch.Tensor,
    values: torch.Tensor,
    head_proj: torch.Tensor | None,
    *,
    topk: int,
    variant: str = "hive",
    score_activation: str = "softmax",
    deterministic: bool = True,
    values_main_grad: torch.Tensor | None = None,
    observer: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """As ``megatron_midus.ops.head_wise_memory``.

    Inputs of several dtypes are brought to one: query and keys to the widest of theirs, the projection to that of the
    values, in which the latent sums are kept too.
    """
    out_dtype = query_THD.dtype
    dtype = functools.reduce(torch.promote_types, (row_keys_HND.dtype, col_keys_HND.dtype), out_dtype)
    query, row_keys, col_keys = (t.to(dtype).contiguous() for t in (query_THD, row_keys_HND, col_keys_HND))
    head_proj = None if head_proj is None else head_proj.to(values.dtype).contiguous()
    tensors = (query, row_keys, col_keys, values.contiguous(), head_proj)
    settings = _Settings(topk, variant, score_activation, deterministic, out_dtype, values_main_grad, observer)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _HeadWiseMemory.apply(*tensors, settings)
    return _look_up(*tensors, settings, save_latent=False)[0]


def select_slots(
    query_THD: torch.Tensor, row_keys_HND: torch.Tensor, col_keys_HND: torch.Tensor, *, topk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(indices int32 [T, H, K], scores fp32 [T, H, K])``, best first."""
    from megatron_midus.ops.triton import selection

    dtype = functools.reduce(torch.promote_types, (row_keys_HND.dtype, col_keys_HND.dtype), query_THD.dtype)
    tensors = (t.to(dtype).contiguous() for t in (query_THD, row_keys_HND, col_keys_HND))
    return selection.select(*tensors, topk=topk, activation="none")


def weigh_slots(
    query_THD: torch.Tensor,
    row_keys_HND: torch.Tensor,
    col_keys_HND: torch.Tensor,
    *,
    topk: int,
    score_activation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``megatron_midus.ops.weigh_slots``; weights are fp32."""
    dtype = functools.reduce(torch.promote_types, (row_keys_HND.dtype, col_keys_HND.dtype), query_THD.dtype)
    tensors = (t.to(dtype).contiguous() for t in (query_THD, row_keys_HND, col_keys_HND))
    return _WeighSlots.apply(*tensors, topk, score_activation)


def aggregate_values(values_SW: torch.Tensor, index_BJ: torch.Tensor, weights_BJ: torch.Tensor) -> torch.Tensor:
    """As ``megatron_midus.ops.aggregate_values``: fp32 ``[B, W]``."""
    return _AggregateValues.apply(values_SW.contiguous(), index_BJ.int().contiguous(), weights_BJ.float().contiguous())


class _Settings(NamedTuple):
    topk: int
    variant: str
    score_activation: str
    deterministic: bool
    out_dtype: torch.dtype
    values_main_grad: torch.Tensor | None
    observer: Callable[[torch.Tensor, torch.Tensor], None] | None


def _look_up(
    query: torch.Tensor,
    row_keys: torch.Tensor,
    col_keys: torch.Tensor,
    values: torch.Tensor,
    head_proj: torch.Tensor | None,
    settings: _Settings,
    *,
    save_latent: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """``(out, indices int32 [T, H, K], weights fp32 [T, H, K], latent)``."""
    from megatron_midus.ops.triton import selection
    from megatron_midus.ops.triton import values as value_kernels

    indices, weights = selection.select(
        query, row_keys, col_keys, topk=settings.topk, activation=settings.score_activation
    )
    if settings.observer is not None:
        settings.observer(indices, weights)
    if head_proj is None:
        out = value_kernels.sum_values(indices, weights, values, variant=settings.variant, dtype=settings.out_dtype)
        return out, indices, weights, None
    out, latent = value_kernels.project(
        indices, weights, values, head_proj, dtype=settings.out_dtype, save_latent=save_latent
    )
    return out, indices, weights, latent


class _HeadWiseMemory(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, row_keys, col_keys, values, head_proj, settings):
        tensors = (query, row_keys, col_keys, values, head_proj)
        out, indices, weights, latent = _look_up(*tensors, settings, save_latent=True)
        ctx.save_for_backward(*tensors, indices, weights, latent)
        ctx.settings = settings
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        from megatron_midus.ops.triton.keys_backward import keys_backward
        from megatron_midus.ops.triton.values_backward import values_backward

        query, row_keys, col_keys, values, head_proj, indices, weights, latent = ctx.saved_tensors
        settings, needed = ctx.settings, ctx.needs_input_grad
        buffer = settings.values_main_grad if needed[3] else None
        grad_weights, grad_values, grad_proj = values_backward(
            grad_out, indices, weights, values, head_proj, latent,
            variant=settings.variant, deterministic=settings.deterministic, accumulate_into=buffer,
        )  # fmt: skip
        if buffer is not None:
            # The buffer has it all. Megatron's hooks wait for a gradient, and may add it: it has to be zero.
            grad_values = torch.zeros_like(values)
        grad_query = grad_rows = grad_cols = None
        if any(needed[:3]):
            grad_scores = activation_backward(grad_weights, weights, settings.score_activation)
            grad_query, grad_rows, grad_cols = keys_backward(grad_scores, indices, query, row_keys, col_keys)
        grads = (grad_query, grad_rows, grad_cols, grad_values, grad_proj)
        return *(grad if need else None for grad, need in zip(grads, needed)), None


class _WeighSlots(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, row_keys, col_keys, topk, score_activation):
        from megatron_midus.ops.triton import selection

        indices, weights = selection.select(query, row_keys, col_keys, topk=topk, activation=score_activation)
        ctx.save_for_backward(query, row_keys, col_keys, indices, weights)
        ctx.score_activation = score_activation
        ctx.mark_non_differentiable(indices)
        return indices, weights

    @staticmethod
    @once_differentiable
    def backward(ctx, _, grad_weights):
        from megatron_midus.ops.triton.keys_backward import keys_backward

        query, row_keys, col_keys, indices, weights = ctx.saved_tensors
        own = grad_weights.clone(memory_format=torch.contiguous_format)  # autograd may hand the same one to others
        grad_scores = activation_backward(own, weights, ctx.score_activation)
        grads = keys_backward(grad_scores, indices, query, row_keys, col_keys)
        return *(grad if need else None for grad, need in zip(grads, ctx.needs_input_grad)), None, None


class _AggregateValues(torch.autograd.Function):
    """Bags of any slots of one bank: variant block without the heads."""

    @staticmethod
    def forward(ctx, values, index, weights):
        from megatron_midus.ops.triton.values import sum_values

        ctx.save_for_backward(values, index, weights)
        return sum_values(index[:, None], weights[:, None], values, variant="block", dtype=weights.dtype)[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        from megatron_midus.ops.triton.values_backward import values_backward

        values, index, weights = ctx.saved_tensors
        grad_weights, grad_values, _ = values_backward(
            grad_out[:, None], index[:, None], weights[:, None], values, None, None, variant="block", deterministic=True
        )
        grads = (grad_values, None, grad_weights[:, 0])
        return tuple(grad if need else None for grad, need in zip(grads, ctx.needs_input_grad))
