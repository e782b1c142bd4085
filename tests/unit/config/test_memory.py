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
        (
            {"memory_query": "token"},
            "reads no attention, and memory_attention=attn_prime computes one; choose --memory-attention none",
        ),
        ({"memory_attention": "none"}, "memory_query=attention reads the attention, .*choose --memory-query token"),
        (
            {"memory_query": "token", "memory_attention": "none", "memory_output_projection": "attention"},
            "memory_output_projection=attention reads the attention, .*choose another --memory-output-projection",
        ),
        ({"memory_query": "block"}, "choose --memory-attention full"),
        ({"memory_query_scale": 3.0}, "add --memory-query-norm rms"),
        ({"memory_query_scale": 0.0, "memory_query_norm": "rms"}, "memory_query_scale=0.0 must be above 0"),
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
        (
            {"memory_query": "concat"},
            {},
            "memory_query=concat needs heads of hidden_size / num_attention_heads = 8 channels",
        ),
        ({"memory_query": "token", "memory_attention": "none"}, {"hidden_size": 54}, "has 9 channels"),
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


def test_shapes_of_the_queries():
    """Heads of 48 / 6 = 8 channels of the residual stream, of 10 of the attention."""

    def shapes(query, **settings):
        memory = MemoryConfig(memory_query=query, memory_num_keys=7, memory_topk=2, **settings)
        memory.check_model(**MODEL)
        return memory.parameter_shapes(**MODEL)

    assert shapes("token", memory_attention="none")["row_keys"] == (6, 7, 4)
    gated = shapes("token", memory_attention="none", memory_domain_gate=True)
    assert gated["domain_gate"] == (48,) and gated["domain_gate_bias"] == (1,)
    beside = shapes("token", memory_output_projection="attention")
    assert beside["row_keys"] == (6, 7, 4) and beside["mixer"] == (60, 48)
    assert shapes("sum", memory_attention="full")["row_keys"] == (6, 7, 4)
    concat = shapes("concat", memory_attention="full", memory_output_projection="silu", memory_query_norm="rms")
    assert concat["row_keys"] == (6, 7, 8) and concat["gate"] == (6, 16, 8) and concat["query_norm"] == (6, 16)
    block = shapes("block", memory_attention="full")
    assert block["row_keys"] == (6, 7, 4) and block["block_norm"] == (48,) and block["attn_proj"] == (48, 60)


def test_num_slots():
    assert MemoryConfig(memory_num_keys=100).num_slots == 10_000
