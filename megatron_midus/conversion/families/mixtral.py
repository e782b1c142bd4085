"""Mixtral: a Mistral whose every block has a router and experts in place of its MLP."""

from typing import Any

from megatron_midus.conversion.families.common import Family, expert_settings, uniform_sliding_window
from megatron_midus.conversion.stored import Rule


def settings(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "sliding_window": uniform_sliding_window(config),
        **expert_settings(config),
        "moe_router_pre_softmax": False,
    }


FAMILY = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    defaults={
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "num_experts": 8,
        "rope_theta": 1000000.0,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
    },
    required={"hidden_act": "silu"},
    settings=settings,
    stored=(
        Rule("block_sparse_moe.gate.weight", ("mlp.gate.weight",)),
        Rule("block_sparse_moe.experts.*.w1.weight", ("mlp.experts.*.gate_proj.weight",)),
        Rule("block_sparse_moe.experts.*.w3.weight", ("mlp.experts.*.up_proj.weight",)),
        Rule("block_sparse_moe.experts.*.w2.weight", ("mlp.experts.*.down_proj.weight",)),
    ),
)
