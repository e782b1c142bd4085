"""The plan that settings ask for: policy, number and place of its blocks, settings of its memories."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_midus.config import MemoryConfig, ModelConfig
from megatron_midus.config.memory import PRESETS
from megatron_midus.config.upscale import PolicyConfig
from megatron_midus.errors import UserError
from megatron_midus.upscaling.growth import grow, grown_memory
from megatron_midus.upscaling.plan import UpscalePlan
from megatron_midus.upscaling.policies import canonical_policy, make_plan


def plan_from_config(
    blocks: PolicyConfig, memory: Mapping[str, Any], model: ModelConfig, base: UpscalePlan | None = None
) -> UpscalePlan:
    """The plan for a model.

    Args:
        blocks: policy, number and place.
        memory: fields of ``MemoryConfig`` that were given.
        model: the base.
        base: its plan, where it is a MIDUS model.

    Raises:
        UserError: settings that do not fit the model or the policy.
    """
    policy = canonical_policy(blocks.policy)
    if model.num_moe_experts is not None and policy in ("opt_deus", "opt_deus_literal"):
        raise UserError(
            f"policy {policy} aligns the channels of one MLP and has no rule for {model.num_moe_experts} experts; "
            "choose interleave, llama_pro or average"
        )
    where: dict[str, Any] = {"num_blocks": blocks.num_blocks, "insert_after": blocks.insert_after}
    if base is not None and base.memory is not None:
        stored = base.memory
        if policy != "interleave":
            _memory_config(policy, memory, blocks.preset)
        return grow(
            policy,
            base,
            memory=grown_memory(stored, memory, blocks.preset),
            train_earlier_memory=blocks.train_earlier_memory,
            **where,
        )
    if blocks.train_earlier_memory:
        raise UserError(
            "--train-earlier-memory is about the Memory blocks of a MIDUS model, and this one has none; leave it out"
        )
    plan = make_plan(policy, num_layers=model.num_layers, memory=_memory_config(policy, memory, blocks.preset), **where)
    if plan.memory is not None:
        plan.memory.check_model(
            hidden_size=model.hidden_size, num_attention_heads=model.num_attention_heads, kv_channels=model.kv_channels
        )
    return plan


def _memory_config(policy: str, memory: Mapping[str, Any], preset: str | None) -> MemoryConfig | None:
    """Settings that the policy has no use for are a mistake, not a detail."""
    if policy == "interleave":
        return MemoryConfig(**{**PRESETS[preset or "midus"], **memory})
    if preset is not None:
        memory = {"preset": preset}
    if memory:
        name = next(iter(memory)).replace("_", "-")
        raise UserError(
            f"--{name} is a setting of Memory blocks and policy {policy} inserts none; "
            "leave it out or choose --policy interleave"
        )
    return None
