"""Llama 2, 3 and 3.x: grouped queries, gated MLP, tied or untied embedding, plain or llama3-scaled rotary positions."""

from megatron_midus.conversion.families.common import Family

FAMILY = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    # attention_bias would put a bias on the output projection as well, which a Memory block does not have.
    required={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
)
