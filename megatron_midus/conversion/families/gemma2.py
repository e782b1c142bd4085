"""Gemma 2: norms on both sides of a branch, 1 + weight, a scaled embedding, soft-capped scores and logits; every second
layer slides."""

from typing import Any

from megatron_midus.conversion.families.common import Family, activation, kinds_of_layers, sliding_settings, soft_cap

PERIOD = 2


def settings(config: dict[str, Any]) -> dict[str, Any]:
    return {
        **sliding_settings(config, kinds_of_layers(config, PERIOD)),
        **gemma_settings(config),
        "attention_softcap": soft_cap(config, "attn_logit_softcapping"),
        "logits_softcap": soft_cap(config, "final_logit_softcapping"),
    }


def gemma_settings(config: dict[str, Any]) -> dict[str, Any]:
    """What the generations have in common."""
    return {
        "hidden_act": activation(config["hidden_activation"]),
        "norm_placement": "both",
        "zero_centered_norm": True,
        "embedding_multiplier": config["hidden_size"] ** 0.5,
        "round_embedding_multiplier": True,
        "attention_scale": config["query_pre_attn_scalar"] ** -0.5,
    }


FAMILY = Family(
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    defaults={
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 8192,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 4096,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
    },
    required={"attention_bias": False, "use_bidirectional_attention": False},
    settings=settings,
    layers=lambda config: {"layer_types": kinds_of_layers(config, PERIOD)},
)
