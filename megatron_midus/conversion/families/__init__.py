"""Hugging Face architectures that can be up-scaled: one small file each, found here by the config's ``architectures``."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from megatron_midus.config import ModelConfig
from megatron_midus.conversion.families import (
    gemma2,
    gemma3,
    granite,
    llama,
    midus,
    mistral,
    mixtral,
    olmo2,
    olmo3,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
)
from megatron_midus.conversion.families.common import DROPPED, Family, model_config_from, notes_on
from megatron_midus.errors import UserError
from megatron_midus.upscaling import UpscalePlan

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        llama.FAMILY,
        mistral.FAMILY,
        qwen2.FAMILY,
        qwen3.FAMILY,
        phi3.FAMILY,
        smollm3.FAMILY,
        granite.FAMILY,
        olmo2.FAMILY,
        olmo3.FAMILY,
        gemma2.FAMILY,
        gemma3.FAMILY,
        qwen3_moe.FAMILY,
        mixtral.FAMILY,
        midus.FAMILY,
    )
}

# Families that people ask for, and what is missing for them: docs/extending.md.
_GPT_OSS = "attention sinks, biases of routers and experts, and MXFP4 weights are missing"
MISSING = {"GptOssForCausalLM": _GPT_OSS, "gpt_oss": _GPT_OSS}

__all__ = [
    "FAMILIES",
    "Family",
    "check_model",
    "check_plan",
    "family_of",
    "fresh_config",
    "from_hf_config",
    "notes_on",
    "stored_family",
    "to_hf_config",
]


def family_of(config: dict[str, Any]) -> Family:
    """The family that a ``config.json`` belongs to; ``ValueError`` names it and what works when there is none."""
    architectures = config.get("architectures") or []
    for family in FAMILIES.values():
        if family.architecture in architectures or (not architectures and config.get("model_type") == family.name):
            return family
    named = ", ".join(architectures) or config.get("model_type") or "(none named)"
    reason = f" ({MISSING[named]})" if named in MISSING else ""
    raise UserError(
        f"architecture {named} is not supported{reason}; supported are "
        f"{', '.join(family.architecture for family in FAMILIES.values())}"
    )


def from_hf_config(config: dict[str, Any]) -> ModelConfig:
    """Translates a ``config.json`` of transformers 4 or 5; ``ValueError`` for what the model here cannot express."""
    return model_config_from(config, family_of(config))


def to_hf_config(source: dict[str, Any], model: ModelConfig, plan: UpscalePlan, *, dtype: str) -> dict[str, Any]:
    """The ``config.json`` of the up-scaled model: the source's own, changed where the model changed and nowhere else.

    Args:
        source: the ``config.json`` that ``model`` was read from.
        model: the architecture.
        plan: Memory blocks make it a MIDUS config; any other plan leaves the architecture what it was.
        dtype: of the weights, for instance ``bfloat16``.
    """
    config = {name: copy.deepcopy(value) for name, value in source.items() if name not in DROPPED}
    config["num_hidden_layers"] = plan.num_layers
    # Where architectures alone said it, transformers could not load the result.
    family = family_of(source)
    config["model_type"] = config.get("model_type") or family.name
    # transformers wants one entry per layer: those of the source layers.
    layers = {"layer_types": config.get("layer_types") or (), **family.layers({**family.defaults, **source})}
    sources = [block.source[0] for block in plan.blocks]
    if sources != list(range(plan.num_base_layers)):
        for name, values in layers.items():
            if len(values) == plan.num_base_layers:
                config[name] = [values[layer] for layer in sources]
    named = [key for key in ("dtype", "torch_dtype") if config.get(key)]
    for key in named or ["torch_dtype"]:  # the old name, which transformers 4 and 5 both read
        config[key] = dtype
    return midus.midus_config(config, model, plan) if plan.memory_indices else config


def fresh_config(model: ModelConfig, special_tokens: dict[str, int]) -> dict[str, Any]:
    """A ``config.json`` for a model that was trained from scratch and so has no source to take one from.

    Args:
        model: the architecture; its features decide which of transformers' classes it is.
        special_tokens: ``bos_token_id`` and the like.

    Raises:
        ValueError: a combination of features that no supported class has.
    """
    if model.num_moe_experts is not None:
        family = qwen3_moe.FAMILY if model.qk_layernorm else mixtral.FAMILY
    elif model.qk_layernorm:
        family = qwen3.FAMILY
    elif model.add_qkv_bias:
        family = qwen2.FAMILY
    else:
        family = llama.FAMILY if model.sliding_window is None else mistral.FAMILY
    config = {
        "architectures": [family.architecture],
        "model_type": family.name,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rotary_base,
        "rope_scaling": model.rope_scaling,
        "tie_word_embeddings": model.tie_word_embeddings,
        "initializer_range": model.init_method_std,
        "torch_dtype": model.hf_dtype,
        "use_cache": True,
        **({"attention_bias": False, "mlp_bias": False} if family is llama.FAMILY else {}),
        **({} if model.sliding_window is None else {"sliding_window": model.sliding_window}),
        **_expert_entries(model, family),
        **special_tokens,
    }
    if dataclasses.replace(from_hf_config(config), family=model.family) != model:
        raise UserError(
            f"a model with qk_layernorm={model.qk_layernorm}, add_qkv_bias={model.add_qkv_bias} and "
            f"sliding_window={model.sliding_window} is none of {', '.join(FAMILIES)}; Hugging Face has no class for it here"
        )
    return config


def _expert_entries(model: ModelConfig, family: Family) -> dict[str, Any]:
    if model.num_moe_experts is None:
        return {}
    entries = {"num_experts_per_tok": model.moe_router_topk, "router_aux_loss_coef": model.moe_aux_loss_coeff}
    if family is mixtral.FAMILY:
        return {**entries, "num_local_experts": model.num_moe_experts, "intermediate_size": model.moe_ffn_hidden_size}
    return {
        **entries,
        "num_experts": model.num_moe_experts,
        "moe_intermediate_size": model.moe_ffn_hidden_size,
        "norm_topk_prob": not model.moe_router_pre_softmax,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def check_plan(config: dict[str, Any], plan: UpscalePlan) -> None:
    """Raises ``ValueError`` when a ``config.json`` and the plan beside it describe different models."""
    if config.get("num_hidden_layers") != plan.num_layers:
        raise UserError(
            f"config.json has num_hidden_layers={config.get('num_hidden_layers')}, midus_plan.json {plan.num_layers} "
            "blocks; they must be of one model"
        )
    is_midus = family_of(config) is midus.FAMILY
    if is_midus != bool(plan.memory_indices):
        raise UserError(
            "one of config.json and midus_plan.json has Memory blocks, the other none; they must be of one model"
        )
    if is_midus:
        midus.check_plan(config, plan)


def stored_family(model: ModelConfig, plan: UpscalePlan) -> Family:
    """The family whose way of storing tensors the Hugging Face files of a model follow."""
    return midus.FAMILY if plan.memory_indices else FAMILIES[model.family]


def check_model(config: dict[str, Any], model: ModelConfig, plan: UpscalePlan) -> None:
    """Raises ``ValueError`` when a checkpoint's model configuration, its plan and its source's config.json disagree.

    The config.json may be the base's or that of the up-scaled model.
    """
    if model.num_layers != plan.num_layers:
        raise UserError(
            f"model_config.json has num_layers={model.num_layers}, midus_plan.json {plan.num_layers} blocks; "
            "they must be of one checkpoint"
        )
    theirs = from_hf_config(config)
    if theirs.num_layers not in (plan.num_base_layers, plan.num_layers):
        raise UserError(
            f"config.json has num_hidden_layers={theirs.num_layers}, midus_plan.json goes from {plan.num_base_layers} "
            f"to {plan.num_layers} layers; they must be of one model"
        )
    theirs = plan.applied_to(theirs)
    for field in dataclasses.fields(ModelConfig):
        mine, other = getattr(model, field.name), getattr(theirs, field.name)
        if field.name not in ("num_layers", "hf_dtype", "family", "init_method_std") and mine != other:
            raise UserError(f"{field.name} is {mine} in model_config.json and {other} in config.json; they must agree")
