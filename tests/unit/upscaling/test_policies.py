"""Every policy gives the blocks that its paper names, says what it rounds, and refuses what it cannot do."""

import typing

import pytest

from megatron_midus.config import MemoryConfig
from megatron_midus.config.upscale import PolicyName
from megatron_midus.upscaling import make_plan
from megatron_midus.upscaling.policies import POLICIES, POLICY_ALIASES, insertion_points

MEMORY = MemoryConfig()


def shorthand(plan):
    """``["0", "1", "m1", …]``: kept layers bare (* trained), c copy, z zero_output copy, b, t, l blends, m memory."""
    letters = {("keep", "exact"): "", ("copy", "exact"): "c", ("copy", "zero_output"): "z", ("blend", "mean"): "b", ("blend", "transport"): "t", ("blend", "transport_literal"): "l", ("memory", "memory"): "m"}  # fmt: skip
    return [
        "*" * (block.kind == "keep" and block.inserted)
        + letters[block.kind, block.init]
        + "-".join(map(str, block.source))
        for block in plan.blocks
    ]


ROWS = [
    ("none", {"num_layers": 3}, "0 1 2", False),
    ("interleave", {"num_layers": 4, "num_blocks": 2}, "0 1 m1 2 3 m3", False),
    ("interleave", {"num_layers": 5, "num_blocks": 2}, "0 1 2 m2 3 4 m4", True),
    ("interleave", {"num_layers": 7, "num_blocks": 3}, "0 1 m1 2 3 4 m4 5 6 m6", True),
    ("interleave", {"num_layers": 3, "num_blocks": 3}, "0 m0 1 m1 2 m2", False),
    ("interleave", {"num_layers": 1, "num_blocks": 1}, "0 m0", False),
    ("interleave", {"num_layers": 4, "insert_after": [2, 0]}, "0 m0 1 2 m2 3", False),
    ("llama_pro", {"num_layers": 4, "num_blocks": 2}, "0 1 z1 2 3 z3", False),
    ("llama_pro", {"num_layers": 5, "num_blocks": 3}, "0 1 z1 2 z2 3 4 z4", True),
    ("llama_pro", {"num_layers": 3, "insert_after": [1]}, "0 1 z1 2", False),
    ("solar", {"num_layers": 4, "num_blocks": 2}, "0 1 2 c1 c2 3", False),
    ("solar", {"num_layers": 5, "num_blocks": 2}, "0 1 2 3 c2 c3 4", True),
    ("solar", {"num_layers": 3, "num_blocks": 3}, "0 1 2 c0 c1 c2", False),
    ("stack", {"num_layers": 3, "num_blocks": 3}, "0 1 2 c0 c1 c2", False),
    ("stack", {"num_layers": 3, "num_blocks": 6}, "0 1 2 c0 c1 c2 c0 c1 c2", False),
    ("stack", {"num_layers": 3, "num_blocks": 4}, "0 1 2 c0 c1 c2 c0", True),
    ("average", {"num_layers": 5, "num_blocks": 2}, "0 1 b1-2 2 3 b3-4 4", False),
    ("average", {"num_layers": 4, "num_blocks": 2}, "0 1 b1-2 2 b2-3 3", True),
    ("average", {"num_layers": 4, "num_blocks": 3}, "0 b0-1 1 b1-2 2 b2-3 3", False),
    ("average", {"num_layers": 3, "insert_after": [0]}, "0 b0-1 1 2", False),
    ("opt_deus", {"num_layers": 5, "num_blocks": 2}, "0 1 t1-2 2 3 t3-4 4", False),
    ("opt_deus_literal", {"num_layers": 3, "insert_after": [1]}, "0 1 l1-2 2", False),
    ("control", {"num_layers": 4, "num_blocks": 2}, "0 *1 2 *3", False),
    ("control", {"num_layers": 5, "num_blocks": 2}, "0 1 *2 3 *4", True),
    ("control", {"num_layers": 3, "insert_after": [0]}, "*0 1 2", False),
]


@pytest.mark.parametrize("policy, arguments, blocks, rounded", ROWS)
def test_blocks_and_rounding(policy, arguments, blocks, rounded):
    plan = make_plan(policy, memory=MEMORY, **arguments)
    assert shorthand(plan) == blocks.split()
    assert bool(plan.notes) == rounded
    assert plan.policy == policy and plan.num_base_layers == arguments["num_layers"]


