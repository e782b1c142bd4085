"""Up-scaling a MIDUS model again: old Memory blocks stay as they are, new ones stand where there are none."""

import dataclasses
import json

import pytest
import torch
from random_base import MEMORY, MODEL
from tiny_models import DictSource

from megatron_midus.config import MemoryConfig
from megatron_midus.config.upscale import PolicyConfig
from megatron_midus.upscaling import PLAN_FILE, Block, UpscalePlan, make_plan
from megatron_midus.upscaling.arguments import plan_from_config
from megatron_midus.upscaling.cost import cost_of, flops_per_token, trainable_parameters
from megatron_midus.upscaling.growth import grow, spread_between
from megatron_midus.upscaling.initialize import UpscaledTensors
from megatron_midus.upscaling.tensors import layer_name, model_shapes, split_name

FIRST = make_plan("interleave", num_layers=5, num_blocks=2, memory=MEMORY)  # ttt m tt m
BASE = MODEL.with_layers([0] * FIRST.num_layers)


def kinds(text):
    return ["memory" if letter == "m" else "transformer" for letter in text]


@pytest.mark.parametrize(
    "blocks, number, points",
    [
        ("ttttm" * 4, 4, (1, 6, 11, 16)),  # every fourth, then every second layer
        ("tttmttm", 2, (1, 4)),
        ("tttmttm", 3, (0, 1, 4)),
        ("tttmtttttttt", 1, (11,)),  # the last layers have none yet
        ("tttmtttttttt", 3, (6, 8, 11)),
        ("mtt", 2, (1, 2)),
        ("t" * 16, 3, (4, 10, 15)),  # as interleave spreads them
    ],
)
def test_new_blocks_go_where_none_are(blocks, number, points):
    assert spread_between(kinds(blocks), number) == points


@pytest.mark.parametrize("number, room", [(0, 3), (4, 3)])
def test_room_is_behind_transformer_blocks(number, room):
    with pytest.raises(
        ValueError, match=f"num_blocks={number} does not fit: {room} Transformer blocks .* choose 1 to 3"
    ):
        spread_between(kinds("tttmttm"), number)
    with pytest.raises(ValueError, match="num_blocks=1 does not fit: 0 Transformer blocks .* name places"):
        spread_between(kinds("tmtm"), 1)


def test_blocks_of_the_second_plan():
    plan = grow("interleave", FIRST, memory=MEMORY, insert_after=[3, 5])
    assert [block.describe() for block in plan.blocks] == [
        "keep(0)", "keep(1)", "keep(2)", "memory(3, exact)", "memory(2)", "keep(4)", "keep(5)", "memory(5)",
        "memory(6, exact)",
    ]  # fmt: skip
    assert plan.inserted_indices == plan.added_indices == plan.new_memory_indices == (4, 7)
    assert plan.kept_memory_indices == (3, 8) and plan.memory_indices == (3, 4, 7, 8)
    assert plan.is_identity and plan.base == FIRST
    trained = grow("interleave", FIRST, memory=MEMORY, insert_after=[3, 5], train_earlier_memory=True)
    assert trained.inserted_indices == (3, 4, 7, 8) and trained.added_indices == (4, 7) and trained.is_identity
    # Whether the Memory blocks that the base has stay as they are.
    assert plan.keeps_base("inserted") and not trained.keeps_base("inserted") and not plan.keeps_base("values")
    assert trained.blocks[3].describe() == "memory(3, exact, trained)"


def test_copies_and_controls():
    copies = grow("llama_pro", FIRST, memory=MEMORY, insert_after=[3])
    assert copies.blocks[4] == Block.copy(2, zero_output=True) and copies.added_indices == (4,) and copies.is_identity
    control = grow("control", FIRST, memory=MEMORY, insert_after=[1, 3])
    assert control.inserted_indices == (1, 3) and control.added_indices == () and control.num_layers == 7
    thrice = grow("interleave", copies, memory=MEMORY, num_blocks=1)
    assert thrice.base.base == FIRST and thrice.num_base_layers == 8


def test_the_plan_survives_its_file(tmp_path):
    plan = grow("interleave", FIRST, memory=MEMORY, num_blocks=2)
    plan.save(tmp_path)
    assert UpscalePlan.load(tmp_path) == plan
    stored = json.loads((tmp_path / PLAN_FILE).read_text())
    # Versions that know no plan in a plan refuse it by its number; they read all others.
    assert stored["schema_version"] == 3 and stored["base"]["schema_version"] == 2 and "base" not in stored["base"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"base": None}, r"block 4: memory\(3, exact\) of a base whose block 3 is transformer"),
        ({"num_base_layers": 9}, "the base has 7 blocks in its own plan, and 9 in this"),
        ({"memory": dataclasses.replace(MEMORY, memory_topk=2)}, "memory_topk is 2, and 3 in the base"),
        ({"blocks": (Block.keep(3),)}, r"block 0: keep\(3\) of a base whose block 3 is memory"),
    ],
)
def test_plans_that_contradict_their_base(changes, message):
    plan = grow("interleave", FIRST, memory=MEMORY, num_blocks=2)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(plan, **changes)


