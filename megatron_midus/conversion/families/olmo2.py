"""OLMo 2: norms behind the branches alone, and one norm over all heads of a query or key."""

from typing import Any

from megatron_midus.conversion.families.common import Family
from megatron_midus.conversion.families.llama import biases


def settings(config: dict[str, Any]) -> dict[str, Any]:
    return {
        **biases(config),
        "add_mlp_bias": False,
        "norm_placement": "post",
        "qk_layernorm": True,
        "qk_norm_width": True,
        "wide_norm": True,
        "wide_rotary": True,
    }


FAMILY = Family(
    name="olmo2",
    architecture="Olmo2ForCausalLM",
    defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 2048},
    required={"hidden_act": "silu"},
    settings=settings,
)
