"""The plan that flags ask for: presets, and flags beside them."""

import pytest

from megatron_midus.config import MemoryConfig, ModelConfig
from megatron_midus.config.memory import PRESETS
from megatron_midus.config.upscale import PolicyConfig
from megatron_midus.errors import UserError
from megatron_midus.upscaling.arguments import plan_from_config

MODEL = ModelConfig(
    num_layers=4, hidden_size=32, num_attention_heads=4, num_query_groups=2, kv_channels=8, ffn_hidden_size=48,
    vocab_size=64, max_position_embeddings=64,
)  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_where_the_flags_begin(preset):
    memory = plan_from_config(PolicyConfig(preset=preset, num_blocks=2), {"memory_num_keys": 20}, MODEL).memory
    assert memory == MemoryConfig(**{**PRESETS[preset], "memory_num_keys": 20})


def test_midus_is_the_published_method_and_the_default():
    plans = [plan_from_config(PolicyConfig(preset=preset, num_blocks=2), {}, MODEL) for preset in (None, "midus")]
    assert plans[0] == plans[1]
    memory = plans[0].memory
    assert (memory.memory_query, memory.memory_attention, memory.memory_query_norm) == (
        "attention",
        "attn_prime",
        "none",
    )


def test_a_preset_of_memory_blocks_needs_memory_blocks():
    with pytest.raises(UserError, match="--preset is a setting of Memory blocks and policy llama_pro inserts none"):
        plan_from_config(PolicyConfig(policy="llama_pro", preset="midus-token", num_blocks=2), {}, MODEL)
