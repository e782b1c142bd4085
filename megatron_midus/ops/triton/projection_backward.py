"""Gradients through the head projection ``out[t, h] = latent[t, h] @ head_proj[h]``, both in one pass over ``grad_out``.

Shapes: T tokens, H memory heads, L latent, O channels of a head's output.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

BLOCK_T = 64
MAX_BLOCK_L = 64
MAX_OUT = 256  # channels of a head's output that one program holds, in fp32 half of them
TOKENS_PER_SPLIT = 1024
MAX_SPLITS = 32


def projection_backward(
    grad_out_THO: torch.Tensor, latent_THL: torch.Tensor, head_proj_HLO: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(grad_latent [T, H, L], grad_head_proj [H, L, O])``.

    The gradient of the latent has the widest dtype of the three, that of the projection its own. The tokens are cut into
    a number of parts that hangs on T alone, whose sums are added in order: equal bits from run to run.
    """
    tensors = (grad_out_THO, latent_THL, head_proj_HLO)
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    grad_out_THO, latent_THL, head_proj_HLO = (tensor.contiguous() for tensor in tensors)
    tokens, heads, latent = latent_THL.shape
    out = head_proj_HLO.shape[2]
    wide = dtype == torch.float32  # half of the tokens and twice the warps keep full-precision products in registers
    if out > (MAX_OUT // 2 if wide else MAX_OUT):  # large enough for a library's matrix products
        grad_latent = torch.einsum("tho,hlo->thl", grad_out_THO.to(dtype), head_proj_HLO.to(dtype))
        return grad_latent, torch.einsum("thl,tho->hlo", latent_THL.to(dtype), grad_out_THO.to(dtype)).to(
            head_proj_HLO.dtype
        )
    grad_latent = torch.empty(tokens, heads, latent, dtype=dtype, device=latent_THL.device)
    splits = max(1, min(MAX_SPLITS, triton.cdiv(tokens, TOKENS_PER_SPLIT)))
    per_split = triton.cdiv(triton.cdiv(tokens, splits), BLOCK_T) * BLOCK_T
    partial = torch.empty(splits, heads, latent, out, dtype=torch.float32, device=latent_THL.device)
    block_t = BLOCK_T // 2 if wide else BLOCK_T
    block_l = min(MAX_BLOCK_L, max(16, triton.next_power_of_2(latent)))
    block_o = max(16, triton.next_power_of_2(out))
    _projection_backward_kernel[(heads, splits, triton.cdiv(latent, block_l))](
        grad_out_THO, latent_THL, head_proj_HLO, grad_latent, partial,
        tokens, heads, latent, out, per_split,
        BLOCK_T=block_t, BLOCK_L=block_l, BLOCK_O=block_o, num_warps=8 if wide else 4,
    )  # fmt: skip
    return grad_latent, partial.sum(0).to(head_proj_HLO.dtype)


@triton.jit
def _projection_backward_kernel(
    grad_out_ptr, latent_ptr, proj_ptr, grad_latent_ptr, partial_ptr,
    tokens, heads, latent, out, per_split,
    BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    head, split, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    dtype = grad_latent_ptr.dtype.element_ty
    l = block * BLOCK_L + tl.arange(0, BLOCK_L)  # noqa: E741
    o = tl.arange(0, BLOCK_O)
    in_proj = (l < latent)[:, None] & (o < out)[None, :]
    proj_offset = head * latent * out + l[:, None] * out + o[None, :]
    proj = tl.load(proj_ptr + proj_offset, mask=in_proj, other=0.0).to(dtype)  # [L, O]
    grad_proj = tl.zeros([BLOCK_L, BLOCK_O], tl.float32)
    first = split * per_split
    for begin in range(first, tl.minimum(first + per_split, tokens), BLOCK_T):
        t = begin + tl.arange(0, BLOCK_T)
        row = t.to(tl.int64) * heads + head
        grad_out = tl.load(
            grad_out_ptr + row[:, None] * out + o[None, :], mask=(t < tokens)[:, None] & (o < out)[None, :], other=0.0
        ).to(dtype)  # [T, O]
        in_latent = (t < tokens)[:, None] & (l < latent)[None, :]
        latent_offset = row[:, None] * latent + l[None, :]
        z = tl.load(latent_ptr + latent_offset, mask=in_latent, other=0.0).to(dtype)  # [T, L]
        grad_latent = tl.dot(grad_out, tl.trans(proj), input_precision="ieee")
        tl.store(grad_latent_ptr + latent_offset, grad_latent.to(dtype), mask=in_latent)
        grad_proj = tl.dot(tl.trans(z), grad_out, grad_proj, input_precision="ieee")
    partial_offset = split.to(tl.int64) * heads * latent * out + proj_offset
    tl.store(partial_ptr + partial_offset, grad_proj, mask=in_proj)
