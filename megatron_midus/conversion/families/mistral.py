"""Mistral: Llama with a sliding attention window in all layers, or none."""

from megatron_midus.conversion.families.common import Family, uniform_sliding_window

FAMILY = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    defaults={
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    required={"hidden_act": "silu"},
    settings=lambda config: {"sliding_window": uniform_sliding_window(config)},
)
