"""Bytes that one rank exchanges in a step, message by message; compared with counted traffic of real runs by the tests."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

from megatron_midus.config import MemoryConfig, ModelConfig, padded_vocab_size
from megatron_midus.planning.footprint import GRADIENT_BYTES, local_elements, stage_parameters
from megatron_midus.planning.parallel_layout import ParallelLayout, Workload
from megatron_midus.upscaling.plan import UpscalePlan
from megatron_midus.upscaling.tensors import block_shapes

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]
Axis = Literal["tensor", "pipeline", "data"]


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
    if layout.data > 1:
        _, trained = stage_parameters(model, plan, layout, workload, stage=stage, vocab_divisible_by=vocab_divisible_by)
        if layout.distributed_optimizer:
            add("data", "reduce_scatter", trained * GRADIENT_BYTES)
            add("data", "all_gather", trained * workload.itemsize)
        else:
            add("data", "all_reduce", trained * GRADIENT_BYTES)
    ranks = {"tensor": layout.tensor, "pipeline": 2, "data": layout.data}
    return [Message(axis, kind, size, ranks[axis]) for (axis, kind), size in counts.items()]


def _tensor_parallel(
    model: ModelConfig, plan: UpscalePlan, layout: ParallelLayout, workload: Workload, stage: int
) -> Iterator[tuple[Kind, float]]:
    """Of one micro-batch: what enters and leaves the parts of the layers that tensor-parallel ranks share."""
    hidden = workload.tokens * model.hidden_size * workload.itemsize
    gradient, trained = workload.gradient(plan, layout), workload.trained(plan)
    if stage == 0:
        yield from _leave(hidden, layout, backward=workload.train == "all")
    for index in layout.stages[stage]:
        backward = gradient[index] != "none"
        if plan.blocks[index].kind == "memory":
            assert plan.memory is not None
            if plan.memory.has_attention:
                yield from _enter(hidden, layout, backward=backward, trained=trained[index])
            yield from _own_channels(hidden, plan.memory, layout, workload, backward=backward)
            yield from _leave_memory(model, plan, layout, workload, backward=backward)
        else:
            for _ in range(2):  # attention, MLP
                yield from _enter(hidden, layout, backward=backward, trained=trained[index])
                yield from _leave(hidden, layout, backward=backward)
    if stage == layout.pipeline - 1:
        yield from _enter(hidden, layout, backward=any(trained), trained=workload.train == "all")
        yield "all_reduce", 3 * 4 * workload.tokens  # cross entropy: largest logit, the label's, sum of exponentials


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
    trained = workload.trained(plan)
    elements = 0
    for index in layout.stages[stage]:
        if not trained[index]:
            continue
        for name, shape in block_shapes(model, plan, index).items():
            if name == "memory.value_bank":
                elements += math.prod(shape) * (local_elements(name, shape, layout) == math.prod(shape))
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
