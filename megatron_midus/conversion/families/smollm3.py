"""SmolLM3: Llama some of whose layers do not rotate their queries and keys."""

from typing import Any

from megatron_midus.conversion.families.common import Family, check_full_attention
from megatron_midus.conversion.families.llama import biases


def rotating(config: dict[str, Any]) -> list[int]:
    """1 for each layer that rotates; ``no_rope_layers``, in spite of its name, is this list."""
    interval, layers = config["no_rope_layer_interval"], range(config["num_hidden_layers"])
    return list(config.get("no_rope_layers") or [int((layer + 1) % interval != 0) for layer in layers])


def settings(config: dict[str, Any]) -> dict[str, Any]:
    check_full_attention(config)
    return {**biases(config), "rope_layers": rotating(config)}


FAMILY = Family(
    name="smollm3",
    architecture="SmolLM3ForCausalLM",
    defaults={
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "no_rope_layer_interval": 4,
        "tie_word_embeddings": True,
    },
    required={"hidden_act": "silu", "use_sliding_window": False},
    rope_theta=2000000.0,
    settings=settings,
    layers=lambda config: {"no_rope_layers": rotating(config)},
)