def test_every_tensor():
    generator = torch.Generator().manual_seed(4)
    shapes = model_shapes(BASE, FIRST)
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    plan = dataclasses.replace(grow("interleave", FIRST, memory=MEMORY, insert_after=[1, 3]), seed=5)
    made = UpscaledTensors(DictSource(base), BASE, plan)
    new = {name: made.read(name) for name in made.names()}
    assert {name: tuple(tensor.shape) for name, tensor in new.items()} == model_shapes(BASE, plan)
    for name, tensor in new.items():
        index, suffix = split_name(name)
        source = name if index is None else layer_name(plan.blocks[index].source[0], suffix)
        if index is None or plan.blocks[index].is_kept:
            assert torch.equal(tensor, base[source]), name
    # Behind an old Memory block, a new one copies the Transformer block before both.
    assert plan.blocks[5] == Block.memory(2)
    assert torch.equal(new[layer_name(5, "mem_attn.q_proj.weight")], base[layer_name(2, "self_attn.q_proj.weight")])
    assert torch.equal(new[layer_name(5, "memory.attn_proj")], base[layer_name(2, "self_attn.o_proj.weight")])
    assert not new[layer_name(5, "memory.value_bank")].any() and new[layer_name(4, "memory.value_bank")].any()


def test_costs():
    small = grow("interleave", FIRST, memory=MEMORY, num_blocks=1)
    large = grow("interleave", FIRST, memory=MEMORY, num_blocks=1, train_earlier_memory=True)
    ours = trainable_parameters(BASE, small, "inserted")
    assert trainable_parameters(BASE, large, "inserted") == 3 * ours
    assert trainable_parameters(BASE, small, "values") == trainable_parameters(BASE, large, "values")
    gate = dataclasses.replace(MEMORY, memory_domain_gate=True)
    gated = grow(
        "interleave", make_plan("interleave", num_layers=5, num_blocks=2, memory=gate), memory=gate, num_blocks=1
    )
    assert trainable_parameters(BASE, gated, "inserted") == ours  # gates are measured, not trained
    costs = cost_of(BASE, small, seq_length=64, dtype="float32")
    assert costs.added_parameters == ours and costs.base_kv_bytes * 8 == costs.kv_bytes * 7
    assert flops_per_token(BASE, small, 64, train="inserted") < flops_per_token(BASE, large, 64, train="inserted")


def asked(memory=None, base=FIRST, **blocks):
    return plan_from_config(PolicyConfig(**{"num_blocks": 2, **blocks}), memory or {}, BASE, base)


def test_settings_come_from_the_model():
    assert asked().memory == MEMORY == asked({"memory_topk": 3}).memory
    drawn = asked({"memory_key_init": "normal", "memory_query_scale": 2.0})
    assert drawn.memory == dataclasses.replace(MEMORY, memory_key_init="normal", memory_query_scale=2.0)
    assert drawn.base.memory == MEMORY
    assert asked(train_earlier_memory=True).inserted_indices == (2, 4, 6, 8)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"memory": {"memory_topk": 2}}, r"--memory-topk 2 differs from the Memory blocks that the model has \(3\)"),
        ({"preset": "midus-token"}, "--preset midus-token: new Memory blocks have the settings of those"),
        (
            {"policy": "llama_pro", "memory": {"memory_topk": 3}},
            "--memory-topk is a setting of Memory blocks and policy",
        ),
        *[
            ({"policy": policy}, f"policy {policy} repeats or mixes blocks of its base")
            for policy in ("solar", "stack", "average", "opt_deus", "opt_deus_literal")
        ],
        ({"policy": "none", "num_blocks": None}, "midus convert --to megatron"),
        ({"num_blocks": None}, r"--insert-after \(0 to 6, its Memory blocks counted\)"),
        ({"insert_after": [1]}, "one of the two"),
        ({"num_blocks": None, "insert_after": [7]}, "cannot insert after layer 7"),
        ({"num_blocks": None, "insert_after": [1, 1]}, "named more than once"),
        ({"base": None, "train_earlier_memory": True}, "--train-earlier-memory is about the Memory blocks"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        asked(**changes)
    assert "\n" not in str(caught.value)


def test_default_memory_is_unlike_this_one():
    assert MemoryConfig() != MEMORY  # or the test of the settings could not fail
