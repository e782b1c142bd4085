"""From our ModelConfig and a plan to Megatron's TransformerConfig, refusing what up-scaled models cannot have."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_midus.config import ModelConfig
from megatron_midus.config.compatibility import DEPTH_DEPENDENT
from megatron_midus.errors import UserError
from megatron_midus.platform import is_cpu, transformer_engine_available
from megatron_midus.upscaling import UpscalePlan
from megatron_midus.upscaling.pipeline_layout import parse_layout

# Those that are no flags of ours are fields of Megatron-Core.
_DEPTH_DEPENDENT = (*DEPTH_DEPENDENT, "moe_layer_freq", "linear_attention_freq", "heterogeneous_block_specs")
_UNSUPPORTED = ("multi_latent_attention", "mtp_num_layers", "experimental_attention_variant")


def make_transformer_config(
    model: ModelConfig,
    plan: UpscalePlan,
    *,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    virtual_pipeline_model_parallel_size: int | None = None,
    context_parallel_size: int = 1,
    expert_model_parallel_size: int = 1,
    expert_tensor_parallel_size: int | None = None,
    sequence_parallel: bool = False,
    bf16: bool = False,
    recompute_granularity: Literal["full", "selective"] | None = None,
    recompute_method: Literal["uniform", "block"] | None = None,
    recompute_num_layers: int | None = None,
    deterministic: bool = True,
    **overrides: Any,
) -> TransformerConfig:
    """Megatron's configuration of an up-scaled model.

    Args:
        model: the decoder that is built; ``model.num_layers`` equals ``plan.num_layers``.
        plan: which of its blocks are Memory blocks, and what those look like.
        tensor_model_parallel_size: ranks that share heads and channels.
        pipeline_model_parallel_size: pipeline stages.
        virtual_pipeline_model_parallel_size: model chunks per stage, for the interleaved schedule.
        context_parallel_size: ranks that share a sequence; more than 1 needs Transformer Engine.
        expert_model_parallel_size: ranks that share the experts of a block.
        expert_tensor_parallel_size: ranks that share the channels of one expert; those of the attention when absent.
        sequence_parallel: split the residual stream along the sequence over the tensor-parallel ranks.
        bf16: parameters and activations in bfloat16, otherwise float32.
        recompute_granularity: ``full`` = whole layers, ``selective`` = core attention.
        recompute_method: of ``full``; ``uniform`` when absent.
        recompute_num_layers: of ``full``; 1 when absent.
        deterministic: use deterministic kernels on a GPU. A CPU is deterministic as it is.
        overrides: any other field of ``TransformerConfig``.

    Raises:
        ValueError: sizes that do not divide, or a setting that an up-scaled model cannot have.
    """
    if model.num_layers != plan.num_layers:
        raise UserError(f"the model has {model.num_layers} layers and the plan {plan.num_layers}; they must be equal")
    if plan.memory is not None:
        plan.memory.check_model(
            hidden_size=model.hidden_size,
            num_attention_heads=model.num_attention_heads,
            kv_channels=model.kv_channels,
        )
    if isinstance(layout := overrides.get("pipeline_model_parallel_layout"), str):
        parts = len(parse_layout(layout, num_layers=plan.num_layers, num_stages=pipeline_model_parallel_size))
        if parts > pipeline_model_parallel_size and virtual_pipeline_model_parallel_size is None:
            virtual_pipeline_model_parallel_size = parts // pipeline_model_parallel_size
    _check_tensor_parallel(model, plan, tensor_model_parallel_size, sequence_parallel)
    _check_pipeline(plan, pipeline_model_parallel_size, virtual_pipeline_model_parallel_size, overrides)
    _check_context_parallel(context_parallel_size)
    check_expert_parallel(
        model, expert_model_parallel_size, expert_tensor_parallel_size, tensor_parallel=tensor_model_parallel_size
    )
    _check_overrides(overrides)
    if overrides.get("num_moe_experts", model.num_moe_experts) != model.num_moe_experts:
        raise UserError(
            f"num_moe_experts={overrides['num_moe_experts']} is not that of the model, which has {model.num_moe_experts}; leave it out"
        )
    _check_interleaving(virtual_pipeline_model_parallel_size, overrides)
    dtype = torch.bfloat16 if bf16 else torch.float16 if overrides.get("fp16") else torch.float32
    parallel = {
        "tensor_model_parallel_size": tensor_model_parallel_size,
        "pipeline_model_parallel_size": pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": virtual_pipeline_model_parallel_size,
        "context_parallel_size": context_parallel_size,
        "expert_model_parallel_size": expert_model_parallel_size,
        "expert_tensor_parallel_size": expert_tensor_parallel_size,
        "sequence_parallel": sequence_parallel,
        **_pipeline_settings(pipeline_model_parallel_size, virtual_pipeline_model_parallel_size),
    }
    precision = {
        "bf16": bf16,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "deterministic_mode": _deterministic_mode(deterministic),
        "use_cpu_initialization": is_cpu(),
    }
    recompute = _recompute_settings(recompute_granularity, recompute_method, recompute_num_layers)
    made = TransformerConfig(**{**_architecture(model), **parallel, **precision, **recompute, **overrides})
    # Read by this package's own norms and attention.
    made.wide_norm, made.attention_softcap = model.wide_norm, model.attention_softcap
    return made


def _architecture(model: ModelConfig) -> dict[str, Any]:
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "kv_channels": model.kv_channels,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.norm_epsilon,
        # Megatron sums the gradients of these norms over tensor-parallel ranks; one over all heads is split over them.
        "qk_layernorm": model.qk_layernorm and not model.qk_norm_width,
        "add_bias_linear": False,
        "add_qkv_bias": model.add_qkv_bias,
        "gated_linear_unit": True,
        "activation_func": F.silu if model.hidden_act == "silu" else _gelu_tanh,
        "softmax_scale": model.attention_scale,
        "layernorm_zero_centered_gamma": model.zero_centered_norm,
        # Of layers that differ, model/specs.py gives each its own.
        "window_size": None if model.sliding_window is None else (model.sliding_window - 1, 0),
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": model.init_method_std,
        # Megatron's spelling. Layers of two kinds cannot be stacked into one tensor per parameter.
        "hetereogenous_dist_checkpoint": True,
        # The fused versions go through torch.compile, which a CPU pays for with minutes of compilation.
        "bias_activation_fusion": not is_cpu() and model.hidden_act == "silu",
        "bias_dropout_fusion": not is_cpu(),
        **_experts(model),
    }


def _experts(model: ModelConfig) -> dict[str, Any]:
    if model.num_moe_experts is None:
        return {}
    if model.moe_router_topk == 1 and not model.moe_router_pre_softmax:
        raise UserError(
            "moe_router_topk=1 with weights that sum to 1 leaves nothing to learn for the router, and Megatron-Core refuses it; "
            "only moe_router_pre_softmax is supported"
        )
    return {
        "num_moe_experts": model.num_moe_experts,
        "moe_router_topk": model.moe_router_topk,
        "moe_ffn_hidden_size": model.moe_ffn_hidden_size,
        "moe_router_pre_softmax": model.moe_router_pre_softmax,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": model.moe_aux_loss_coeff,
    }


def _gelu_tanh(hidden: torch.Tensor) -> torch.Tensor:
    return F.gelu(hidden, approximate="tanh")


def _pipeline_settings(stages: int, chunks: int | None) -> dict[str, Any]:
    if stages == 1:
        return {}
    # With batched transfers two stages of several chunks exchange each other's messages and train wrongly.
    interleaved = {"overlap_p2p_comm": True, "batch_p2p_comm": False} if chunks is not None else {}
    # The interleaved schedule frees an output while it is still being sent. NCCL keeps the memory until it has been read;
    # gloo sends whatever lies there by then.
    is_sent_later = chunks is not None and is_cpu()
    return {"deallocate_pipeline_outputs": not is_sent_later, **interleaved}


def _recompute_settings(granularity: str | None, method: str | None, num_layers: int | None) -> dict[str, Any]:
    if granularity == "full":
        method, num_layers = method or "uniform", num_layers or 1
    elif method is not None or num_layers is not None:
        raise UserError(
            f"recompute_method={method} and recompute_num_layers={num_layers} belong to recompute_granularity=full"
        )
    return {
        "recompute_granularity": granularity,
        "recompute_method": method,
        "recompute_num_layers": num_layers,
    }


def _deterministic_mode(deterministic: bool) -> bool:
    if not deterministic or is_cpu():
        return False
    if transformer_engine_available() and os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0") != "0":
        raise UserError(
            "deterministic kernels are requested, but NVTE_ALLOW_NONDETERMINISTIC_ALGO="
            f"{os.environ['NVTE_ALLOW_NONDETERMINISTIC_ALGO']} in the environment; set it to 0 or unset it"
        )
    return True


# -- checks ----------------------------------------------------------------------------------------------------------
def _divisors(*numbers: int) -> list[int]:
    return [d for d in range(1, min(numbers) + 1) if all(n % d == 0 for n in numbers)]


def _check_divides(size_name: str, size: int, things: Iterable[tuple[str, int]]) -> None:
    things = list(things)
    for name, number in things:
        if number % size:
            raise UserError(
                f"{name}={number} is not divisible by {size_name}={size}; choose one of "
                f"{_divisors(*(n for _, n in things))}"
            )


def check_transformer_config(config: TransformerConfig, model: ModelConfig, plan: UpscalePlan) -> None:
    """Raises ``ValueError`` for a configuration made elsewhere that an up-scaled model cannot have."""
    values = {name: getattr(config, name) for name in TransformerConfig.__dataclass_fields__ if hasattr(config, name)}
    _check_tensor_parallel(model, plan, config.tensor_model_parallel_size, config.sequence_parallel)
    chunks = config.virtual_pipeline_model_parallel_size
    _check_pipeline(plan, config.pipeline_model_parallel_size, chunks, values)
    _check_context_parallel(config.context_parallel_size)
    _check_overrides(values)
    if chunks is not None and (config.batch_p2p_comm or not config.overlap_p2p_comm):
        raise UserError(
            "virtual pipeline stages train wrongly with batched transfers; overlap_p2p_comm must be on, "
            "batch_p2p_comm off"
        )
    if not config.hetereogenous_dist_checkpoint:
        raise UserError(
            "hetereogenous_dist_checkpoint must be on: layers of two kinds cannot be stacked in a checkpoint"
        )


def _check_tensor_parallel(model: ModelConfig, plan: UpscalePlan, size: int, sequence_parallel: bool) -> None:
    heads = [("num_attention_heads", model.num_attention_heads)]
    if model.num_moe_experts is None:
        heads.append(("ffn_hidden_size", model.ffn_hidden_size))
    if plan.memory_indices:
        assert plan.memory is not None
        heads.append(("memory_num_heads", plan.memory.num_memory_heads(model.num_attention_heads)))
    _check_divides("tensor_model_parallel_size", size, heads)
    groups = model.num_query_groups
    if groups % size and size % groups:
        raise UserError(
            f"num_query_groups={groups} is neither a multiple nor a divisor of tensor_model_parallel_size={size}; "
            f"choose one of {[d for d in _divisors(model.num_attention_heads) if groups % d == 0 or d % groups == 0]}"
        )
    if model.qk_norm_width and groups % size:
        raise UserError(
            f"num_query_groups={groups} is not divisible by tensor_model_parallel_size={size}, and one norm goes over all "
            f"keys; choose one of {_divisors(model.num_attention_heads, groups)}"
        )
    if sequence_parallel and size == 1:
        raise UserError(
            "sequence_parallel needs tensor_model_parallel_size of at least 2; raise it or leave sequence_parallel out"
        )


def _check_pipeline(plan: UpscalePlan, stages: int, chunks: int | None, overrides: dict[str, Any]) -> None:
    if chunks is not None and stages == 1:
        raise UserError(
            f"virtual_pipeline_model_parallel_size={chunks} needs pipeline_model_parallel_size of at least 2"
        )
    uneven = (
        "pipeline_model_parallel_layout",
        "num_layers_in_first_pipeline_stage",
        "num_layers_in_last_pipeline_stage",
        "account_for_embedding_in_pipeline_split",
        "account_for_loss_in_pipeline_split",
    )
    if any(overrides.get(name) for name in uneven):
        return
    parts = stages * (chunks or 1)
    if plan.num_layers % parts:
        added = f" ({plan.num_base_layers} base and {plan.num_layers - plan.num_base_layers} added ones)"
        raise UserError(
            f"num_layers={plan.num_layers}{added} is not divisible by {parts} pipeline stages and chunks; choose one "
            f"of {_divisors(plan.num_layers)}, or say where they go with pipeline_model_parallel_layout"
        )


def _check_interleaving(chunks: int | None, overrides: dict[str, Any]) -> None:
    """The transfers that ``_pipeline_settings`` chooses are the only ones that train rightly."""
    right = _pipeline_settings(2, chunks)
    for name in ("overlap_p2p_comm", "batch_p2p_comm"):
        if chunks is not None and overrides.get(name, right[name]) != right[name]:
            raise UserError(
                f"{name}={overrides[name]} trains wrongly with several model chunks per pipeline stage; leave it out"
            )


def check_expert_parallel(model: ModelConfig, experts: int, channels: int | None, *, tensor_parallel: int) -> None:
    """Raises ``ValueError`` where experts cannot be shared by ``experts`` ranks, each by ``channels`` ranks."""
    if model.num_moe_experts is None:
        if experts > 1:
            raise UserError(f"expert_model_parallel_size={experts} shares experts, and this model has none; choose 1")
        return
    _check_divides("expert_model_parallel_size", experts, [("num_moe_experts", model.num_moe_experts)])
    size = channels or tensor_parallel
    _check_divides("expert_tensor_parallel_size", size, [("moe_ffn_hidden_size", model.expert_ffn_hidden_size)])
    if experts == 1 and size != tensor_parallel:
        # Megatron-Core sums gradients of experts over ranks of their own only where ranks share the experts.
        raise UserError(
            f"expert_tensor_parallel_size={channels} beside tensor_model_parallel_size={tensor_parallel} needs "
            "expert_model_parallel_size of at least 2; leave it out"
        )


def _check_context_parallel(size: int) -> None:
    if size > 1 and not transformer_engine_available():
        raise UserError(
            f"context_parallel_size={size} needs Transformer Engine's attention on a GPU, which is not there; choose 1"
        )


def _check_overrides(overrides: dict[str, Any]) -> None:
    unknown = sorted(set(overrides) - set(TransformerConfig.__dataclass_fields__))
    if unknown:
        raise UserError(f"{', '.join(unknown)} is not a field of Megatron's TransformerConfig; check the spelling")
    for name in _DEPTH_DEPENDENT:
        if name in overrides and overrides[name] != TransformerConfig.__dataclass_fields__[name].default:
            raise UserError(
                f"{name}={overrides[name]} depends on layer numbers, which inserted blocks shift; leave it out"
            )
    for name in _UNSUPPORTED:
        if overrides.get(name):
            raise UserError(f"{name}={overrides[name]} is not supported by up-scaled models; leave it out")
    if "layernorm" in (overrides.get("recompute_modules") or ()) and not transformer_engine_available():
        raise UserError("recompute_modules 'layernorm' needs Transformer Engine, which is not there; leave it out")
