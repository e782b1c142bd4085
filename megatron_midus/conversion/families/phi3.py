"""Phi-3, Phi-3.5 and Phi-4 (text): Llama with fused projections on disk, partly rotating heads and longrope."""

from megatron_midus.conversion.families.common import Family
from megatron_midus.conversion.stored import Rule

FAMILY = Family(
    name="phi3",
    architecture="Phi3ForCausalLM",
    defaults={
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
    },
    required={"hidden_act": "silu", "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    partial_rotary=True,
    settings=lambda config: {"sliding_window": config.get("sliding_window")},
    stored=(
        Rule("self_attn.qkv_proj.weight", tuple(f"self_attn.{letter}_proj.weight" for letter in "qkv")),
        Rule("mlp.gate_up_proj.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    ),
)
