"""Gemma 3 (text): norms on both sides of a branch, 1 + weight, a scaled embedding, and two rotary bases.

Layers slide but for every sixth; those have the long base, and the rope scaling where there is one.
"""

from typing import Any

from megatron_midus.conversion.families.common import Family, kinds_of_layers, local_rope, sliding_settings
from megatron_midus.conversion.families.gemma2 import gemma_settings


def _kinds(config: dict[str, Any]) -> list[str]:
    return kinds_of_layers(config, config.get("sliding_window_pattern") or 6)


def settings(config: dict[str, Any]) -> dict[str, Any]:
    return {
        **local_rope(config, theta=config.get("rope_local_base_freq") or 10000.0),
        **sliding_settings(config, _kinds(config)),
        **gemma_settings(config),
        "qk_layernorm": True,
    }


FAMILY = Family(
    name="gemma3_text",
    architecture="Gemma3ForCausalLM",
    defaults={
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 4096,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "tie_word_embeddings": True,
    },
    required={
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "use_bidirectional_attention": False,
    },
    rope_theta=1000000.0,
    per_layer_rope=True,
    settings=settings,
    layers=lambda config: {"layer_types": _kinds(config)},
)
