"""MidusConfig: validation, rotary descriptions, agreement with MemoryConfig."""

import dataclasses
import json

import pytest

from megatron_midus.config import MemoryConfig
from megatron_midus.hf import MidusConfig

TINY = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 6, "num_hidden_layers": 2}
LLAMA3 = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"num_key_value_heads": 4}, "num_key_value_heads=4"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"head_dim": 7}, "head_dim=7"),
        ({"block_types": ["transformer"]}, "num_hidden_layers=2"),
        ({"block_types": ["transformer", "mamba"]}, "mamba"),
        ({"memory_topk": 65}, "memory_topk=65"),
        ({"memory_topk": 0}, "memory_topk=0"),
        ({"memory_num_keys": 0}, "memory_num_keys=0"),
        ({"memory_variant": "hiv"}, "memory_variant='hiv'"),
        ({"memory_query_norm": "layer"}, "memory_query_norm='layer'"),
        ({"memory_num_heads": 3}, "memory_num_heads=3"),
        ({"memory_variant": "block", "memory_output_projection": "silu"}, "memory_output_projection=silu"),
        ({"memory_variant": "block", "memory_num_heads": 5, "block_types": ["transformer", "memory"]}, "5"),
        ({"hidden_size": 50, "head_dim": 8, "block_types": ["transformer", "memory"]}, "hidden_size=50"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "factor"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "head_dim": 2}, "head_dim=2"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "factor='2'"),
        ({"rope_parameters": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor=4.0"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ between layer types"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_parameters": {"partial_rotary_factor": 1.5}}, "partial_rotary_factor=1.5"),
        ({"memory_variant": "block", "memory_num_heads": 0}, "memory_num_heads=0"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_value(settings, named):
    with pytest.raises(ValueError) as error:
        MidusConfig(**{**TINY, **settings})
    assert named in str(error.value) and "\n" not in str(error.value)


def test_an_attention_that_no_memory_follows_may_have_any_width():
    MidusConfig(**{**TINY, "hidden_size": 50, "head_dim": 8})


@pytest.mark.parametrize("old", [True, False], ids=["transformers 4 names", "transformers 5 names"])
def test_rotary_descriptions_of_both_generations_mean_the_same(old):
    if old:
        config = MidusConfig(**TINY, rope_theta=500000, rope_scaling=LLAMA3)
    else:
        config = MidusConfig(**TINY, rope_parameters={"rope_theta": 500000.0, **LLAMA3})
    assert config.rope_parameters == {"rope_theta": 500000.0, **LLAMA3}
    assert config.rope_theta == 500000.0
    assert config.rope_scaling == LLAMA3


def test_rotary_description_survives_the_file(tmp_path):
    MidusConfig(**TINY, rope_theta=123456.0, rope_scaling=LLAMA3).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["rope_theta"] == 123456.0 and written["rope_scaling"] == LLAMA3  # for readers of either generation
    assert MidusConfig.from_pretrained(tmp_path).rope_parameters == {"rope_theta": 123456.0, **LLAMA3}
    # a reader that knows one generation writes back only its own names
    for kept in (("rope_parameters",), ("rope_theta", "rope_scaling")):
        half = {k: v for k, v in written.items() if not k.startswith("rope_") or k in kept}
        assert MidusConfig(**half).rope_parameters == {"rope_theta": 123456.0, **LLAMA3}


def test_rotary_fields_can_be_set():
    config = MidusConfig(**TINY)
    assert config.rope_theta == 10000.0 and config.rope_scaling is None
    config.rope_theta = 3e5
    config.rope_scaling = {"type": "linear", "factor": 4.0}
    assert config.rope_parameters == {"rope_type": "linear", "rope_theta": 3e5, "factor": 4.0}
    config.rope_scaling = None
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 3e5}


def test_every_field_survives_the_file(tmp_path):
    settings = {
        **TINY, "head_dim": 12, "num_key_value_heads": 3, "attention_bias": True, "attention_output_bias": True,
        "qk_norm": True, "sliding_window": 9, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": [2, 3],
        "pad_token_id": 0, "block_types": ["memory", "transformer"], "memory_variant": "block", "memory_num_keys": 9,
        "memory_topk": 4, "memory_latent_size": 5, "memory_num_heads": 4, "memory_query_norm": "rms",
        "memory_query_temperature": True, "memory_score_activation": "relu", "memory_key_init": "normal",
        "memory_attention": "full", "attention_dropout": 0.1, "initializer_range": 0.5, "vocab_size": 77,
    }  # fmt: skip
    MidusConfig(**settings).save_pretrained(tmp_path)
    read = MidusConfig.from_pretrained(tmp_path)
    assert {name: getattr(read, name) for name in settings} == settings


def memory_settings():
    base = {"memory_num_keys": 13, "memory_topk": 4, "memory_latent_size": 5}
    for variant in ("hive", "full", "block"):
        for attention in ("attn_prime", "full"):
            for projection in ("none", "linear", "attention", "silu") if variant != "block" else ("none",):
                yield {
                    **base,
                    "memory_variant": variant,
                    "memory_attention": attention,
                    "memory_output_projection": projection,
                    "memory_query_norm": "rms",
                    "memory_query_temperature": True,
                }
    yield {**base, "memory_variant": "block", "memory_num_heads": 3}
    yield base


@pytest.mark.parametrize("settings", memory_settings())
def test_shapes_are_those_of_memory_config(settings):
    memory = MemoryConfig(**settings)
    config = MidusConfig(**TINY, head_dim=14, block_types=["transformer", "memory"], **memory.to_dict())
    shapes = memory.parameter_shapes(hidden_size=48, num_attention_heads=6, kv_channels=14)
    assert config.memory_parameter_shapes() == shapes
    assert {f.name: getattr(config, f.name) for f in dataclasses.fields(memory)} == memory.to_dict()
