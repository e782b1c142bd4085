"""MIDUS itself: the config.json of our own exports, made from the base's and read back. In line with MidusConfig."""

from __future__ import annotations

import copy
from typing import Any

from megatron_midus.config import ModelConfig
from megatron_midus.conversion.families.common import ACTIVATIONS, LLAMA, Family, activation, expert_settings
from megatron_midus.conversion.stored import FUSED_EXPERTS
from megatron_midus.errors import UserError
from megatron_midus.upscaling import UpscalePlan

ARCHITECTURE = "MidusForCausalLM"
MODEL_TYPE = "midus"
AUTO_MAP = {
    "AutoConfig": "configuration_midus.MidusConfig",
    "AutoModel": "modeling_midus.MidusModel",
    "AutoModelForCausalLM": "modeling_midus.MidusForCausalLM",
}
# Entries of the base families that MidusConfig expresses by others, or has no use for.
_DROPPED = (
    "cache_implementation",
    "decoder_sparse_step",
    "embd_pdrop",
    "hidden_activation",
    "layer_types",
    "max_window_layers",
    "mlp_bias",
    "mlp_only_layers",
    "no_rope_layer_interval",
    "no_rope_layers",
    "num_local_experts",
    "original_max_position_embeddings",
    "output_router_logits",
    "partial_rotary_factor",
    "pretraining_tp",
    "query_pre_attn_scalar",
    "resid_pdrop",
    "rope_local_base_freq",
    "rope_scaling",
    "rope_theta",
    "router_jitter_noise",
    "sliding_window_pattern",
    "use_bidirectional_attention",
    "use_sliding_window",
)
# Fields of MidusConfig that stand for one of ModelConfig; written where they differ from what a Llama has.
_FEATURES = {
    "qk_norm_width": "qk_norm_width",
    "mlp_bias": "add_mlp_bias",
    "norm_placement": "norm_placement",
    "zero_centered_norm": "zero_centered_norm",
    "wide_norm": "wide_norm",
    "wide_rotary": "wide_rotary",
    "embedding_multiplier": "embedding_multiplier",
    "round_embedding_multiplier": "round_embedding_multiplier",
    "attention_multiplier": "attention_scale",
    "attn_logit_softcapping": "attention_softcap",
    "residual_multiplier": "residual_multiplier",
    "logits_scaling": "logits_divisor",
    "final_logit_softcapping": "logits_softcap",
    "local_rope_theta": "local_rotary_base",
}
_SLIDES = "sliding_attention"


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    kinds = config.get("layer_types")
    return {
        **{ours: config[name] for name, ours in _FEATURES.items() if config.get(name) is not None},
        "add_qkv_bias": bool(config.get("attention_bias", False)),
        "add_output_bias": bool(config.get("attention_output_bias", False)),
        "hidden_act": activation(config.get("hidden_act", "silu")),
        "qk_layernorm": bool(config.get("qk_norm", False)),
        "sliding_window": config.get("sliding_window"),
        **_experts(config),
        "rope_layers": config.get("rope_layers"),
        "sliding_layers": None if kinds is None else [kind == _SLIDES for kind in kinds],
    }


def _experts(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of ``ModelConfig`` about experts; none for a model without."""
    if config.get("num_experts") is None:
        return {}
    return {
        **expert_settings(config),
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
        "moe_router_pre_softmax": not config["norm_topk_prob"],
    }


FAMILY = Family(
    name=MODEL_TYPE,
    architecture=ARCHITECTURE,
    defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 2048},
    required={},
    partial_rotary=True,
    settings=_settings,
    stored=FUSED_EXPERTS,
)


def midus_config(base: dict[str, Any], model: ModelConfig, plan: UpscalePlan) -> dict[str, Any]:
    """The ``config.json`` of a MIDUS model: what the base's says, and what its Memory blocks need.

    Args:
        base: the ``config.json`` of the base, or of an earlier MIDUS export.
        model: the architecture, read from it.
        plan: the blocks of the model.
    """
    assert plan.memory is not None
    config = {key: copy.deepcopy(value) for key, value in base.items() if key not in _DROPPED}
    model = plan.applied_to(model)
    rope = {"rope_type": "default", **(model.rope_scaling or {}), "rope_theta": model.rotary_base}
    if model.rotary_percent != 1.0:
        rope["partial_rotary_factor"] = model.rotary_percent
    features = {name: getattr(model, ours) for name, ours in _FEATURES.items()}
    usual = {name: getattr(LLAMA, ours) for name, ours in _FEATURES.items()}
    config = {name: value for name, value in config.items() if name not in features}
    made = {
        **config,
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "auto_map": dict(AUTO_MAP),
        "num_hidden_layers": plan.num_layers,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "hidden_act": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == model.hidden_act),
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tie_word_embeddings,
        # transformers 5 reads rope_parameters, 4 the other two.
        "rope_parameters": rope,
        "rope_theta": model.rotary_base,
        "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"} if model.rope_scaling else None,
        "attention_bias": model.add_qkv_bias,
        "attention_output_bias": model.add_output_bias,
        "qk_norm": model.qk_layernorm,
        "sliding_window": model.sliding_window,
        "block_types": list(plan.block_types),
        **_expert_entries(base, model),
        **plan.memory.to_dict(),
        **{name: value for name, value in features.items() if value != usual[name]},
    }
    for name in ("rope_layers", "layer_types"):
        made.pop(name, None)
    if model.rope_layers is not None:
        made["rope_layers"] = list(model.rope_layers)
    if model.sliding_layers is not None:
        made["layer_types"] = [_SLIDES if slides else "full_attention" for slides in model.sliding_layers]
    return made


def _expert_entries(base: dict[str, Any], model: ModelConfig) -> dict[str, Any]:
    if model.num_moe_experts is None:
        return {}
    return {
        "num_experts": model.num_moe_experts,
        "num_experts_per_tok": model.moe_router_topk,
        "moe_intermediate_size": model.moe_ffn_hidden_size,
        "norm_topk_prob": not model.moe_router_pre_softmax,
        "router_aux_loss_coef": model.moe_aux_loss_coeff,
        # A Mixtral keeps the weights of the experts in fp32, a Qwen3-MoE rounds them to the model's dtype.
        "router_scores_in_fp32": base.get("router_scores_in_fp32", model.family == "mixtral"),
    }


def check_plan(config: dict[str, Any], plan: UpscalePlan) -> None:
    """Raises ``ValueError`` when a MIDUS ``config.json`` and a plan describe different models."""
    if list(config.get("block_types") or ()) != list(plan.block_types):
        raise UserError(
            "block_types of config.json and the blocks of midus_plan.json differ; they must be of one model"
        )
    for name, value in (plan.memory.to_dict() if plan.memory else {}).items():
        if name in config and config[name] != value:
            raise UserError(f"{name} is {config[name]} in config.json and {value} in midus_plan.json; they must agree")
