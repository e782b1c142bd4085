"""How much the loss rises when one head is zeroed: memory heads, and attention heads of the Transformer block beside."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_midus.analysis.passes import (
    Progress,
    Variant,
    measure,
    memories,
    memories_off,
    neighbour,
    zeroed_attention_head,
    zeroed_memory_heads,
)
from megatron_midus.analysis.windows import Estimate, Windows, loss_change


@dataclasses.dataclass(frozen=True)
class HeadImportance:
    """Rises of the loss, nats per token; positive = the head helps on this text.

    Attributes:
        memory: by Memory block, one per head.
        attention: by Memory block, one per attention head of its neighbour; empty without a Transformer block.
        neighbours: Transformer block beside each Memory block.
        blocks: all heads of a Memory block at once.
        all_memories: all Memory blocks at once.
    """

    memory: dict[int, list[Estimate]]
    attention: dict[int, list[Estimate]]
    neighbours: dict[int, int | None]
    blocks: dict[int, Estimate]
    all_memories: Estimate


def measure_heads(model: Any, windows: Windows, *, batch_size: int, progress: Progress | None = None) -> HeadImportance:
    """Zeroes every head in turn. A memory head gets weights of zero; an attention head vanishes before ``o_proj``."""
    found = memories(model)
    neighbours = {block: neighbour(model, block) for block in found}
    own, changed = measure(model, windows, _variants(model), batch_size=batch_size, progress=progress)
    rises = {key: loss_change(nats, own, windows.inputs.shape[1]) for key, nats in changed.items()}
    heads = model.config.num_attention_heads
    return HeadImportance(
        memory={b: [rises["memory", b, h] for h in range(model.config.num_lookup_heads())] for b in found},
        attention={
            b: [] if beside is None else [rises["attention", beside, h] for h in range(heads)]
            for b, beside in neighbours.items()
        },
        neighbours=neighbours,
        blocks={b: rises["block", b] for b in found},
        all_memories=rises["all"],
    )


def num_head_passes(model: Any) -> int:
    """Passes over the text that ``measure_heads`` makes, its own one included."""
    return 1 + len(_variants(model))


def _variants(model: Any) -> dict[Any, Variant]:
    found, config = memories(model), model.config
    all_heads = range(config.num_lookup_heads())
    variants: dict[Any, Variant] = {}
    for block, memory in found.items():
        for head in all_heads:
            variants["memory", block, head] = Variant(
                block, lambda _, memory=memory, head=head: zeroed_memory_heads(memory, [head])
            )
        variants["block", block] = Variant(block, lambda _, memory=memory: memories_off([memory]))
        beside = neighbour(model, block)
        for head in range(config.num_attention_heads) if beside is not None else ():
            layer = model.model.layers[beside]
            variants["attention", beside, head] = Variant(
                beside, lambda _, layer=layer, head=head: zeroed_attention_head(layer, head, config.head_dim)
            )
    variants["all"] = Variant(min(found), lambda _: memories_off(found.values()))
    return variants
