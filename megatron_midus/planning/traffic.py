"""Bytes that one rank exchanges in a step, message by message; compared with counted traffic of real runs by the tests."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

from megatron_midus.config import MemoryConfig, ModelConfig, padded_vocab_size
from megatron_midus.planning.footprint import GRADIENT_BYTES, local_elements, stage_parameters, with_one_expert
from megatron_midus.planning.parallel_layout import ParallelLayout, Workload
from megatron_midus.upscaling.plan import UpscalePlan
from megatron_midus.upscaling.tensors import ROUTER, block_shapes

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]
Axis = Literal["tensor", "pipeline", "data", "expert", "expert channels", "expert data"]


@dataclasses.dataclass(frozen=True)
class Message:
    """Collectives of one kind over one axis, summed over a step.

    Attributes:
        size: bytes of the tensors: what is reduced, the gathered result, what is scattered, what is sent.
        ranks: of the group.
    """

    axis: Axis
    kind: Kind
    size: float
    ranks: int

    @property
    def wire_bytes(self) -> float:
        """Bytes that the rank sends, ring algorithms."""
        if self.kind == "send":
            return self.size
        share = (self.ranks - 1) / self.ranks
        return (2 if self.kind == "all_reduce" else 1) * share * self.size


def rank_traffic(
    model: ModelConfig,
    plan: UpscalePlan,
    layout: ParallelLayout,
    workload: Workload,
    *,
    stage: int,
    vocab_divisible_by: int = 128,
) -> list[Message]:
    """What a rank of pipeline stage ``stage`` exchanges in one step, one entry for each axis and kind."""
    counts: dict[tuple[Axis, Kind], float] = {}

    def add(axis: Axis, kind: Kind, size: float) -> None:
        if size:
            counts[axis, kind] = counts.get((axis, kind), 0.0) + size

    micro_batches = workload.num_microbatches(layout.data)
    if layout.tensor > 1:
        for kind, size in _tensor_parallel(model, plan, layout, workload, stage):
            add("tensor", kind, size * micro_batches)
        add("tensor", "all_reduce", _replicated_gradients(model, plan, layout, workload, stage))
    add("pipeline", "send", micro_batches * _transfers(model, plan, layout, workload, stage))
    if (
        model.tie_word_embeddings
        and workload.train == "all"
        and layout.pipeline > 1
        and stage in (0, layout.pipeline - 1)
    ):
        rows = padded_vocab_size(
            model.vocab_size, divisible_by=vocab_divisible_by, tensor_model_parallel_size=layout.tensor
        )
        add("pipeline", "all_reduce", GRADIENT_BYTES * rows // layout.tensor * model.hidden_size)
    for axis, kind, size in _expert_parallel(model, plan, layout, workload, stage):
        add(axis, kind, size * micro_batches)
    _, trained, experts = stage_parameters(
        model, plan, layout, workload, stage=stage, vocab_divisible_by=vocab_divisible_by
    )
    replicated: tuple[tuple[Axis, int], ...] = (("data", trained - experts), ("expert data", experts))
    ranks = {
        "tensor": layout.tensor,
        "pipeline": 2,
        "data": layout.data,
        "expert": layout.expert if layout.all_to_all else layout.expert_group,
        "expert channels": layout.expert_channels,
        "expert data": layout.expert_data,
    }
    for axis, elements in replicated:
        if ranks[axis] == 1:
            continue
        if layout.distributed_optimizer:
            add(axis, "reduce_scatter", elements * GRADIENT_BYTES)
            add(axis, "all_gather", elements * workload.itemsize)
        else:
            add(axis, "all_reduce", elements * GRADIENT_BYTES)
    return [Message(axis, kind, size, ranks[axis]) for (axis, kind), size in counts.items()]


def _tensor_parallel(
    model: ModelConfig, plan: UpscalePlan, layout: ParallelLayout, workload: Workload, stage: int
) -> Iterator[tuple[Kind, float]]:
    """Of one micro-batch: what enters and leaves the parts of the layers that tensor-parallel ranks share."""
    hidden = workload.tokens * model.hidden_size * workload.itemsize
    gradient, trained = workload.gradient(plan, layout), workload.trained(plan)
    if workload.kl_to_base:
        yield from _leave(hidden, layout, backward=False)
        for index in workload.base_pass(plan):
            yield from _block(model, plan, layout, workload, index, backward=False, trained=False)
        yield from _enter(hidden, layout, backward=False, trained=False)
        yield "all_reduce", 5 * 4 * workload.tokens  # largest logits and sums of exponentials of both, the divergence
    if stage == 0:
        yield from _leave(hidden, layout, backward=workload.train == "all")
    for index in layout.stages[stage]:
        backward = gradient[index] != "none"
        yield from _block(model, plan, layout, workload, index, backward=backward, trained=trained[index])
    if stage == layout.pipeline - 1:
        yield from _enter(hidden, layout, backward=any(trained), trained=workload.train == "all")
        yield "all_reduce", 3 * 4 * workload.tokens  # cross entropy: largest logit, the label's, sum of exponentials


def _block(
    model: ModelConfig,
    plan: UpscalePlan,
    layout: ParallelLayout,
    workload: Workload,
    index: int,
    *,
    backward: bool,
    trained: bool,
) -> Iterator[tuple[Kind, float]]:
    """Of one block and one micro-batch."""
    hidden = workload.tokens * model.hidden_size * workload.itemsize
    if plan.blocks[index].kind == "memory":
        assert plan.memory is not None
        if plan.memory.has_attention:
            yield from _enter(hidden, layout, backward=backward, trained=trained)
        yield from _own_channels(hidden, plan.memory, layout, workload, backward=backward)
        yield from _leave_memory(model, plan, layout, workload, backward=backward)
        return
    for _ in range(2 if model.num_moe_experts is None else 1):  # attention, MLP; of experts below
        yield from _enter(hidden, layout, backward=backward, trained=trained)
        yield from _leave(hidden, layout, backward=backward)


def _expert_parallel(
    model: ModelConfig, plan: UpscalePlan, layout: ParallelLayout, workload: Workload, stage: int
) -> Iterator[tuple[Axis, Kind, float]]:
    """Of one micro-batch: tokens on their way to their experts and back, with the probabilities of these."""
    if model.num_moe_experts is None or layout.expert_group == 1:
        return
    gradient = workload.gradient(plan, layout)
    item, tokens = workload.itemsize, workload.tokens / (layout.tensor if layout.sequence_parallel else 1)
    passes = [(index, gradient[index] != "none") for index in layout.stages[stage]]
    passes += [(index, False) for index in workload.base_pass(plan)]
    for index, backward in passes:
        if plan.blocks[index].kind == "memory":
            continue
        if layout.all_to_all:
            rows = tokens * model.moe_router_topk
            if layout.expert > 1:  # there and back, and their gradients
                yield "expert", "all_to_all", rows * (2 * model.hidden_size + 1) * item * (1 + backward)
            if layout.expert_channels > 1:  # every rank of an expert's channels needs all its rows
                rows *= layout.expert_channels
                yield "expert channels", "all_gather", rows * (model.hidden_size + 1) * item
                yield "expert channels", "reduce_scatter", rows * model.hidden_size * item
                if backward:
                    yield "expert channels", "reduce_scatter", rows * (model.hidden_size + 1) * item
                    yield "expert channels", "all_gather", rows * model.hidden_size * item
            continue
        tokens_of_all = tokens * layout.expert_group
        scores = tokens_of_all * model.num_moe_experts
        yield "expert", "all_gather", tokens_of_all * model.hidden_size * item + scores * (item + 1)
        yield "expert", "reduce_scatter", tokens_of_all * model.hidden_size * item
        if backward:
            yield "expert", "reduce_scatter", tokens_of_all * model.hidden_size * item + scores * item
            yield "expert", "all_gather", tokens_of_all * model.hidden_size * item


def _enter(hidden: float, layout: ParallelLayout, *, backward: bool, trained: bool) -> Iterator[tuple[Kind, float]]:
    """A matrix split on its outputs."""
    if not layout.sequence_parallel:
        if backward:
            yield "all_reduce", hidden
        return
    yield "all_gather", hidden
    if backward:
        yield "reduce_scatter", hidden
        if trained:
            yield "all_gather", hidden  # the input once more, for the gradient of the weight


def _leave(hidden: float, layout: ParallelLayout, *, backward: bool) -> Iterator[tuple[Kind, float]]:
    """A matrix split on its inputs, or the embedding."""
    if not layout.sequence_parallel:
        yield "all_reduce", hidden
        return
    yield "reduce_scatter", hidden
    if backward:
        yield "all_gather", hidden


def _own_channels(
    hidden: float, memory: MemoryConfig, layout: ParallelLayout, workload: Workload, *, backward: bool
) -> Iterator[tuple[Kind, float]]:
    """What a query takes from the block's input: each rank the channels of its heads."""
    if not (memory.reads_token or memory.reads_residual):
        return
    if layout.sequence_parallel:
        yield "all_to_all", hidden / layout.tensor * (2 if backward else 1)
    elif backward:
        yield "all_gather", hidden
    if memory.reads_residual:
        yield "all_reduce", 4 * workload.tokens * (2 if backward else 1)  # the sum of squares under the norm


