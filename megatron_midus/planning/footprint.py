"""Bytes that one rank holds in training: weights, gradients, optimizer state, copies of weights, activations.

Activations are what autograd keeps for the backward pass, tensor by tensor; the test suite compares the formulas with what
a real model keeps, exactly for the local layers. Transformer Engine's layers differ a little (they keep 16-bit inputs
of norms, where plain torch keeps an fp32 copy, and key and value heads once per group).
"""

from __future__ import annotations

import dataclasses
import math

from megatron_midus.config import ModelConfig, padded_vocab_size
from megatron_midus.planning.parallel_layout import ParallelLayout, Workload
from megatron_midus.upscaling.plan import UpscalePlan
from megatron_midus.upscaling.tensors import ROUTER, block_shapes

GRADIENT_BYTES = 4  # accumulated in fp32 whatever the precision
MOMENT_BYTES = 8
MASTER_BYTES = 4  # of weights that are not fp32 themselves
COPY_BYTES = 4  # of --ema-decay, of --l2-to-start
_REPLICATED = ("layernorm.weight", "_norm.weight")


@dataclasses.dataclass(frozen=True)
class RankMemory:
    """Of one rank; bytes but for the counts of parameters."""

    parameters: int
    trained: int
    trained_experts: int
    """Of ``trained`` those of experts, which have replicas of their own."""
    weights: int
    gradients: int
    optimizer: int
    copies: int
    """Of the weights that learn; 0 where none is kept."""
    activations: int
    transient: int
    """Largest temporary beside the kept activations: logits and their gradient, or one recomputed layer."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.copies + self.activations + self.transient


def rank_memory(
    model: ModelConfig,
    plan: UpscalePlan,
    layout: ParallelLayout,
    workload: Workload,
    *,
    stage: int,
    vocab_divisible_by: int = 128,
) -> RankMemory:
    """What a rank of pipeline stage ``stage`` holds.

    Args:
        model: architecture; its number of layers does not matter.
        vocab_divisible_by: ``--make-vocab-size-divisible-by``.
    """
    total, trained, experts = stage_parameters(
        model, plan, layout, workload, stage=stage, vocab_divisible_by=vocab_divisible_by
    )
    state = MOMENT_BYTES + (MASTER_BYTES if workload.itemsize < 4 else 0)
    kept = layout.in_flight(stage, workload.num_microbatches(layout.data))
    return RankMemory(
        parameters=total,
        trained=trained,
        trained_experts=experts,
        weights=total * workload.itemsize,
        gradients=trained * GRADIENT_BYTES,
        optimizer=_parted_bytes(trained - experts, experts, layout, state),
        copies=_parted_bytes(trained - experts, experts, layout, COPY_BYTES * workload.weight_copies),
        activations=round(kept * stage_activations(model, plan, layout, workload, stage=stage)),
        transient=_transient(model, plan, layout, workload, stage=stage, vocab_divisible_by=vocab_divisible_by),
    )


def _parted_bytes(others: int, experts: int, layout: ParallelLayout, state: int) -> int:
    """Of what learns; the distributed optimizer parts it among the replicas that it has."""
    if not layout.distributed_optimizer:
        return (others + experts) * state
    return math.ceil(others * state / layout.data) + math.ceil(experts * state / layout.expert_data)


# -- parameters ------------------------------------------------------------------------------------------------------
def local_elements(name: str, shape: tuple[int, ...], layout: ParallelLayout) -> int:
    """Elements of a tensor of a block (name without the layer prefix) that one tensor-parallel rank holds."""
    elements = math.prod(shape)
    if name.endswith(_REPLICATED) or name == ROUTER:
        return elements
    if name == "memory.value_bank" and len(shape) == 2 and not layout.latent_values:
        return elements
    return elements // layout.tensor


def with_one_expert(model: ModelConfig) -> ModelConfig:
    """``model`` whose blocks have one expert, and its row of the router, in the place of all: they can be thousands."""
    return model if model.num_moe_experts is None else dataclasses.replace(model, num_moe_experts=1, moe_router_topk=1)


def _block_elements(shapes: dict[str, tuple[int, ...]], layout: ParallelLayout, num_experts: int) -> tuple[int, int]:
    """What one rank holds of a block, its experts left out, and of these; ``shapes`` are those with one expert."""
    dense = experts = 0
    for name, shape in shapes.items():
        if name.startswith("mlp.experts."):
            experts += math.prod(shape) // layout.expert_channels
        elif name == ROUTER:
            dense += math.prod(shape) * num_experts
        else:
            dense += local_elements(name, shape, layout)
    return dense, experts * num_experts // layout.expert


def stage_parameters(
    model: ModelConfig,
    plan: UpscalePlan,
    layout: ParallelLayout,
    workload: Workload,
    *,
    stage: int,
    vocab_divisible_by: int,
) -> tuple[int, int, int]:
    """``(all, trained, trained ones of experts)`` parameters of one rank of a stage."""
    trained, single = workload.trained(plan), with_one_expert(model)
    total = learning = experts = 0
    for index in layout.stages[stage]:
        dense, expert = _block_elements(block_shapes(single, plan, index), layout, model.num_moe_experts or 0)
        total += dense + expert
        learning += (dense + expert) * trained[index]
        experts += expert * trained[index]
    rows = padded_vocab_size(
        model.vocab_size, divisible_by=vocab_divisible_by, tensor_model_parallel_size=layout.tensor
    )
    table = rows // layout.tensor * model.hidden_size
    is_first, is_last = stage == 0, stage == layout.pipeline - 1
    shared = model.tie_word_embeddings and is_first and is_last
    outside = table * (is_first + is_last - shared) + model.hidden_size * is_last
    return total + outside, learning + outside * (workload.train == "all"), experts


# -- activations -----------------------------------------------------------------------------------------------------
def stage_activations(
    model: ModelConfig, plan: UpscalePlan, layout: ParallelLayout, workload: Workload, *, stage: int
) -> int:
    """Bytes that one micro-batch leaves on a rank between forward and backward pass."""
    gradient, trained = workload.gradient(plan, layout), workload.trained(plan)
    kept = 0.0
    for index in layout.stages[stage]:
        if gradient[index] == "none":
            continue
        if layout.recompute:
            kept += model.hidden_size * workload.itemsize / _sequence_share(layout)
        else:
            starts = gradient[index] == "starts"
            kept += block_activations(model, plan, layout, workload, index, trained=trained[index], starts=starts)
    if stage == layout.pipeline - 1 and any(trained):
        kept += _head_activations(model, layout, workload)
    return round(kept * workload.tokens)


def block_activations(
    model: ModelConfig,
    plan: UpscalePlan,
    layout: ParallelLayout,
    workload: Workload,
    index: int,
    *,
    trained: bool,
    starts: bool,
) -> float:
    """Bytes a token that block ``index`` keeps.

    Args:
        trained: whether its weights learn; only then are the inputs of its matrices kept.
        starts: whether no gradient goes further down, so that its first norm need not keep its input.
    """
    item, tensor = workload.itemsize, layout.tensor
    if plan.blocks[index].kind == "memory":
        assert plan.memory is not None
        if not plan.memory.has_attention:
            # The norm's output itself is not kept, but the channels that are this rank's queries.
            norm = _branch_norms(model, layout, item, trained=trained, needs_input=not starts)
            norm += model.hidden_size * item / tensor - trained * model.hidden_size * item / _sequence_share(layout)
            return norm + _memory_activations(model, plan, layout, item)
    norm = _branch_norms(model, layout, item, trained=trained, needs_input=not starts)
    width = model.num_attention_heads * model.kv_channels
    # Queries, keys, values (repeated for every head), output, the log of the sum of each row, the rotary tables.
    attention = (4 * width * item + 4 * model.num_attention_heads) / tensor
    attention += 4 * model.kv_channels * item / workload.micro_batch_size
    if model.attention_softcap is not None:
        # tanh of all scores, their softmax in fp32, and that once more in 16 bits; no log of sums.
        scores = workload.seq_length * (item + 4 + (item if item < 4 else 0)) - 4
        attention += model.num_attention_heads * scores / tensor
    if model.qk_layernorm:
        heads = model.num_attention_heads + model.num_query_groups
        attention += (heads * model.kv_channels * (4 + (item if trained else 0)) + 4 * heads) / tensor
    if plan.blocks[index].kind == "memory":
        return norm + attention + _memory_activations(model, plan, layout, item)
    return (
        norm
        + attention
        + _branch_norms(model, layout, item, trained=trained, needs_input=True)
        + _mlp_activations(model, layout, item, trained=trained)
    )


def _mlp_activations(model: ModelConfig, layout: ParallelLayout, item: int, *, trained: bool) -> float:
    """Of an MLP, or of a mixture of experts whose router sends every expert as many tokens as the others."""
    # Gate and up side by side, silu(gate), the chunk of up that the product needs, and the input of the last matrix.
    kept = 4 + trained
    if model.num_moe_experts is None:
        return kept * model.ffn_hidden_size * item / layout.tensor
    topk, share = model.moe_router_topk, _sequence_share(layout)
    # The product once more, before it is weighted, and the weights themselves.
    rows = (kept + 1) * topk * model.expert_ffn_hidden_size * item / layout.tensor
    # What experts take in, in the order of the experts; the router keeps what it takes in, which the norm keeps if it learns.
    rows += (
        topk * model.hidden_size * item * layout.expert_channels / layout.tensor
        if trained
        else model.hidden_size * item / share
    )
    return rows + 4 * (model.num_moe_experts + 2 * topk) / share


def _branch_norms(model: ModelConfig, layout: ParallelLayout, item: int, *, trained: bool, needs_input: bool) -> float:
    """Of the norms before and behind one branch of a block."""
    before = _norm_activations(model, layout, item, trained=trained, needs_input=needs_input)
    behind = _norm_activations(model, layout, item, trained=trained, needs_input=True)
    return before * model.norm_before + behind * model.norm_behind


def _norm_activations(
    model: ModelConfig, layout: ParallelLayout, item: int, *, trained: bool, needs_input: bool
) -> float:
    """Of an RMSNorm and of the matrix behind it: input in fp32 and its scale, normalised input, output."""
    width = model.hidden_size / _sequence_share(layout)
    kept = (4 * width + 4 / _sequence_share(layout)) if needs_input else 0.0
    if trained:
        kept += width * item + width * item
    return kept


def _memory_activations(model: ModelConfig, plan: UpscalePlan, layout: ParallelLayout, item: int) -> float:
    """Slots (int32), weights (fp32) and latent sums of a look-up, and what the settings add to the query and to the result.

    The query itself is the attention's output, which is kept there, or a norm's, which is kept here in fp32.
    """
    memory = plan.memory
    assert memory is not None
    heads = memory.num_memory_heads(model.num_attention_heads)
    kept = 8.0 * heads * memory.memory_topk / layout.tensor
    if memory.memory_query in ("sum", "concat", "block"):
        kept += (2 * 4 + (2 if memory.memory_query == "concat" else 1) * item) * model.hidden_size / layout.tensor
    if layout.latent_values and memory.memory_variant != "full":
        kept += 8.0 * heads * memory.memory_topk  # those of all heads, which every rank reads for
        if memory.memory_variant == "hive":
            kept += heads * memory.memory_latent_size * item / layout.tensor  # what the head projection takes
    elif memory.memory_variant == "hive":
        kept += 4 * heads * memory.memory_latent_size / layout.tensor  # the same in fp32, from inside the look-up
    if memory.memory_output_projection == "linear":
        kept += model.hidden_size * item / layout.tensor  # input of the mixer
    return kept


def _head_activations(model: ModelConfig, layout: ParallelLayout, workload: Workload) -> float:
    """Final norm, its output for the output layer, the fp32 softmax of the logits, and its difference from the base's."""
    trained = workload.train == "all"
    norm = _norm_activations(model, layout, workload.itemsize, trained=trained, needs_input=True)
    return norm + (4 + workload.itemsize * workload.kl_to_base) * model.vocab_size / layout.tensor


def _transient(
    model: ModelConfig,
    plan: UpscalePlan,
    layout: ParallelLayout,
    workload: Workload,
    *,
    stage: int,
    vocab_divisible_by: int,
) -> int:
    """Logits in the compute precision and in fp32 on the last stage; one whole layer where it is recomputed."""
    found = 0.0
    if stage == layout.pipeline - 1:
        found = (4 + workload.itemsize) * model.vocab_size / layout.tensor
    if layout.recompute:
        plain = dataclasses.replace(layout, recompute=False)
        found = max(found, *(
            block_activations(model, plan, plain, workload, index, trained=True, starts=False)
            for index in layout.stages[stage]
        ), 0.0)  # fmt: skip
    return round(found * workload.tokens)


def _sequence_share(layout: ParallelLayout) -> int:
    return layout.tensor if layout.sequence_parallel else 1
