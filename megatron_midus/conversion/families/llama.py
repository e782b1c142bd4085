"""Llama 2, 3 and 3.x: grouped queries, gated MLP, tied or untied embedding, plain or scaled rotary positions, biases."""

from typing import Any

from megatron_midus.conversion.families.common import Family


def biases(config: dict[str, Any]) -> dict[str, Any]:
    """``attention_bias`` of these classes stands for all four projections."""
    attention = bool(config.get("attention_bias", False))
    return {
        "add_qkv_bias": attention,
        "add_output_bias": attention,
        "add_mlp_bias": bool(config.get("mlp_bias", False)),
    }


FAMILY = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    required={"hidden_act": "silu"},
    settings=biases,
)
