"""Gradients of the queries and of both halves of the sub-keys, from the gradient of the selected slots' scores.

A slot (i, j) is scored by row key i and column key j, so both halves see the same score gradient. The query's gradient
gathers K rows of each half. The keys' gradient is a matrix product with the scores' gradients as a dense [T, N] matrix,
which is rebuilt tile by tile in registers from the K selections of each token and never stored. In that matrix they have
the dtype of the query.

Shapes: T tokens, H memory heads, D channels of one head's query, N sub-keys per half, K top-k.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

QUERY_TILE = 512  # elements of one half's gradient that a program holds
KEYS_BLOCK_T = 16
LOW_BITS = 4  # sub-keys are numbered (high << LOW_BITS) + low within a block
BLOCK_K = 16  # selections of a token taken at a time: the smallest that tensor cores multiply
MAX_BLOCK_D = 64
KEYS_ACCUMULATORS = 16384  # elements of the keys' gradient that one program keeps in registers
TOKENS_PER_SPLIT = 1024
MAX_SPLITS = 16


def keys_backward(
    grad_scores_THK: torch.Tensor,
    indices_THK: torch.Tensor,
    query_THD: torch.Tensor,
    row_keys_HND: torch.Tensor,
    col_keys_HND: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of ``scores[t, h, k] = <row_keys[h, i], q[:D/2]> + <col_keys[h, j], q[D/2:]>``, slot ``i * N + j``.

    Args:
        grad_scores_THK: fp32, contiguous.
        indices_THK: slots, int32, contiguous.
        query_THD: ``[T, H, D]``.
        row_keys_HND, col_keys_HND: ``[H, N, D/2]``.

    Returns:
        ``(grad_query, grad_row_keys, grad_col_keys)``, each of the shape and dtype of its tensor, equal bits from run to
        run.
    """
    query, row_keys, col_keys = query_THD.contiguous(), row_keys_HND.contiguous(), col_keys_HND.contiguous()
    grad_query = _query_backward(grad_scores_THK, indices_THK, query, row_keys, col_keys)
    grad_keys = _sub_keys_backward(grad_scores_THK, indices_THK, query, row_keys.shape[1])
    return grad_query, grad_keys[0].to(row_keys.dtype), grad_keys[1].to(col_keys.dtype)


