"""The load-balance loss of product keys: large where a head's look-ups and its scores favour the same few sub-keys.

Shapes: T tokens, H memory heads, D channels of one head's query, N sub-keys per half, K top-k, c tokens of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megatron_midus.ops.reference import compute_dtype

CHUNK_SCORES = 1 << 22  # scores held at a time, with a few temporaries of their size


def balance_loss(
    query_THD: torch.Tensor, row_keys_HND: torch.Tensor, col_keys_HND: torch.Tensor, index_THK: torch.Tensor
) -> torch.Tensor:
    """The auxiliary loss of Switch Transformers (Fedus et al. 2022, Eq. 4) over the sub-keys of each half.

    Of one head and one half, with ``c_i`` of the ``T K`` selected slots in row (column) ``i``::

        f_i = c_i / (T K)          a count, without gradient
        P_i = mean over tokens of softmax(scores)_i, over all N sub-keys
        loss = N * sum_i f_i P_i   1 when either is uniform, N when all look-ups and all probability are in one sub-key

    Args:
        query_THD: ``[T, H, D]``, as the look-up takes it.
        row_keys_HND, col_keys_HND: ``[H, N, D/2]``.
        index_THK: the slots that this look-up selected.

    Returns:
        ``[H]``, the mean of both halves, in fp32 at least. Differentiable once, in query and sub-keys.
    """
    num_keys = row_keys_HND.shape[1]
    row_query, col_query = query_THD.chunk(2, dim=-1)
    with torch.autocast(query_THD.device.type, enabled=False):
        rows = _BalanceLoss.apply(row_query, row_keys_HND, _relative_usage(index_THK // num_keys, num_keys))
        cols = _BalanceLoss.apply(col_query, col_keys_HND, _relative_usage(index_THK % num_keys, num_keys))
    return (rows + cols) / 2


def _relative_usage(index_THK: torch.Tensor, num_keys: int) -> torch.Tensor:
    """``N f_i``, ``[H, N]``: 1 is an equal share."""
    tokens, heads, topk = index_THK.shape
    entries = index_THK + torch.arange(heads, device=index_THK.device)[:, None] * num_keys
    counts = torch.zeros(heads * num_keys, dtype=torch.int64, device=index_THK.device)
    counts.index_add_(0, entries.flatten(), counts.new_ones(()).expand(entries.numel()))
    return counts.view(heads, num_keys).double() * (num_keys / max(1, tokens * topk))


class _BalanceLoss(torch.autograd.Function):
    """One half. The gradient is made in the forward pass, chunk by chunk, so that scores are never held for all tokens."""

    @staticmethod
    def forward(
        ctx: Any, query_THC: torch.Tensor, keys_HNC: torch.Tensor, relative_usage_HN: torch.Tensor
    ) -> torch.Tensor:
        dtype = compute_dtype(query_THC, keys_HNC)
        tokens, heads, _ = query_THC.shape
        keys, usage = keys_HNC.to(dtype), relative_usage_HN.to(dtype)[:, None]  # [H, 1, N]
        loss = torch.zeros(heads, dtype=dtype, device=keys.device)
        grad_query = torch.empty(query_THC.shape, dtype=dtype, device=keys.device)
        grad_keys = torch.zeros_like(keys)
        step = max(1, CHUNK_SCORES // (heads * keys.shape[1]))
        for begin in range(0, tokens, step):
            query = query_THC[begin : begin + step].to(dtype).transpose(0, 1)  # [H, c, C]
            probability = torch.bmm(query, keys.transpose(1, 2)).softmax(-1)  # [H, c, N]
            expected = (probability * usage).sum(-1, keepdim=True)  # [H, c, 1]
            loss += expected.sum((1, 2)) / tokens
            grad_scores = probability * (usage - expected) / tokens
            grad_query[begin : begin + step] = torch.bmm(grad_scores, keys).transpose(0, 1)
            grad_keys.baddbmm_(grad_scores.transpose(1, 2), query)
        # Not in fp16, where so small numbers are zero: the loss scale comes later.
        kept = torch.bfloat16 if query_THC.dtype == torch.bfloat16 else dtype
        ctx.save_for_backward(grad_query.to(kept), grad_keys)
        ctx.dtypes = query_THC.dtype, keys_HNC.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss_H: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        grad_query, grad_keys = ctx.saved_tensors
        factor = grad_loss_H[:, None]
        query_dtype, keys_dtype = ctx.dtypes
        return (grad_query * factor).to(query_dtype), (grad_keys * factor[..., None]).to(keys_dtype), None
