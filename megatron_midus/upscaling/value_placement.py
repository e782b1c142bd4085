"""Where the value bank of a Memory block lies under tensor parallelism, chosen by the bytes that each place costs."""

from __future__ import annotations

from typing import Literal

from megatron_midus.config import MemoryConfig
from megatron_midus.errors import UserError

Placement = Literal["replicated", "latent"]


def replicated_bytes_per_step(memory: MemoryConfig, *, hidden_size: int, ranks: int) -> float:
    """Bytes that a rank receives a step and block to sum the gradient of a bank that every rank holds.

    A ring all-reduce of fp32 moves every element twice: ``8 f N*N L``, ``f = (p - 1) / p``.
    """
    return 8 * _share(ranks) * memory.num_slots * value_columns(memory, hidden_size)


def latent_bytes_per_microbatch(
    memory: MemoryConfig, *, hidden_size: int, num_attention_heads: int, tokens: int, ranks: int, itemsize: int
) -> float:
    """Bytes that a rank receives a micro-batch and block, forward and backward, when the bank is split on its columns.

    Indices, weights and the gradient of the weights take 12 bytes a slot that is read, of all heads; the result of
    each head and its gradient ``2 L/p`` elements. Variant block leaves by the exchange that hive's output needs in any
    case, so its result costs nothing here.

    Args:
        tokens: of a micro-batch, the whole sequence.
        itemsize: bytes of an activation.
    """
    heads = memory.num_memory_heads(num_attention_heads)
    selection = 12 * tokens * heads * memory.memory_topk
    result = 0 if memory.memory_variant == "block" else 2 * itemsize * tokens * heads * memory.memory_latent_size
    return _share(ranks) * (selection + result / ranks)


def value_columns(memory: MemoryConfig, hidden_size: int) -> int:
    """Columns of a bank that the heads share: ``d_l``, for variant block the hidden size."""
    return hidden_size if memory.memory_variant == "block" else memory.memory_latent_size


def _share(ranks: int) -> float:
    return (ranks - 1) / ranks


def resolve_value_placement(
    wanted: Literal["replicated", "latent", "auto"],
    memory: MemoryConfig | None,
    *,
    hidden_size: int,
    num_attention_heads: int,
    tensor_model_parallel_size: int,
    tokens_per_microbatch: int,
    num_microbatches: int,
    itemsize: int,
) -> tuple[Placement, str]:
    """Where the values go, and why.

    Args:
        wanted: ``auto`` takes the place that moves fewer bytes a step.
        memory: ``None`` for a model without Memory blocks.
        tokens_per_microbatch: sequences times their length.
        num_microbatches: of one replica in a step.
        itemsize: bytes of an activation.

    Raises:
        ValueError: ``latent`` where the bank cannot be split on its columns.
    """
    ranks = tensor_model_parallel_size
    reason = _only_replicated(memory, hidden_size, ranks)
    if reason is not None:
        if wanted == "latent" and memory is not None and ranks > 1:
            raise UserError(f"memory_value_placement=latent: {reason}; choose replicated or auto")
        return "replicated", reason
    if wanted != "auto":
        return wanted, "as asked for"
    assert memory is not None
    replicated = replicated_bytes_per_step(memory, hidden_size=hidden_size, ranks=ranks)
    latent = num_microbatches * latent_bytes_per_microbatch(
        memory,
        hidden_size=hidden_size,
        num_attention_heads=num_attention_heads,
        tokens=tokens_per_microbatch,
        ranks=ranks,
        itemsize=itemsize,
    )
    return (
        "latent" if latent < replicated else "replicated",
        f"a step and block, a rank receives {latent / 2**20:.3g} MiB ({num_microbatches} micro-batches) with latent and "
        f"{replicated / 2**20:.3g} MiB with replicated",
    )


def _only_replicated(memory: MemoryConfig | None, hidden_size: int, ranks: int) -> str | None:
    """Why there is nothing to choose; ``None`` when there is."""
    if memory is None:
        return "the model has no Memory blocks"
    if ranks == 1:
        return "one tensor-parallel rank holds everything"
    if memory.memory_variant == "full":
        return "variant full has a bank per head, split by heads as it is"
    columns = value_columns(memory, hidden_size)
    if columns % ranks:
        return f"memory_latent_size={columns} is not divisible by tensor_model_parallel_size={ranks}"
    return None
