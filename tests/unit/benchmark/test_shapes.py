"""The table of shapes: every row can be built, and what cannot be is refused in words."""

import dataclasses

import pytest

from megatron_midus.benchmark.contenders import make_operands
from megatron_midus.benchmark.shapes import SHAPES, find_shapes
from megatron_midus.config import MemoryConfig


def test_names_are_unique_and_shapes_fit_a_memory():
    for name, shape in SHAPES.items():
        assert shape.name == name
        memory = MemoryConfig(memory_num_keys=shape.num_keys, memory_topk=shape.topk)
        memory.check_model(
            hidden_size=shape.hidden_size, num_attention_heads=shape.num_heads, kv_channels=shape.kv_channels
        )


def test_the_shapes_of_the_targets():
    """What the documentation reports figures for."""
    for name, heads, keys, topk in (("cpu-h8", 8, 256, 16), ("cpu-h32", 32, 256, 16), ("cpu-h32-n64", 32, 64, 8)):
        shape = SHAPES[name]
        assert (shape.num_heads, shape.num_keys, shape.topk) == (heads, keys, topk)
        assert (shape.tokens, shape.latent_size, shape.dtype) == (2048, 64, "float32")
        assert shape.hidden_size == 64 * heads and shape.ffn_hidden_size == 4 * shape.hidden_size
    train = SHAPES["train-cpu"]
    assert (train.hidden_size, train.ffn_hidden_size, train.num_layers, train.num_blocks) == (512, 2048, 8, 4)


def test_overrides():
    (shape,) = find_shapes(["tiny"], tokens=7, dtype="bfloat16")
    assert (shape.tokens, shape.dtype) == (7, "bfloat16")
    assert find_shapes(["tiny"]) == [SHAPES["tiny"]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens": 0}, "tokens=0"),
        ({"dtype": "int8"}, "int8"),
        ({"topk": 12}, "topk=12"),
        ({"hidden_size": 25}, "hidden_size=25"),
    ],
)
def test_impossible_shapes_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(SHAPES["tiny"], **changes)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="'tin' is not known; choose one of .*cpu-small"):
        find_shapes(["tin"])


def test_operands_are_new_each_time_and_random_everywhere():
    operands = make_operands(SHAPES["tiny"], "hive", tokens=4, device="cpu", seed=0)
    before = [t.detach().clone() for t in (operands.inputs[0], operands.grad_out)]
    operands.refresh()
    assert all((a != b).all() for a, b in zip(before, (operands.inputs[0], operands.grad_out)))
    assert all((t != 0).any() for t in operands.inputs)
