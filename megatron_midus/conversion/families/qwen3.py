"""Qwen3 (dense): Llama with a norm on every head's query and key, and a head size of its own."""

from typing import Any

from megatron_midus.conversion.families.common import Family, check_full_attention


def settings(config: dict[str, Any]) -> dict[str, Any]:
    check_full_attention(config)
    return {"qk_layernorm": True}


FAMILY = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    defaults={
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
    },
    required={"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
    settings=settings,
)
