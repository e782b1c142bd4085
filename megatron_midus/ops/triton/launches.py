"""The kernels that one forward and backward pass launches at the shapes of real models, compiled and not run."""

from __future__ import annotations

from typing import NamedTuple

import torch

from megatron_midus.ops.triton import function, resources


class Shape(NamedTuple):
    """Sizes of one memory; T tokens, H heads, n sub-keys per half, k top-k, channels per head, latent, output per head."""

    num_keys: int
    topk: int
    channels: int = 64
    out: int = 64
    heads: int = 32
    latent: int = 64
    tokens: int = 8192
    dtype: torch.dtype = torch.bfloat16
    variant: str = "hive"
    deterministic: bool = True


SHAPES = {
    "1b-n512-k16": Shape(512, 16),
    "1b-n256-k8": Shape(256, 8),
    "1b-n256-k32": Shape(256, 32),
    "8b-n512-k16": Shape(512, 16, channels=128, out=128),
    "1b-n512-k16-atomic": Shape(512, 16, deterministic=False),
    "1b-n256-k16-full": Shape(256, 16, variant="full"),
    "1b-n512-k16-block": Shape(512, 16, heads=4, channels=512, out=512, variant="block"),
    "1b-n512-k16-fp32": Shape(512, 16, dtype=torch.float32),
}


def launches(shape: Shape, *, capability: int) -> list[resources.Launch]:
    """Forward, then backward, of the autograd function on tensors without storage."""

    def run() -> None:
        values_shape = {
            "hive": (shape.num_keys**2, shape.latent),
            "full": (shape.heads, shape.num_keys**2, shape.out),
            "block": (shape.num_keys**2, shape.heads * shape.out),
        }[shape.variant]
        keys_shape = (shape.heads, shape.num_keys, shape.channels // 2)
        sizes = [(shape.tokens, shape.heads, shape.channels), keys_shape, keys_shape, values_shape]
        if shape.variant == "hive":
            sizes.append((shape.heads, shape.latent, shape.out))
        query, row_keys, col_keys, values, *rest = (
            torch.empty(size, dtype=shape.dtype, device="meta", requires_grad=True) for size in sizes
        )
        out = function.head_wise_memory(
            query, row_keys, col_keys, values, rest[0] if rest else None,
            topk=shape.topk, variant=shape.variant, deterministic=shape.deterministic,
        )  # fmt: skip
        out.backward(torch.empty_like(out))

    return resources.compiled_launches(run, capability=capability)
