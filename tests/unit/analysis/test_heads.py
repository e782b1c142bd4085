"""Zeroing a head against deleting it by hand from the weights, for every variant of the memory."""

import copy

import pytest
import torch
from naive import BLOCKS, HEADS, VARIANTS, NaivePass, losses, make_windows, midus

from megatron_midus.analysis.heads import measure_heads, num_head_passes
from megatron_midus.analysis.passes import memories, neighbour


def without_memory_heads(model, windows, block, heads):
    """The loss of a copy whose weights lack these heads; ``block`` sums its heads into one, so it is done in loops."""
    if model.config.memory_variant == "block":
        return NaivePass(model, silent={(block, head) for head in heads}).losses(windows)
    model = copy.deepcopy(model)
    memory = memories(model)[block]
    own = memory.head_proj if memory.head_proj is not None else memory.value_bank
    with torch.no_grad():
        own[list(heads)] = 0
    return losses(model, windows)


@pytest.mark.parametrize("kind", VARIANTS)
def test_against_deletion_by_hand(kind):
    model, windows = midus(kind), make_windows()
    progress = []
    found = measure_heads(model, windows, batch_size=4, progress=progress.append)
    own, tokens = losses(model, windows), windows.num_tokens
    assert sum(progress) == num_head_passes(model) * len(windows)

    def rise(changed):
        # fp32 logits against an fp64 softmax, differences of losses of about 10 nats
        return pytest.approx(((changed - own).sum() / tokens).item(), abs=2e-5)

    for block in (1, 3):
        for head in range(HEADS):
            assert found.memory[block][head].value == rise(without_memory_heads(model, windows, block, [head]))
        assert found.blocks[block].value == rise(without_memory_heads(model, windows, block, range(HEADS)))
        for head in range(HEADS):
            changed = copy.deepcopy(model)
            with torch.no_grad():
                changed.model.layers[block - 1].self_attn.o_proj.weight[:, head * 8 : (head + 1) * 8] = 0
            assert found.attention[block][head].value == rise(losses(changed, windows))
    assert found.neighbours == {1: 0, 3: 2}
    off = NaivePass(model, silent={(b, h) for b in (1, 3) for h in range(HEADS)})
    assert found.all_memories.value == rise(off.losses(windows))
    values = [e.value for b in (1, 3) for e in found.memory[b]]
    assert min(map(abs, values)) > 1e-4 and len(set(values)) == len(values), "heads that do nothing prove nothing"


def test_neighbours():
    model = midus()
    kinds = model.config.block_types
    try:
        model.config.block_types = ["memory", "transformer", "memory", "memory"]
        assert [neighbour(model, i) for i in (0, 2, 3)] == [1, 1, 1]
        model.config.block_types = ["memory"]
        assert neighbour(model, 0) is None
    finally:
        model.config.block_types = kinds
    assert kinds == BLOCKS
