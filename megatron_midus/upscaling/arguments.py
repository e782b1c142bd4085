"""The flags that say what an up-scaled model is: policy, number and place of its blocks, settings of its memories."""

from __future__ import annotations

import argparse
import dataclasses

from megatron_midus.config import MemoryConfig, ModelConfig
from megatron_midus.config.fields import add_arguments, from_namespace
from megatron_midus.errors import UserError
from megatron_midus.upscaling.plan import UpscalePlan
from megatron_midus.upscaling.policies import POLICIES, POLICY_ALIASES, canonical_policy, make_plan

_POLICY_HELP = (
    "where blocks are inserted and what they are: interleave or midus = Memory blocks (MIDUS); llama_pro = copies with zeroed "
    "outputs; solar, stack = repeated layers; average = means of neighbours; opt_deus = means of neighbours aligned by "
    "optimal transport, outputs zeroed (opt_deus_literal: scaled as in the paper's program); control = nothing inserted, "
    "those layers of the base trained instead; none = the base as it is (default: interleave)"
)


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds ``--policy``, ``--num-blocks``, ``--insert-after`` and the flags of ``MemoryConfig``."""
    add = parser.add_argument
    add(
        "--policy",
        choices=(*POLICIES, *POLICY_ALIASES),
        type=canonical_policy,
        default="interleave",
        help=_POLICY_HELP,
    )
    add("--num-blocks", type=int, metavar="N", help="blocks to insert, spread evenly by the policy")
    add(
        "--insert-after",
        type=int,
        nargs="+",
        metavar="LAYER",
        help="0-based layers of the base behind which a block is inserted, instead of --num-blocks",
    )
    add_arguments(parser, MemoryConfig, suppress_defaults=True)


def plan_from_arguments(args: argparse.Namespace, model: ModelConfig) -> UpscalePlan:
    """The plan that the flags ask for.

    Raises:
        ValueError: settings that do not fit the model or the policy.
    """
    plan = make_plan(
        args.policy,
        num_layers=model.num_layers,
        num_blocks=args.num_blocks,
        insert_after=args.insert_after,
        memory=_memory_config(args),
    )
    if plan.memory is not None:
        plan.memory.check_model(
            hidden_size=model.hidden_size, num_attention_heads=model.num_attention_heads, kv_channels=model.kv_channels
        )
    return plan


def _memory_config(args: argparse.Namespace) -> MemoryConfig | None:
    """Flags that the policy has no use for are a mistake, not a detail."""
    given = [field.name for field in dataclasses.fields(MemoryConfig) if hasattr(args, field.name)]
    if args.policy == "interleave":
        return from_namespace(MemoryConfig, args)
    if given:
        raise UserError(
            f"--{given[0].replace('_', '-')} is a setting of Memory blocks and policy {args.policy} inserts none; "
            "leave it out or choose --policy interleave"
        )
    return None