def _query_backward(grad_scores, indices, query, row_keys, col_keys) -> torch.Tensor:
    tokens, heads, channels = query.shape
    grad_query = torch.empty_like(query)
    block_d = _block_of(channels // 2)
    block_t = QUERY_TILE // block_d
    if tokens > 0:
        _query_backward_kernel[(triton.cdiv(tokens, block_t), heads)](
            grad_scores, indices, row_keys, col_keys, grad_query,
            tokens, heads,
            NUM_KEYS=row_keys.shape[1], TOPK=indices.shape[2], HALF=channels // 2, BLOCK_T=block_t, BLOCK_D=block_d,
            num_warps=4,
        )  # fmt: skip
    return grad_query


def _sub_keys_backward(grad_scores, indices, query, num_keys: int) -> torch.Tensor:
    """fp32 ``[2, H, N, D/2]``. The tokens are cut into a number of parts that hangs on T alone, added in order."""
    tokens, heads, channels = query.shape
    half = channels // 2
    block_d = min(MAX_BLOCK_D, _block_of(half))
    block_n = max(16 << LOW_BITS, min(triton.next_power_of_2(num_keys), KEYS_ACCUMULATORS // block_d))
    splits = max(1, min(MAX_SPLITS, triton.cdiv(tokens, TOKENS_PER_SPLIT)))
    per_split = triton.cdiv(triton.cdiv(tokens, splits), KEYS_BLOCK_T) * KEYS_BLOCK_T
    partial = torch.empty(splits, 2, heads, num_keys, half, dtype=torch.float32, device=query.device)
    _sub_keys_backward_kernel[(heads, splits * triton.cdiv(half, block_d), 2 * triton.cdiv(num_keys, block_n))](
        grad_scores, indices, query, partial,
        tokens, heads, splits, per_split,
        NUM_KEYS=num_keys, TOPK=indices.shape[2], HALF=half, BLOCK_T=KEYS_BLOCK_T, BLOCK_HIGH=block_n >> LOW_BITS,
        LOW_BITS=LOW_BITS, BLOCK_K=BLOCK_K, BLOCK_D=block_d, num_warps=8 if query.dtype == torch.float32 else 4,
    )  # fmt: skip
    return partial.sum(0)


def _block_of(half: int) -> int:
    return max(16, triton.next_power_of_2(half))


@triton.jit
def _query_backward_kernel(
    grad_scores_ptr, indices_ptr, row_keys_ptr, col_keys_ptr, grad_query_ptr,
    tokens, heads,
    NUM_KEYS: tl.constexpr, TOPK: tl.constexpr, HALF: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    row = t.to(tl.int64) * heads + head
    d = tl.arange(0, BLOCK_D)
    mask = (t < tokens)[:, None] & (d < HALF)[None, :]
    head_keys = head * NUM_KEYS * HALF
    grad_row = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    grad_col = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for k in range(TOPK):
        slot = tl.load(indices_ptr + row * TOPK + k, mask=t < tokens, other=0).to(tl.uint32)  # cheaper to divide
        weight = tl.load(grad_scores_ptr + row * TOPK + k, mask=t < tokens, other=0.0)
        i, j = (slot // NUM_KEYS).to(tl.int32), (slot % NUM_KEYS).to(tl.int32)
        row_key = tl.load(row_keys_ptr + (head_keys + i * HALF)[:, None] + d[None, :], mask=mask, other=0.0)
        col_key = tl.load(col_keys_ptr + (head_keys + j * HALF)[:, None] + d[None, :], mask=mask, other=0.0)
        grad_row += weight[:, None] * row_key.to(tl.float32)
        grad_col += weight[:, None] * col_key.to(tl.float32)
    out = grad_query_ptr + row[:, None] * (2 * HALF) + d[None, :]
    dtype = grad_query_ptr.dtype.element_ty
    tl.store(out, grad_row.to(dtype), mask=mask)
    tl.store(out + HALF, grad_col.to(dtype), mask=mask)


@triton.jit
def _sub_keys_backward_kernel(
    grad_scores_ptr, indices_ptr, query_ptr, partial_ptr,
    tokens, heads, splits, per_split,
    NUM_KEYS: tl.constexpr, TOPK: tl.constexpr, HALF: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_HIGH: tl.constexpr, BLOCK_D: tl.constexpr,
    LOW_BITS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One block of BLOCK_HIGH * BLOCK_LOW sub-keys of one half, one part of the tokens."""
    BLOCK_LOW: tl.constexpr = 1 << LOW_BITS
    BLOCK_N: tl.constexpr = BLOCK_HIGH * BLOCK_LOW
    head, split = tl.program_id(0), tl.program_id(1) % splits
    which = tl.program_id(2) % 2  # 0: row keys and the query's first half; 1: column keys and its second half
    first_key = tl.program_id(2) // 2 * BLOCK_N
    high = tl.arange(0, BLOCK_HIGH)[None, :, None]
    low = tl.arange(0, BLOCK_LOW)[None, None, :]
    d = tl.program_id(1) // splits * BLOCK_D + tl.arange(0, BLOCK_D)
    grad_keys = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    first = split * per_split
    for begin in range(first, tl.minimum(first + per_split, tokens), BLOCK_T):
        t = begin + tl.arange(0, BLOCK_T)
        row = t.to(tl.int64) * heads + head
        mask = (t < tokens)[:, None] & (d < HALF)[None, :]
        query = tl.load(
            query_ptr + row[:, None] * (2 * HALF) + which * HALF + d[None, :], mask=mask, other=0.0
        )  # [T, D/2]
        # The dense gradient of key (high, low) is a sum over k of one-hot(high) * one-hot(low) * gradient: a product of
        # two small matrices per token, for which N compares per selection shrink to HIGH + LOW.
        dense = tl.zeros([BLOCK_T, BLOCK_HIGH, BLOCK_LOW], tl.float32)
        for begin_k in tl.static_range(0, TOPK, BLOCK_K):
            k = begin_k + tl.arange(0, BLOCK_K)
            entry = row[:, None] * TOPK + k[None, :]
            mask = (t < tokens)[:, None] & (k < TOPK)[None, :]
            slot = tl.load(indices_ptr + entry, mask=mask, other=0).to(tl.uint32)  # unsigned: cheaper to divide
            weight = tl.load(grad_scores_ptr + entry, mask=mask, other=0.0).to(query.dtype)
            key = (tl.where(which == 0, slot // NUM_KEYS, slot % NUM_KEYS)).to(tl.int32) - first_key
            # Keys of other blocks match no row: what is below has a negative high part, what is above one too large.
            key_high, key_low = key >> LOW_BITS, key & (BLOCK_LOW - 1)
            zero = tl.zeros_like(weight)[:, None, :]
            highs = tl.where(key_high[:, None, :] == high, weight[:, None, :], zero)
            lows = tl.where(key_low[:, :, None] == low, 1.0, 0.0).to(query.dtype)
            dense = tl.dot(highs, lows, dense, input_precision="ieee")
        dense_TN = tl.reshape(dense.to(query.dtype), [BLOCK_T, BLOCK_N])
        grad_keys = tl.dot(tl.trans(dense_TN), query, grad_keys, input_precision="ieee")
    n = first_key + tl.arange(0, BLOCK_N)
    offset = ((split * 2 + which) * heads + head).to(tl.int64) * NUM_KEYS * HALF
    offset += n[:, None] * HALF + d[None, :]
    tl.store(partial_ptr + offset, grad_keys, mask=(n < NUM_KEYS)[:, None] & (d < HALF)[None, :])
