"""Qwen2 and Qwen2.5: Llama with a bias on the query, key and value projections."""

from typing import Any

from megatron_midus.conversion.families.common import Family, check_full_attention


def settings(config: dict[str, Any]) -> dict[str, Any]:
    check_full_attention(config)
    return {"add_qkv_bias": True}


FAMILY = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "num_key_value_heads": 32},
    # With a window only the layers from max_window_layers on would slide.
    required={"hidden_act": "silu", "use_sliding_window": False},
    settings=settings,
)