def test_solar_of_the_paper():
    """32 layers, 8 dropped from each copy: [0, 24) and [8, 32), 48 layers (arXiv 2312.15166)."""
    plan = make_plan("solar", num_layers=32, num_blocks=16)
    assert [block.source[0] for block in plan.blocks] == [*range(24), *range(8, 32)]
    # The base's own layers are those seen first.
    assert [i for i, block in enumerate(plan.blocks) if not block.inserted] == [*range(24), *range(40, 48)]


def test_midus_of_the_paper():
    """Llama-3.2-1B: 8 Memory blocks, one after every second of 16 layers."""
    plan = make_plan("interleave", num_layers=16, num_blocks=8, memory=MEMORY)
    assert plan.memory_indices == tuple(range(2, 24, 3))
    assert all(plan.blocks[i].source == (2 * (i // 3) + 1,) for i in plan.memory_indices)


@pytest.mark.parametrize("num_layers", [1, 2, 5, 7, 16, 61])
def test_insertion_points_of_any_count(num_layers):
    for num_blocks in range(1, num_layers + 1):
        points, note = insertion_points(num_layers=num_layers, num_blocks=num_blocks)
        sizes = [after - before for before, after in zip((-1, *points), points)]
        assert len(points) == num_blocks and points[-1] == num_layers - 1
        assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
        assert (note is None) == (num_layers % num_blocks == 0)
        if note:
            assert str(num_layers) in note and str(num_blocks) in note and all(str(p) in note for p in points)


IDENTITY = {
    "none": True,
    "interleave": True,
    "llama_pro": True,
    "solar": False,
    "stack": False,
    "average": False,
    "opt_deus": True,
    "opt_deus_literal": True,
    "control": True,
}


@pytest.mark.parametrize("policy, promised", IDENTITY.items())
def test_which_policies_promise_identity(policy, promised):
    plan = make_plan(policy, num_layers=4, memory=MEMORY, **({} if policy == "none" else {"num_blocks": 2}))
    assert plan.is_identity is promised


WRONG = [
    ("interleave", {"num_layers": 4, "num_blocks": 5}, "num_blocks=5"),
    ("interleave", {"num_layers": 4, "num_blocks": 0}, "num_blocks=0"),
    ("interleave", {"num_layers": 4, "num_blocks": -1}, "num_blocks=-1"),
    ("interleave", {"num_layers": 4}, r"give --num-blocks \(1 to 4\)"),
    (
        "interleave",
        {"num_layers": 4, "num_blocks": 1, "insert_after": [1]},
        "both say how many blocks are inserted; give one",
    ),
    ("interleave", {"num_layers": 4, "insert_after": [4]}, "layer 4"),
    ("interleave", {"num_layers": 4, "insert_after": [-1]}, "layer -1"),
    ("interleave", {"num_layers": 4, "insert_after": [1, 1]}, "more than once"),
    ("interleave", {"num_layers": 4, "num_blocks": 2, "memory": None}, "memory settings"),
    ("llama_pro", {"num_layers": 4, "num_blocks": 9}, "num_blocks=9"),
    ("solar", {"num_layers": 4, "num_blocks": 5}, "num_blocks=5"),
    ("solar", {"num_layers": 4, "insert_after": [1]}, "places its blocks itself"),
    ("stack", {"num_layers": 4, "num_blocks": 0}, "at least 1"),
    ("stack", {"num_layers": 4}, "give --num-blocks"),
    ("average", {"num_layers": 4}, r"give --num-blocks \(1 to 3\), or name .* \(0 to 2\)"),
    ("average", {"num_layers": 1, "num_blocks": 1}, "two neighbouring layers"),
    ("average", {"num_layers": 4, "num_blocks": 4}, "num_blocks=4"),
    ("average", {"num_layers": 4, "insert_after": [3]}, "no next layer"),
    ("opt_deus", {"num_layers": 4, "insert_after": [3]}, "opt_deus cannot insert after layer 3"),
    ("control", {"num_layers": 4, "num_blocks": 5}, "num_blocks=5"),
    ("control", {"num_layers": 4, "insert_after": [4]}, "layer 4"),
    ("none", {"num_layers": 4, "num_blocks": 1}, "inserts nothing"),
    ("mystery", {"num_layers": 4}, "unknown policy 'mystery'"),
]


@pytest.mark.parametrize("policy, arguments, message", WRONG)
def test_refusals_name_the_value(policy, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_plan(policy, **{"memory": MEMORY, **arguments})


def test_the_flag_knows_every_policy():
    assert set(typing.get_args(PolicyName)) == {*POLICIES, *POLICY_ALIASES}
