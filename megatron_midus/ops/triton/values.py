"""Fused look-up of values: the weighted sum of K rows of a bank per token and head, then the head's projection.

The gathered rows live in registers only. What is summed is a *bag*: for hive and full the K slots of one token and head,
for block the H * K slots of one token. Sums are fp32.

Shapes: T tokens, H heads, K top-k, L latent, d_o channels per head, d hidden, W width of a bank's rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MAX_LATENT = 256  # of hive: a program holds whole latent rows to project them
PROJECT_BLOCK_T = 16  # tokens of a program that projects what it sums
SUM_BLOCK_T = 32  # of one that does not
BLOCK_W = 128  # channels of a bank's row that a program sums, where nothing is projected
BLOCK_O = 64  # projected channels at a time
UNROLL = tl.constexpr(4)  # rows in flight; more cost registers and gain nothing


@triton.jit
def _sum_bag(
    values, indices, weights, bag, inside_bag, channel, inside_channel, W,
    BAG: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """``sum_j weights[bag, j] * values[indices[bag, j], channel]``, fp32 ``[BLOCK_T, BLOCK_W]``; ``bag`` is int64."""
    total = tl.zeros([BLOCK_T, BLOCK_W], tl.float32)
    mask = inside_bag[:, None] & inside_channel[None, :]
    for j in tl.range(0, BAG, loop_unroll_factor=UNROLL):
        slot = tl.load(indices + bag * BAG + j, mask=inside_bag, other=0).to(tl.int64)  # times W it passes 2^31
        weight = tl.load(weights + bag * BAG + j, mask=inside_bag, other=0.0)
        row = tl.load(values + slot[:, None] * W + channel[None, :], mask=mask, other=0.0)
        total += weight[:, None] * row.to(tl.float32)
    return total


@triton.jit
def project_kernel(
    values, head_proj, indices, weights, out, latent, num_tokens, num_heads,
    W: tl.constexpr, OUT: tl.constexpr, TOPK: tl.constexpr, SAVE_LATENT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Program (t, h) of hive: values ``[N*N, L]``, head_proj ``[H, L, d_o]`` -> out ``[T, H, d_o]``, latent ``[T, H, L]``."""
    head = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside_token = token < num_tokens
    line = token.to(tl.int64) * num_heads + head
    channel = tl.arange(0, BLOCK_W)
    inside_channel = channel < W
    total = _sum_bag(
        values, indices, weights, line, inside_token, channel, inside_channel, W, TOPK, BLOCK_T, BLOCK_W
    )  # fmt: skip
    total = total.to(values.dtype.element_ty)
    if SAVE_LATENT:
        mask = inside_token[:, None] & inside_channel[None, :]
        tl.store(latent + line[:, None] * W + channel[None, :], total, mask=mask)
    for start in tl.range(0, OUT, BLOCK_O):
        column = start + tl.arange(0, BLOCK_O)
        in_column = (column < OUT)[None, :]
        proj_at = head_proj + (head * W + channel[:, None]) * OUT + column[None, :]
        proj = tl.load(proj_at, mask=inside_channel[:, None] & in_column, other=0.0)
        found = tl.dot(total, proj, input_precision="ieee").to(out.dtype.element_ty)
        tl.store(out + line[:, None] * OUT + column[None, :], found, mask=inside_token[:, None] & in_column)


@triton.jit
def sum_kernel(
    values, indices, weights, out, num_tokens, num_groups, bank_stride,
    W: tl.constexpr, BAG: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Program (t, w, g): group g's bank ``values[g]`` -> out ``[T, G, W]``; full: a group is a head, block: there is one."""
    group = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside_token = token < num_tokens
    line = token.to(tl.int64) * num_groups + group
    channel = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    inside_channel = channel < W
    total = _sum_bag(
        values + group * bank_stride, indices, weights, line, inside_token, channel, inside_channel, W,
        BAG, BLOCK_T, BLOCK_W,
    )  # fmt: skip
    mask = inside_token[:, None] & inside_channel[None, :]
    tl.store(out + line[:, None] * W + channel[None, :], total.to(out.dtype.element_ty), mask=mask)


def project(
    indices_THK: torch.Tensor,
    weights_THK: torch.Tensor,
    values_NL: torch.Tensor,
    head_proj_HLO: torch.Tensor,
    *,
    dtype: torch.dtype,
    save_latent: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Variant hive: ``out[t, h] = (sum_k weights[t, h, k] * values[indices[t, h, k]]) @ head_proj[h]``.

    The latent sum is rounded to the dtype of ``values``, which is that of ``head_proj`` too, before it is projected.

    Args:
        indices_THK, weights_THK: int32 and fp32, contiguous.
        values_NL, head_proj_HLO: contiguous, L at most ``MAX_LATENT``.
        dtype: of the output.
        save_latent: give the latent sums as well, for the backward pass.

    Returns:
        ``(out [T, H, d_o], latent [T, H, L] or None)``.
    """
    tokens, heads, topk = indices_THK.shape
    width, out_width = head_proj_HLO.shape[1:]
    out = torch.empty(tokens, heads, out_width, dtype=dtype, device=values_NL.device)
    latent = torch.empty(tokens, heads, width, dtype=values_NL.dtype, device=values_NL.device) if save_latent else None
    if tokens > 0:
        project_kernel[(triton.cdiv(tokens, PROJECT_BLOCK_T), heads)](
            values_NL, head_proj_HLO, indices_THK, weights_THK, out, latent, tokens, heads,
            W=width, OUT=out_width, TOPK=topk, SAVE_LATENT=save_latent,
            BLOCK_T=PROJECT_BLOCK_T, BLOCK_W=max(16, triton.next_power_of_2(width)),
            BLOCK_O=min(BLOCK_O, max(16, triton.next_power_of_2(out_width))), num_warps=4, num_stages=2,
        )  # fmt: skip
    return out, latent


def sum_values(
    indices_THK: torch.Tensor, weights_THK: torch.Tensor, values: torch.Tensor, *, variant: str, dtype: torch.dtype
) -> torch.Tensor:
    """Variants full, ``values [H, N*N, d_o]`` -> ``[T, H, d_o]``, and block, ``values [N*N, d]`` -> ``[T, 1, d]``."""
    tokens, heads, topk = indices_THK.shape
    width = values.shape[-1]
    groups, bag = (heads, topk) if variant == "full" else (1, heads * topk)
    out = torch.empty(tokens, groups, width, dtype=dtype, device=values.device)
    if tokens > 0:
        block_w = min(BLOCK_W, max(16, triton.next_power_of_2(width)))
        sum_kernel[(triton.cdiv(tokens, SUM_BLOCK_T), triton.cdiv(width, block_w), groups)](
            values, indices_THK, weights_THK, out, tokens, groups, values.stride(0) if variant == "full" else 0,
            W=width, BAG=bag, BLOCK_T=SUM_BLOCK_T, BLOCK_W=block_w, num_warps=4, num_stages=2,
        )  # fmt: skip
    return out
