"""All layouts of a number of GPUs that a model fits on, with their estimated time a step, fastest first."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, get_args

from megatron_midus.config import ModelConfig
from megatron_midus.planning.footprint import RankMemory, rank_memory
from megatron_midus.planning.hardware import Hardware
from megatron_midus.planning.parallel_layout import ParallelLayout, Workload
from megatron_midus.planning.traffic import Axis, rank_traffic
from megatron_midus.upscaling.pipeline_layout import StageCosts, estimate_costs, partition_blocks
from megatron_midus.upscaling.plan import UpscalePlan
from megatron_midus.upscaling.value_placement import resolve_value_placement

RESERVED_SHARE = 0.08  # of a GPU's memory: context, NCCL buffers, fragmentation


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One layout and what it costs; memory is of the stage that holds most, bytes of the stage that sends most.

    Attributes:
        seconds: of a step, estimated.
        compute_seconds, bubble_seconds: the part that computes, and waiting for the pipeline to fill and drain.
        exposed_seconds: transfers that nothing hides, by axis.
        sent_bytes: that a rank sends in a step, by axis.
        tokens_per_second: of one GPU.
        flops_share: useful FLOPs over the peak (recomputation does not count).
        value_reason: why the value banks lie where they lie.
    """

    layout: ParallelLayout
    workload: Workload
    memory: RankMemory
    fits: bool
    seconds: float
    compute_seconds: float
    bubble_seconds: float
    exposed_seconds: dict[Axis, float]
    sent_bytes: dict[Axis, float]
    tokens_per_second: float
    flops_share: float
    value_reason: str


def find_layouts(
    model: ModelConfig,
    plan: UpscalePlan,
    hardware: Hardware,
    workload: Workload,
    *,
    nodes: int,
    gpus_per_node: int,
    training_flops_per_token: float,
    vocab_divisible_by: int = 128,
) -> list[Candidate]:
    """Every layout that divides, those that fit first, then by time.

    Args:
        workload: its micro-batch size is the largest that is tried; smaller ones are tried as well.
        training_flops_per_token: of ``megatron_midus.upscaling.cost.flops_per_token``, for the share of the peak.
    """
    found = [
        _estimate(
            model, plan, hardware, layout, tried, gpus_per_node, training_flops_per_token, reason, vocab_divisible_by
        )
        for layout, tried, reason in _layouts(model, plan, hardware, workload, nodes, gpus_per_node)
    ]
    # Of equally fast layouts the larger micro-batch: fewer and larger kernels, which the estimate does not know.
    size = lambda c: c.workload.micro_batch_size  # noqa: E731
    return sorted(found, key=lambda c: (0, float(f"{c.seconds:.6g}"), -size(c)) if c.fits else (1, c.memory.total, 0))


