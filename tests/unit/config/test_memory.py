"""MemoryConfig refuses what cannot be built and knows the shape of every parameter."""

from __future__ import annotations

import pytest

from megatron_midus.config import MemoryConfig

MODEL = {"hidden_size": 48, "num_attention_heads": 6, "kv_channels": 10}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"memory_num_keys": 0}, "memory_num_keys=0"),
        ({"memory_num_keys": 5, "memory_topk": 6}, "choose 1 to memory_num_keys=5"),
        ({"memory_topk": 0}, "memory_topk=0"),
        ({"memory_num_keys": 46341}, "at most 46340"),
        ({"memory_latent_size": 0}, "memory_latent_size=0"),
        ({"memory_num_heads": 2}, "memory_num_heads=2 is a setting of variant block"),
        ({"memory_variant": "block", "memory_output_projection": "linear"}, "does not apply to variant block"),
    ],
)
def test_values_out_of_range_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        MemoryConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "model", "words"),
    [
        ({}, {"hidden_size": 50}, "hidden_size=50 is not divisible by num_attention_heads=6"),
        ({}, {"kv_channels": 9}, "has 9 channels; product keys need an even number"),
        ({"memory_variant": "block", "memory_num_heads": 7}, {}, "memory_num_heads=7 does not divide"),
    ],
)
def test_models_that_do_not_fit_are_named(settings, model, words):
    with pytest.raises(ValueError, match=words):
        MemoryConfig(**settings).check_model(**{**MODEL, **model})


def test_shapes_of_hive():
    memory = MemoryConfig(memory_num_keys=7, memory_latent_size=5, memory_query_norm="rms", memory_topk=2)
    memory.check_model(**MODEL)
    assert memory.parameter_shapes(**MODEL) == {
        "query_norm": (6, 10),
        "row_keys": (6, 7, 5),
        "col_keys": (6, 7, 5),
        "value_bank": (49, 5),
        "head_proj": (6, 5, 8),
    }


def test_shapes_of_the_other_variants_and_options():
    full = MemoryConfig(memory_variant="full", memory_num_keys=7, memory_topk=2, memory_output_projection="silu")
    assert full.parameter_shapes(**MODEL)["value_bank"] == (6, 49, 8)
    assert full.parameter_shapes(**MODEL)["gate"] == (6, 10, 8)
    block = MemoryConfig(memory_variant="block", memory_num_keys=7, memory_topk=2, memory_num_heads=3)
    assert block.parameter_shapes(**MODEL) == {
        "row_keys": (3, 7, 10),
        "col_keys": (3, 7, 10),
        "value_bank": (49, 48),
    }
    attention = MemoryConfig(memory_attention="full", memory_output_projection="linear", memory_query_temperature=True)
    shapes = attention.parameter_shapes(**MODEL)
    assert list(shapes) == ["attn_proj", "log_temperature", "row_keys", "col_keys", "value_bank", "head_proj", "mixer"]
    # Behind the output projection a head has hidden_size / heads = 8 channels.
    assert shapes["attn_proj"] == (48, 60) and shapes["row_keys"] == (6, 64, 4) and shapes["mixer"] == (48, 48)
    assert MemoryConfig(memory_output_projection="attention").parameter_shapes(**MODEL)["mixer"] == (60, 48)


def test_num_slots():
    assert MemoryConfig(memory_num_keys=100).num_slots == 10_000
