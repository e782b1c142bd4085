"""``midus plan``: the layouts of a cluster that a model fits on, fastest first."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from rich.console import Console

from megatron_midus.checkpoint.layout import find_checkpoint
from megatron_midus.config import ModelConfig
from megatron_midus.config.plan import PlanConfig
from megatron_midus.conversion.families import from_hf_config
from megatron_midus.conversion.hf_io import read_hf_config
from megatron_midus.errors import UserError
from megatron_midus.files import write_text_atomically
from megatron_midus.hub import fetched_model
from megatron_midus.planning import Workload
from megatron_midus.planning.hardware import HARDWARE, LINK_SHARE, MATMUL_SHARE, MEMORY_SHARE, Hardware
from megatron_midus.planning.output import GIB, driver_flags, layout_table
from megatron_midus.planning.search import RESERVED_SHARE, Candidate, find_layouts
from megatron_midus.progress import Progress
from megatron_midus.training.checks import check_keeps_base
from megatron_midus.upscaling import UpscalePlan
from megatron_midus.upscaling.arguments import plan_from_config
from megatron_midus.upscaling.cost import active_parameters, flops_per_token, total_parameters, trainable_parameters
from megatron_midus.verbs.exports import base_plan_of
from megatron_midus.verbs.verb import verb


@dataclasses.dataclass(frozen=True)
class LayoutPlan:
    """What was found.

    Attributes:
        model, plan: what is trained.
        hardware: figures of a GPU and its links.
        candidates: all layouts; those that fit first, fastest first.
    """

    model: ModelConfig
    plan: UpscalePlan
    hardware: Hardware
    candidates: list[Candidate]

    @property
    def fitting(self) -> list[Candidate]:
        """The layouts that fit into the memory of a GPU, fastest first."""
        return [candidate for candidate in self.candidates if candidate.fits]


@verb(PlanConfig)
def plan(config: PlanConfig, progress: Progress) -> LayoutPlan:
    """Searches layouts. See ``PlanConfig`` for the settings.

    Raises:
        UserError: a model or plan that cannot be read, or a global batch that no layout divides.
    """
    model, upscaled = _model_and_plan(config)
    if config.train == "inserted" and not upscaled.inserted_indices:
        raise UserError(f"policy {upscaled.policy} inserts no block, so nothing would be trained; give --train all")
    if config.kl_to_base:
        check_keeps_base(config.kl_to_base, upscaled, config.train)
    hardware = _hardware(config)
    workload = Workload(
        config.seq_length,
        config.max_micro_batch_size,
        config.global_batch_size,
        itemsize=4 if config.fp32 else 2,
        train=config.train,
        weight_copies=config.weight_copies,
        kl_to_base=config.kl_to_base > 0,
    )
    candidates = find_layouts(
        model,
        upscaled,
        hardware,
        workload,
        nodes=config.nodes,
        gpus_per_node=config.gpus_per_node,
        training_flops_per_token=flops_per_token(
            model, upscaled, config.seq_length, train=config.train, kl_to_base=workload.kl_to_base
        ),
        vocab_divisible_by=config.make_vocab_size_divisible_by,
    )
    if not candidates:
        raise UserError(
            f"no layout of {config.nodes * config.gpus_per_node} GPUs divides a global batch of "
            f"{config.global_batch_size}; change --global-batch-size"
        )
    return LayoutPlan(model, upscaled, hardware, candidates)


def _model_and_plan(config: PlanConfig) -> tuple[ModelConfig, UpscalePlan]:
    if config.load is not None:
        directory = find_checkpoint(config.load)[0]
        return ModelConfig.load(directory), UpscalePlan.load(directory)
    assert config.hf_model is not None
    directory = fetched_model(config.hf_model)
    hf_config = read_hf_config(directory)
    model = from_hf_config(hf_config)
    base = base_plan_of(directory, model, hf_config)
    return model, plan_from_config(config.blocks, config.memory, model, base)


def _hardware(config: PlanConfig) -> Hardware:
    """That of ``--hardware`` with the figures that were given instead."""
    given = {name: value for name, value in dataclasses.asdict(config.figures).items() if value is not None}
    if "gpu_memory_gib" in given:
        given["memory_gib"] = given.pop("gpu_memory_gib")
    return dataclasses.replace(HARDWARE[config.hardware], **given)


def print_model(console: Console, model: ModelConfig, plan: UpscalePlan, config: PlanConfig) -> None:
    active = ""
    if model.num_moe_experts is not None:
        active = f"{active_parameters(model, plan):,} of them active for a token ({model.moe_router_topk} of {model.num_moe_experts} experts), "
    console.print(
        f"{plan.num_base_layers} -> {plan.num_layers} blocks, policy {plan.policy}: {total_parameters(model, plan):,} parameters, "
        f"{active}{trainable_parameters(model, plan, config.train):,} of them trained; "
        f"a step: {config.global_batch_size} x {config.seq_length:,} tokens",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def print_layouts(
    console: Console, candidates: list[Candidate], hardware: Hardware, *, has_experts: bool, has_copies: bool
) -> None:
    console.print(layout_table(candidates, has_experts=has_experts, has_copies=has_copies))
    console.print(
        f"Times are estimates: {MATMUL_SHARE:.0%} of {hardware.matmul_tflops:,.0f} TFLOP/s, {MEMORY_SHARE:.0%} of "
        f"{hardware.memory_gb_s:,.0f} GB/s, {LINK_SHARE:.0%} of {hardware.node_gb_s:,.0f} GB/s in a node and of "
        f"{hardware.network_gb_s:,.0f} GB/s between nodes; {RESERVED_SHARE:.0%} of {hardware.memory_gib:.0f} GiB are kept free.",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def to_json(c: Candidate) -> dict[str, Any]:
    values = dataclasses.asdict(c)
    values["memory"]["total"] = c.memory.total
    values["flags"] = driver_flags(c)
    return values


def command(config: PlanConfig) -> int:
    """``midus plan``."""
    found = plan(config)
    has_experts, has_copies = found.model.num_moe_experts is not None, config.weight_copies > 0
    console = Console(width=max(150 + 25 * has_experts + 10 * has_copies, Console().width))
    print_model(console, found.model, found.plan, config)
    shown = (found.fitting or found.candidates)[: config.show]
    print_layouts(console, shown, found.hardware, has_experts=has_experts, has_copies=has_copies)
    if config.json:
        write_text_atomically(config.json, json.dumps([to_json(c) for c in found.candidates], indent=1) + "\n")
    if not found.fitting:
        smallest = found.candidates[0].memory.total / GIB
        raise UserError(
            f"nothing fits into {found.hardware.memory_gib:.0f} GiB; the smallest layout (shown first) needs "
            f"{smallest:.1f} GiB a GPU: take more GPUs, shorter sequences, or --train inserted"
        )
    best = found.fitting[0]
    console.print(f"\n{len(found.fitting)} of {len(found.candidates)} layouts fit. The fastest:", highlight=False)
    console.print("  " + " \\\n  ".join(driver_flags(best)), highlight=False, soft_wrap=True)
    if found.plan.memory is not None and best.layout.tensor > 1:
        console.print(f"values: {best.value_reason}", highlight=False, soft_wrap=True)
    return 0
