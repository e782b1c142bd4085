"""The split of blocks over pipeline stages against brute force, its costs, and layout strings."""

from __future__ import annotations

import itertools
import random
import re

import pytest

from megatron_midus.config import MemoryConfig, ModelConfig
from megatron_midus.upscaling import make_plan
from megatron_midus.upscaling.pipeline_layout import (
    balanced_layout,
    estimate_costs,
    format_layout,
    parse_layout,
    partition_blocks,
)

LLAMA_1B = {
    "hidden_size": 2048,
    "ffn_hidden_size": 8192,
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "kv_channels": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 4096,
}
MEMORY = MemoryConfig(memory_num_keys=512, memory_topk=16, memory_latent_size=64)


def part_costs(costs: list[float], sizes: list[int], embedding: float, logits: float) -> list[float]:
    ends = [0, *itertools.accumulate(sizes)]
    found = [sum(costs[a:b]) for a, b in zip(ends, ends[1:])]
    found[0] += embedding
    found[-1] += logits
    return found


@pytest.mark.parametrize("seed", range(12))
def test_no_split_is_better(seed: int) -> None:
    draw = random.Random(seed)
    costs = [draw.choice([1.0, 0.3, 2.5]) for _ in range(draw.randint(4, 11))]
    num_parts = draw.randint(1, 4)
    embedding, logits = draw.random(), draw.choice([0.0, 1.7, 9.0])
    sizes = partition_blocks(costs, num_parts, embedding_cost=embedding, logits_cost=logits)
    assert sum(sizes) == len(costs) and len(sizes) == num_parts and min([*sizes[:-1], 1]) > 0

    def rank(candidate: list[int]) -> tuple[float, float]:
        parts = part_costs(costs, candidate, embedding, logits)
        return round(max(parts), 9), round(sum(p * p for p in parts), 9)

    every = [
        list(candidate)
        for candidate in itertools.product(range(len(costs) + 1), repeat=num_parts)
        if sum(candidate) == len(costs) and 0 not in candidate[:-1]
    ]
    assert rank(sizes) == min(map(rank, every))


def test_equal_blocks_are_split_evenly_and_costly_logits_stand_alone() -> None:
    assert partition_blocks([1.0] * 12, 4) == [3, 3, 3, 3]
    assert partition_blocks([1.0] * 6, 3, logits_cost=9.0) == [3, 3, 0]
    assert partition_blocks([1.0], 1, logits_cost=9.0) == [1]


def test_a_deep_model_on_many_stages() -> None:
    """A search that tried every split would not end."""
    sizes = partition_blocks([1.0, 0.3] * 64, 32)
    assert max(part_costs([1.0, 0.3] * 64, sizes, 0, 0)) == pytest.approx(2.6)


def test_splits_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="2 blocks cannot be split into 4 parts; choose 1 to 3"):
        partition_blocks([1.0, 1.0], 4)
    with pytest.raises(ValueError, match="must be finite and not negative"):
        partition_blocks([1.0, float("nan")], 2)


def test_costs_of_an_upscaled_llama() -> None:
    plan = make_plan("interleave", num_layers=16, num_blocks=8, memory=MEMORY)
    model = ModelConfig(num_layers=24, **LLAMA_1B)
    costs = estimate_costs(model, plan, 4096)
    memory = [costs.blocks[i] for i in plan.memory_indices]
    others = [cost for i, cost in enumerate(costs.blocks) if i not in plan.memory_indices]
    assert len(set(memory)) == len(set(others)) == 1
    assert 0.1 * others[0] < memory[0] < 0.9 * others[0]
    assert costs.embedding < 0.01 * others[0] and costs.logits > others[0]
    frozen = estimate_costs(model, plan, 4096, train="inserted")
    first = plan.inserted_indices[0]
    # No backward before the first inserted block, none of the weights of frozen ones after it.
    assert frozen.blocks[0] == pytest.approx(costs.blocks[0] / 3)
    assert costs.blocks[0] / 3 < frozen.blocks[first + 1] < costs.blocks[0]
    assert frozen.blocks[first] == costs.blocks[first] and frozen.logits == pytest.approx(costs.logits * 2 / 3)


@pytest.mark.parametrize("parts", [2, 3, 4, 8])
def test_a_balanced_layout_is_no_slower_than_an_even_one(parts: int) -> None:
    plan = make_plan("interleave", num_layers=16, num_blocks=8, memory=MEMORY)
    model = ModelConfig(num_layers=24, **LLAMA_1B)
    costs = estimate_costs(model, plan, 4096)

    def slowest(sizes: list[int]) -> float:
        return max(part_costs(list(costs.blocks), sizes, costs.embedding, costs.logits))

    layout = balanced_layout(model, plan, parts, seq_length=4096)
    sizes = parse_layout(layout, num_layers=24, num_stages=parts)
    assert slowest(sizes) < slowest([24 // parts] * parts)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("Ett|ttttL", [2, 4]),
        ("E t*3, | t*3 L", [3, 3]),
        ("Et|(tt|)*2tL", [1, 2, 2, 1]),
        ("Etttttt|L", [6, 0]),
    ],
)
def test_layout_strings(text: str, sizes: list[int]) -> None:
    assert parse_layout(text, num_layers=6, num_stages=2) == sizes
    assert parse_layout(format_layout(sizes), num_layers=6, num_stages=2) == sizes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ttt|tttL", "begins with E"),
        ("Ettt|ttt", "ends with L"),
        ("Ettt|ttmL", "reads 'Ettt|ttmL'"),
        ("Ettt|ttL", "places 5 blocks and the model has 6"),
        ("Ett|tt|ttL", "has 3 parts, which is no multiple of pipeline_model_parallel_size=2"),
        ("Ett||tt|ttL", "leaves part 1 without a block"),
    ],
)
def test_layout_strings_that_fit_nothing(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_layout(text, num_layers=6, num_stages=2)