def _leave_memory(
    model: ModelConfig, plan: UpscalePlan, layout: ParallelLayout, workload: Workload, *, backward: bool
) -> Iterator[tuple[Kind, float]]:
    """The memory: the exchanges of a bank that is split by columns, a head mixer, and the way out."""
    memory = plan.memory
    assert memory is not None
    hidden = workload.tokens * model.hidden_size * workload.itemsize
    if memory.memory_attention == "full":
        yield from _split_projection(hidden, backward=backward)
    if layout.latent_values and memory.memory_variant != "full":
        yield from _latent_exchange(model, plan, layout, workload, backward=backward)
    elif memory.memory_variant == "block":
        yield from _leave(hidden, layout, backward=backward)
        return
    if layout.sequence_parallel:
        yield "all_to_all", hidden / layout.tensor * (2 if backward else 1)
    else:
        yield "all_gather", hidden
    if memory.memory_output_projection in ("linear", "attention"):
        yield from _leave(hidden, layout, backward=backward)


def _latent_exchange(
    model: ModelConfig, plan: UpscalePlan, layout: ParallelLayout, workload: Workload, *, backward: bool
) -> Iterator[tuple[Kind, float]]:
    """Slots and weights of all heads to every rank, and each head's columns together again (not for variant block)."""
    memory = plan.memory
    assert memory is not None
    heads = memory.num_memory_heads(model.num_attention_heads)
    selected = 4 * workload.tokens * heads * memory.memory_topk
    yield "all_gather", 2 * selected
    if backward:
        yield "reduce_scatter", selected
    if memory.memory_variant != "block":
        columns = workload.tokens * heads * memory.memory_latent_size * workload.itemsize / layout.tensor
        yield "all_to_all", columns * (2 if backward else 1)


