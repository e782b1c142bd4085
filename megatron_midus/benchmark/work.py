"""Operations and bytes that a function cannot do without, whoever computes it: what the roofline share is made of.

Bytes: every operand and result once, of a value bank the rows that can be read at most; nothing that a better program
would keep in a cache. Operations: multiplications and additions of what the formulas of the head-wise memory need;
comparisons of the selection are not counted, so the share of a memory is low wherever the selection is what takes time.
"""

from __future__ import annotations

from typing import NamedTuple

from megatron_midus.benchmark.shapes import Shape

SELECTION_BYTES = 8  # an int32 index and an fp32 weight


class Work(NamedTuple):
    """Of one phase."""

    flops: float
    num_bytes: float


def work_of(function: str, shape: Shape, tokens: int) -> list[Work]:
    """``[forward, backward]``; backward with the gradients of all operands."""
    size = shape.torch_dtype.itemsize
    if function == "ffn":
        return _ffn_work(shape, tokens, size)
    if function == "transformer":
        attention = _attention_work(shape, tokens, size)
        return [Work(*map(sum, zip(*phase))) for phase in zip(attention, _ffn_work(shape, tokens, size))]
    return _memory_work(function, shape, tokens, size)


def _ffn_work(shape: Shape, tokens: int, size: int) -> list[Work]:
    weights = 3 * shape.hidden_size * shape.ffn_hidden_size
    activations, inner = tokens * shape.hidden_size, 2 * tokens * shape.ffn_hidden_size  # inner: gate and up
    return [
        Work(2.0 * tokens * weights, size * (weights + 2 * activations + inner)),
        Work(4.0 * tokens * weights, size * (2 * weights + 3 * activations + inner)),
    ]


def _attention_work(shape: Shape, tokens: int, size: int) -> list[Work]:
    """Projections, and scores and sums over half of each sequence's square."""
    inner = shape.num_heads * shape.kv_channels
    qkv = inner + 2 * shape.num_groups * shape.kv_channels
    weights = shape.hidden_size * (qkv + inner)
    length = shape.seq_length if tokens % shape.seq_length == 0 else tokens
    mixing = 2.0 * tokens * length * inner
    activations = tokens * (2 * shape.hidden_size + qkv + inner)
    return [
        Work(2.0 * tokens * weights + mixing, size * (weights + activations)),
        Work(4.0 * tokens * weights + 2 * mixing, size * (2 * weights + 2 * activations)),
    ]


def bytes_held(function: str, shape: Shape, tokens: int) -> int:
    """Bytes that a forward and backward pass cannot do without at its end: output, gradients of all operands, and what
    the backward pass cannot compute again for less than it costs: of a memory the selection, of an FFN gate and up."""
    size, width = shape.torch_dtype.itemsize, shape.hidden_size
    activation = 2 * tokens * width  # output, and gradient of the input
    ffn = 3 * width * shape.ffn_hidden_size + 2 * tokens * shape.ffn_hidden_size
    if function == "ffn":
        return size * (activation + ffn)
    inner, keys = shape.num_heads * shape.kv_channels, 2 * shape.num_groups * shape.kv_channels
    if function == "transformer":
        return size * (activation + ffn + width * (2 * inner + keys) + tokens * (2 * inner + keys + width))
    hive = function == "hive"
    bank = shape.num_slots * (shape.latent_size if hive else width)
    proj = shape.num_heads * shape.latent_size * shape.out_channels if hive else 0
    gradients = tokens * inner + shape.num_heads * shape.num_keys * shape.kv_channels + bank + proj
    return size * (tokens * width + gradients) + SELECTION_BYTES * tokens * shape.num_heads * shape.topk


def _memory_work(function: str, shape: Shape, tokens: int, size: int) -> list[Work]:
    lookups = tokens * shape.num_heads
    entries = lookups * shape.topk
    width = shape.latent_size if function == "hive" else shape.hidden_size
    query = lookups * shape.kv_channels
    keys = shape.num_heads * shape.num_keys * shape.kv_channels
    proj = shape.num_heads * shape.latent_size * shape.out_channels if function == "hive" else 0
    projection = 2.0 * lookups * shape.latent_size * shape.out_channels if function == "hive" else 0.0
    out = tokens * shape.hidden_size
    bank_read = min(shape.num_slots, entries) * width
    scoring = 2.0 * lookups * shape.num_keys * shape.kv_channels
    gathering = 2.0 * entries * width
    read = size * (query + keys + bank_read + proj + out) + SELECTION_BYTES * entries
    written = size * (query + keys + shape.num_slots * width + proj)
    keys_and_query = 2 * 2.0 * entries * shape.kv_channels
    return [
        Work(scoring + gathering + projection, read),
        Work(2 * gathering + 2 * projection + keys_and_query, read + written),
    ]
