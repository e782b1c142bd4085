"""Granite 3 and 4 (dense): Llama with multipliers on embedding, attention scores, branches and logits."""

from megatron_midus.conversion.families.common import Family
from megatron_midus.conversion.families.llama import biases

FAMILY = Family(
    name="granite",
    architecture="GraniteForCausalLM",
    defaults={
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "embedding_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    required={"hidden_act": "silu"},
    settings=lambda config: {
        **biases(config),
        "embedding_multiplier": float(config["embedding_multiplier"]),
        "attention_scale": float(config["attention_multiplier"]),
        "residual_multiplier": float(config["residual_multiplier"]),
        "logits_divisor": float(config["logits_scaling"]),
    },
)
