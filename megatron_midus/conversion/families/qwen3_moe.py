"""Qwen3-MoE: a Qwen3 whose every block has a router and experts in place of its MLP."""

from typing import Any

from megatron_midus.conversion.families.common import Family, check_full_attention, expert_settings
from megatron_midus.errors import UserError


def settings(config: dict[str, Any]) -> dict[str, Any]:
    check_full_attention(config)
    if config.get("mlp_only_layers"):
        raise UserError(
            f"Qwen3MoeForCausalLM with mlp_only_layers={config['mlp_only_layers']} is not supported; every block must have experts"
        )
    return {
        "qk_layernorm": True,
        **expert_settings(config),
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
        "moe_router_pre_softmax": not config["norm_topk_prob"],
    }


FAMILY = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    defaults={
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.001,
    },
    required={"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False, "decoder_sparse_step": 1},
    settings=settings,
)
