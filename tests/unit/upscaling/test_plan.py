"""The plan survives its file, names every difference, and refuses blocks that make no sense."""

import dataclasses
import json

import pytest

from megatron_midus.config import MemoryConfig
from megatron_midus.upscaling import PLAN_FILE, Block, UpscalePlan, make_plan

PLAN = dataclasses.replace(
    make_plan("interleave", num_layers=5, num_blocks=2, memory=MemoryConfig(memory_query_norm="rms")),
    source_hash="ab" * 32,
    source_name="base",
    seed=7,
)


@pytest.mark.parametrize("policy", ["none", "interleave", "llama_pro", "solar", "stack", "average"])
def test_round_trip(tmp_path, policy):
    blocks = {} if policy == "none" else {"num_blocks": 3}
    plan = make_plan(policy, num_layers=7, memory=MemoryConfig(memory_variant="full"), **blocks)
    plan.save(tmp_path)
    assert UpscalePlan.load(tmp_path) == plan


def test_everything_is_stored(tmp_path):
    PLAN.save(tmp_path)
    assert UpscalePlan.load(tmp_path) == PLAN
    assert UpscalePlan.load(tmp_path).notes and UpscalePlan.load(tmp_path).difference(PLAN) is None


def other_memory(**changes):
    return dataclasses.replace(PLAN, memory=dataclasses.replace(PLAN.memory, **changes))


DIFFERENCES = [
    (make_plan("none", num_layers=4), "base layers: 5 against 4"),
    (make_plan("none", num_layers=5), "blocks: 7 against 5"),
    (make_plan("llama_pro", num_layers=5, num_blocks=2), r"block 3: memory\(2\) against copy\(2, zero_output\)"),
    (make_plan("average", num_layers=5, num_blocks=2), r"block 2: keep\(2\) against blend\(1, 2\)"),
    (other_memory(memory_num_keys=32), "memory_num_keys: 64 against 32"),
    (other_memory(memory_query_norm="none"), "memory_query_norm: rms against none"),
    (dataclasses.replace(PLAN, source_hash="cd" * 32), "source checkpoint: abababababab against cdcdcdcdcdcd"),
]


@pytest.mark.parametrize("other, message", DIFFERENCES)
def test_difference_names_the_first(other, message):
    import re

    assert re.fullmatch(message, PLAN.difference(other))


@pytest.mark.parametrize("change", [{"source_hash": ""}, {"source_name": "x"}, {"seed": 0}, {"notes": ()}])
def test_what_is_no_difference(change):
    assert PLAN.difference(dataclasses.replace(PLAN, **change)) is None


@pytest.mark.parametrize(
    "block, message",
    [
        (Block("keep", (5,), "exact", False), "source layer 5 does not exist"),
        (Block("keep", (-1,), "exact", False), "source layer -1"),
        (Block("keep", (0, 1), "exact", False), "has 2 sources, needs 1"),
        (Block("blend", (0,), "mean", True), "has 1 sources, needs 2"),
        (Block("keep", (0,), "zero_output", False), "init 'zero_output' does not fit keep"),
        (Block("twist", (0,), "exact", True), "unknown kind 'twist'"),
        (Block.memory(0), "no memory settings"),
    ],
)
def test_blocks_that_make_no_sense(block, message):
    with pytest.raises(ValueError, match=message):
        UpscalePlan(num_base_layers=5, blocks=(block,))


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "does not exist"),
        ("{", "not valid JSON"),
        ("{}", "schema version None"),
        (json.dumps({**PLAN.to_dict(), "schema_version": 99}), "schema version 99"),
        (json.dumps({**PLAN.to_dict(), "colour": "red"}), "expected entries"),
        (json.dumps({"schema_version": 1}), "expected entries"),
        (json.dumps({**PLAN.to_dict(), "blocks": [{"kind": "keep"}]}), "expected entries"),
        (json.dumps({**PLAN.to_dict(), "memory": {"memory_topk": 65}}), "memory_topk=65"),
    ],
)
def test_broken_files(tmp_path, content, message):
    if content is not None:
        (tmp_path / PLAN_FILE).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        UpscalePlan.load(tmp_path)
    assert PLAN_FILE in str(caught.value)


def test_views():
    assert PLAN.num_layers == 7 and PLAN.memory_indices == PLAN.inserted_indices == (3, 6)
    assert PLAN.block_types.count("memory") == 2 and PLAN.block_types[3] == "memory"
    assert [block.describe() for block in PLAN.blocks[2:4]] == ["keep(2)", "memory(2)"]
