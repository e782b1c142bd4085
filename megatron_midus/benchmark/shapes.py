"""The table of shapes that are measured, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from megatron_midus.errors import UserError

# Settings of Memory blocks beside their sizes, by the name of a contender.
MEMORY_SETTINGS: dict[str, dict[str, Any]] = {"token": {"memory_query": "token", "memory_attention": "none"}}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Shape:
    """A decoder, its Memory blocks, and how much of it is looked at.

    Attributes:
        tokens: of one look-up (``hml``); a sequence has ``seq_length``.
        ffn_hidden_size: of the SwiGLU FFN that a Memory block replaces.
        num_keys, topk, latent_size: of the memory: n, k, d_l.
        num_layers, num_blocks: layers of the base, and blocks inserted into it (``train``).
    """

    name: str
    tokens: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_groups: int
    kv_channels: int
    num_keys: int
    topk: int
    latent_size: int
    dtype: str
    num_layers: int = 8
    num_blocks: int = 4
    seq_length: int = 512
    vocab_size: int = 4096

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.type == "int" and getattr(self, field.name) < 1:
                raise UserError(f"shape {self.name}: {field.name}={getattr(self, field.name)} must be at least 1")
        if self.dtype not in DTYPES:
            raise UserError(f"shape {self.name}: dtype={self.dtype!r} is not known; choose one of {sorted(DTYPES)}")
        if self.hidden_size % self.num_heads or self.kv_channels % 2 or self.topk > self.num_keys:
            raise UserError(
                f"shape {self.name}: hidden_size={self.hidden_size} must be a multiple of num_heads={self.num_heads}, "
                f"kv_channels={self.kv_channels} even, and topk={self.topk} at most num_keys={self.num_keys}"
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def out_channels(self) -> int:
        """d_o, channels that one head writes."""
        return self.hidden_size // self.num_heads

    @property
    def num_slots(self) -> int:
        return self.num_keys**2

    def describe(self) -> str:
        return (
            f"T={self.tokens} d={self.hidden_size} H={self.num_heads} d_h={self.kv_channels} n={self.num_keys} "
            f"k={self.topk} d_l={self.latent_size}, FFN {self.ffn_hidden_size}, {self.dtype}"
        )


def _table(*rows: Shape) -> dict[str, Shape]:
    return {row.name: row for row in rows}


#                 name           T     d    FFN    H   G  d_h   n   k  d_l  dtype
SHAPES = _table(
    Shape("paper-1b", 8192, 2048, 8192, 32, 8, 64, 512, 16, 64, "bfloat16", 16, 8, 4096, 128256),
    Shape("paper-1b-n256", 8192, 2048, 8192, 32, 8, 64, 256, 16, 64, "bfloat16", 16, 8, 4096, 128256),
    Shape("8b", 8192, 4096, 14336, 32, 8, 128, 512, 16, 128, "bfloat16", 32, 8, 4096, 128256),
    Shape("cpu-small", 512, 256, 1024, 4, 4, 64, 64, 8, 32, "float32", 4, 2, 256, 1024),
    Shape("cpu-h8", 2048, 512, 2048, 8, 8, 64, 256, 16, 64, "float32"),
    Shape("cpu-h32", 2048, 2048, 8192, 32, 8, 64, 256, 16, 64, "float32"),
    Shape("cpu-h32-n64", 2048, 2048, 8192, 32, 8, 64, 64, 8, 64, "float32"),
    Shape("train-cpu", 512, 512, 2048, 8, 8, 64, 64, 8, 64, "float32", 8, 4, 512, 4096),
    Shape("tiny-base", 4096, 128, 384, 4, 2, 32, 64, 16, 32, "float32", 8, 4, 512, 2048),  # examples/tiny_base
    Shape("tiny", 33, 24, 40, 3, 3, 10, 11, 3, 5, "float32", 2, 1, 12, 37),
)


def find_shapes(names: Sequence[str], *, tokens: int | None = None, dtype: str | None = None) -> list[Shape]:
    """Shapes by name, with another number of tokens or another dtype where given.

    Raises:
        ValueError: a name that is not in the table, a number that cannot be.
    """
    found = []
    for name in names:
        if name not in SHAPES:
            raise UserError(f"shape {name!r} is not known; choose one of {', '.join(SHAPES)}")
        changes = {"tokens": tokens, "dtype": dtype}
        found.append(dataclasses.replace(SHAPES[name], **{k: v for k, v in changes.items() if v is not None}))
    return found