def _split_projection(hidden: float, *, backward: bool) -> Iterator[tuple[Kind, float]]:
    """``attn_proj``: partial sums of all channels become the sum of this rank's channels."""
    yield "reduce_scatter", hidden
    if backward:
        yield "all_gather", hidden


def _replicated_gradients(
    model: ModelConfig, plan: UpscalePlan, layout: ParallelLayout, workload: Workload, stage: int
) -> float:
    """Once a step: value banks that every rank holds, and under sequence parallelism the norms."""
    trained, single = workload.trained(plan), with_one_expert(model)
    elements = 0
    for index in layout.stages[stage]:
        if not trained[index]:
            continue
        for name, shape in block_shapes(single, plan, index).items():
            if name == "memory.value_bank":
                elements += math.prod(shape) * (local_elements(name, shape, layout) == math.prod(shape))
            elif layout.sequence_parallel and name == ROUTER:
                elements += math.prod(shape) * (model.num_moe_experts or 0)
            elif layout.sequence_parallel and name.endswith("norm.weight"):
                elements += math.prod(shape)
    if layout.sequence_parallel and workload.train == "all" and stage == layout.pipeline - 1:
        elements += model.hidden_size
    return GRADIENT_BYTES * elements


def _transfers(model: ModelConfig, plan: UpscalePlan, layout: ParallelLayout, workload: Workload, stage: int) -> float:
    """Bytes of one micro-batch to the next and to the previous stage; chunks wrap around from the last to the first."""
    if layout.pipeline == 1:
        return 0.0
    size = workload.tokens * model.hidden_size * workload.itemsize
    if layout.sequence_parallel:
        size //= layout.tensor
    is_first, is_last = stage == 0, stage == layout.pipeline - 1
    forward = layout.chunks - is_last
    backward = layout.chunks - is_first
    return size * (forward + backward)
