"""OLMo 3: OLMo 2 whose layers slide but for every fourth; only those others have the rope scaling."""

from typing import Any

from megatron_midus.conversion.families.common import Family, kinds_of_layers, local_rope, sliding_settings
from megatron_midus.conversion.families.olmo2 import settings as olmo2_settings

PERIOD = 4


def settings(config: dict[str, Any]) -> dict[str, Any]:
    kinds = kinds_of_layers(config, PERIOD)
    return {**olmo2_settings(config), **local_rope(config, theta=500000.0), **sliding_settings(config, kinds)}


FAMILY = Family(
    name="olmo3",
    architecture="Olmo3ForCausalLM",
    defaults={
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "sliding_window": 4096,
    },
    required={"hidden_act": "silu"},
    rope_theta=500000.0,
    per_layer_rope=True,
    settings=settings,
    layers=lambda config: {"layer_types": kinds_of_layers(config, PERIOD)},
)