def _layouts(
    model: ModelConfig, plan: UpscalePlan, hardware: Hardware, workload: Workload, nodes: int, gpus_per_node: int
) -> Iterator[tuple[ParallelLayout, Workload, str]]:
    """Tensor parallelism stays inside a node and divides the heads; every other product that divides is tried.

    Experts are shared by ranks of the tensor and the data axis, each of them whole or split as the attention is.
    """
    world = nodes * gpus_per_node
    memory_heads = plan.memory.num_memory_heads(model.num_attention_heads) if plan.memory else model.num_attention_heads
    costs = estimate_costs(model, plan, workload.seq_length, train=workload.train, device=hardware.device())
    micro_sizes = [size for size in (1, 2, 4, 8, 16, 32) if size <= workload.micro_batch_size]
    for tensor in _divisors(gpus_per_node):
        if model.num_attention_heads % tensor or memory_heads % tensor or workload.seq_length % tensor:
            continue
        for pipeline in _divisors(world // tensor):
            if pipeline > plan.num_layers or (workload.kl_to_base and pipeline > 1):
                continue
            stages = _split(costs, pipeline)
            data = world // tensor // pipeline
            for size in micro_sizes:
                tried = dataclasses.replace(workload, micro_batch_size=size)
                if workload.global_batch_size % (size * data):
                    continue
                placement, reason = _placement(model, plan, tried, tensor, data)
                for recompute, experts in itertools.product((False, True), _expert_sizes(model, tensor, data)):
                    layout = ParallelLayout(
                        stages,
                        tensor=tensor,
                        data=data,
                        sequence_parallel=tensor > 1,
                        recompute=recompute,
                        latent_values=placement == "latent",
                        **experts,
                    )
                    has_replicas = layout.data > 1 or (model.num_moe_experts is not None and layout.expert_data > 1)
                    yield dataclasses.replace(layout, distributed_optimizer=has_replicas), tried, reason


def _expert_sizes(model: ModelConfig, tensor: int, data: int) -> Iterator[dict[str, Any]]:
    """Fields of ``ParallelLayout`` about experts, as ``megatron_midus.model.config.check_expert_parallel`` allows them."""
    if model.num_moe_experts is None:
        yield {}
        return
    for expert, channels in itertools.product(_divisors(model.num_moe_experts), sorted({1, tensor})):
        group = expert * channels
        if tensor * data % group or model.expert_ffn_hidden_size % channels or (expert == 1 and channels != tensor):
            continue
        # Rows that a rank gets from others: its tokens' of all ranks, or those that are sent, to all of an expert's ranks.
        sent = model.moe_router_topk * (channels - 1 + (expert - 1) / expert)
        yield {"expert": expert, "expert_tensor": channels, "all_to_all": expert > 1 and sent < group - 1}


def _placement(model: ModelConfig, plan: UpscalePlan, workload: Workload, tensor: int, data: int) -> tuple[str, str]:
    return resolve_value_placement(
        "auto",
        plan.memory,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        tensor_model_parallel_size=tensor,
        tokens_per_microbatch=workload.tokens,
        num_microbatches=workload.num_microbatches(data),
        itemsize=workload.itemsize,
    )


def _split(costs: StageCosts, pipeline: int) -> tuple[tuple[int, ...], ...]:
    """Stages whose slowest is as fast as it can be."""
    sizes = partition_blocks(costs.blocks, pipeline, embedding_cost=costs.embedding, logits_cost=costs.logits)
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return tuple(tuple(range(end - size, end)) for size, end in zip(sizes, ends))


def _estimate(
    model: ModelConfig,
    plan: UpscalePlan,
    hardware: Hardware,
    layout: ParallelLayout,
    workload: Workload,
    gpus_per_node: int,
    training_flops_per_token: float,
    value_reason: str,
    vocab_divisible_by: int,
) -> Candidate:
    stages = range(layout.pipeline)
    memories = [
        rank_memory(model, plan, layout, workload, stage=stage, vocab_divisible_by=vocab_divisible_by)
        for stage in stages
    ]
    largest = max(memories, key=lambda memory: memory.total)
    micro_batches = workload.num_microbatches(layout.data)
    one = max(_stage_seconds(model, plan, hardware, layout, workload, stage) for stage in stages)
    compute, bubble = one * micro_batches, one * (layout.pipeline - 1)
    sent = _sent(model, plan, layout, workload, vocab_divisible_by)
    exposed = _exposed(
        hardware, layout, sent, gpus_per_node, backward_seconds=compute * 2 / 3, micro_batches=micro_batches
    )
    seconds = compute + bubble + sum(exposed.values())
    tokens = workload.global_batch_size * workload.seq_length
    return Candidate(
        layout=layout,
        workload=workload,
        memory=largest,
        fits=largest.total <= hardware.memory_gib * 2**30 * (1 - RESERVED_SHARE),
        seconds=seconds,
        compute_seconds=compute,
        bubble_seconds=bubble,
        exposed_seconds=exposed,
        sent_bytes=sent,
        tokens_per_second=tokens / seconds / layout.world_size,
        flops_share=training_flops_per_token * tokens / seconds / layout.world_size / (hardware.matmul_tflops * 1e12),
        value_reason=value_reason,
    )


def _stage_seconds(
    model: ModelConfig, plan: UpscalePlan, hardware: Hardware, layout: ParallelLayout, workload: Workload, stage: int
) -> float:
    """Of one micro-batch, forward and backward, on one rank."""
    costs = estimate_costs(model, plan, workload.seq_length, train=workload.train, device=hardware.device())
    gradient, trained = workload.gradient(plan, layout), workload.trained(plan)
    # Of a block that has a backward pass a third where it is trained, half where it is frozen.
    forward = [
        cost / (1 if gradient[index] == "none" else 3 if trained[index] else 2)
        for index, cost in enumerate(costs.blocks)
    ]
    blocks = sum(costs.blocks[index] for index in layout.stages[stage])
    if layout.recompute:
        blocks += sum(forward[index] for index in layout.stages[stage] if gradient[index] != "none")
    blocks += sum(forward[index] for index in workload.base_pass(plan))
    ends = costs.embedding * (stage == 0) + costs.logits * (stage == layout.pipeline - 1)
    if workload.kl_to_base:
        ends += costs.logits / 2  # of a frozen output layer
    return (blocks + ends) * workload.tokens / layout.tensor


def _sent(
    model: ModelConfig, plan: UpscalePlan, layout: ParallelLayout, workload: Workload, vocab_divisible_by: int
) -> dict[Axis, float]:
    """Bytes that a rank sends in a step by axis, of the stage that sends most over it."""
    sent: dict[Axis, float] = dict.fromkeys(get_args(Axis), 0.0)
    for stage in range(layout.pipeline):
        here: dict[Axis, float] = {}
        for message in rank_traffic(model, plan, layout, workload, stage=stage, vocab_divisible_by=vocab_divisible_by):
            here[message.axis] = here.get(message.axis, 0.0) + message.wire_bytes
        for axis, size in here.items():
            sent[axis] = max(sent[axis], size)
    return sent


def _exposed(
    hardware: Hardware,
    layout: ParallelLayout,
    sent: dict[Axis, float],
    gpus_per_node: int,
    *,
    backward_seconds: float,
    micro_batches: int,
) -> dict[Axis, float]:
    """Seconds of transfers that computation does not hide.

    Tensor-parallel transfers stand in the way of the next layer, and tokens on their way to experts too. Gradients travel during the last micro-batch's backward
    pass (``--overlap-grad-reduce``); between pipeline stages only the filling waits. Ranks are numbered tensor, data,
    pipeline, as Megatron does, so data parallelism stays inside a node as long as it fits.
    """
    replicas = layout.tensor * layout.data
    spans: dict[Axis, int] = {
        "tensor": layout.tensor,
        "data": replicas,
        "pipeline": layout.world_size,
        "expert": layout.expert_group,
        "expert channels": layout.expert_channels,
        "expert data": replicas,
    }
    seconds = {axis: sent[axis] / hardware.link(inside_node=span <= gpus_per_node) for axis, span in spans.items()}
    hidden = backward_seconds / micro_batches
    gradients = seconds["data"] + seconds["expert data"]
    late = max(0.0, gradients - hidden) / gradients if gradients else 0.0
    return {
        **seconds,
        "data": seconds["data"] * late,
        "expert data": seconds["expert data"] * late,
        "pipeline": seconds["pipeline"] / micro_batches * (layout.pipeline - 1),
    }


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
