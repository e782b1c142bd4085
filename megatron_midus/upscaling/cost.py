"""What an up-scaled model costs: parameters, FLOPs, key/value cache and memory, from its plan alone."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from megatron_midus.config import ModelConfig
from megatron_midus.config.memory import MEASURED
from megatron_midus.upscaling.plan import UpscalePlan
from megatron_midus.upscaling.tensors import block_shapes, memory_shapes, model_shapes

Train = Literal["inserted", "all", "lora", "values"]

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def _count(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def block_parameters(model: ModelConfig, plan: UpscalePlan) -> list[int]:
    """Parameters of each block of the up-scaled model, first to last."""
    return [_count(block_shapes(model, plan, index)) for index in range(plan.num_layers)]


def total_parameters(model: ModelConfig, plan: UpscalePlan) -> int:
    """Parameters of the whole up-scaled model; a tied output layer counts once."""
    return _count(model_shapes(model, plan))


def active_parameters(model: ModelConfig, plan: UpscalePlan) -> int:
    """Parameters that one token goes through: of the experts of a block those that it is sent to."""
    if model.num_moe_experts is None:
        return total_parameters(model, plan)
    expert = 3 * model.hidden_size * model.expert_ffn_hidden_size
    mixtures = plan.num_layers - len(plan.memory_indices)
    return total_parameters(model, plan) - mixtures * (model.num_moe_experts - model.moe_router_topk) * expert


def trainable_parameters(model: ModelConfig, plan: UpscalePlan, train: Train, *, lora_rank: int | None = None) -> int:
    """Parameters that ``--train`` updates, ``lora`` with ``--lora-rank``."""
    if train == "lora":
        return _lora_parameters(model, plan, lora_rank)
    if train == "values":
        return len(plan.memory_indices) * math.prod(_memory_shapes(model, plan)["value_bank"])
    learning = sum(block.learns(train) for block in plan.blocks if block.kind == "memory")
    measured = learning * _measured_parameters(model, plan)
    if train == "all":
        return total_parameters(model, plan) - measured
    counts = block_parameters(model, plan)
    return sum(counts[index] for index in plan.inserted_indices) - measured


def _measured_parameters(model: ModelConfig, plan: UpscalePlan) -> int:
    """Of one memory: those that no training moves."""
    if plan.memory is None:
        return 0
    shapes = memory_shapes(model, plan.memory)
    return sum(math.prod(shapes.get(f"memory.{name}", (0,))) for name in MEASURED)


def _lora_parameters(model: ModelConfig, plan: UpscalePlan, rank: int | None) -> int:
    """``rank * (rows + columns)`` of every linear layer of a block; what a memory holds is none."""
    assert rank is not None, "--train lora has a rank"
    matrices = [
        shape
        for index in range(plan.num_layers)
        for name, shape in block_shapes(model, plan, index).items()
        if name.endswith("_proj.weight")
    ]
    return rank * sum(map(sum, matrices))


@dataclasses.dataclass(frozen=True)
class BlockFlops:
    """Forward FLOPs of one block for one token (a multiply-add is two).

    Attributes:
        weights: products of an activation with a parameter.
        activations: products of two activations: attention scores and their sum of values.
    """

    weights: float
    activations: float


def _attended_tokens(window: int | None, seq_length: int) -> float:
    """Mean number of positions that a token of a causal sequence attends to, its own included."""
    window = min(window or seq_length, seq_length)
    return (window * (window + 1) / 2 + (seq_length - window) * window) / seq_length


def _window(model: ModelConfig, plan: UpscalePlan, index: int) -> int | None:
    """Window of the attention of block ``index``."""
    return model.sliding_window if model.sliding_layers is None else plan.applied_to(model).window(index)


def _memory_shapes(model: ModelConfig, plan: UpscalePlan) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of one memory, by name."""
    assert plan.memory is not None
    return plan.memory.parameter_shapes(
        hidden_size=model.hidden_size, num_attention_heads=model.num_attention_heads, kv_channels=model.kv_channels
    )


def memory_flops(model: ModelConfig, plan: UpscalePlan) -> float:
    """Forward FLOPs of one head-wise memory for one token, the attention before it not included.

    Sub-key scores ``2 n D`` a head, the weighted sum over k slots, and the projections that the variant has.
    Selection is comparisons, not FLOPs.
    """
    shapes = _memory_shapes(model, plan)
    flops = _value_flops(model, plan)
    for name in ("row_keys", "col_keys", "head_proj", "attn_proj", "mixer", "gate", "domain_gate"):
        flops += 2.0 * math.prod(shapes.get(name, (0,)))
    return flops


def _has_attention(plan: UpscalePlan, index: int) -> bool:
    return plan.blocks[index].kind != "memory" or (plan.memory is not None and plan.memory.has_attention)


def _value_flops(model: ModelConfig, plan: UpscalePlan) -> float:
    """FLOPs of the weighted sum over the slots that one token reads, and of the gradient of their values."""
    assert plan.memory is not None
    reads = plan.memory.num_memory_heads(model.num_attention_heads) * plan.memory.memory_topk
    return 2.0 * reads * _memory_shapes(model, plan)["value_bank"][-1]


def block_flops(model: ModelConfig, plan: UpscalePlan, index: int, seq_length: int) -> BlockFlops:
    """Forward FLOPs of block ``index`` for one token of a sequence of ``seq_length`` tokens."""
    if plan.blocks[index].kind == "memory" and not _has_attention(plan, index):
        return BlockFlops(weights=memory_flops(model, plan), activations=0.0)
    query_width = model.num_attention_heads * model.kv_channels
    activations = 4.0 * query_width * _attended_tokens(_window(model, plan, index), seq_length)
    qkv = 2.0 * model.hidden_size * (query_width + 2 * model.num_query_groups * model.kv_channels)
    if plan.blocks[index].kind == "memory":
        return BlockFlops(weights=qkv + memory_flops(model, plan), activations=activations)
    output = 2.0 * query_width * model.hidden_size
    mlp = 6.0 * model.hidden_size * model.expert_ffn_hidden_size
    if model.num_moe_experts is not None:
        mlp = mlp * model.moe_router_topk + 2.0 * model.hidden_size * model.num_moe_experts
    return BlockFlops(weights=qkv + output + mlp, activations=activations)


def forward_flops_per_token(model: ModelConfig, plan: UpscalePlan, seq_length: int, *, of_base: bool = False) -> float:
    """FLOPs of one token's share of a forward pass over ``seq_length`` tokens, logits included.

    Norms, rotary embedding, softmax and the top-k selection are left out, as is usual for this figure.

    Args:
        of_base: through the blocks of the base alone, as ``--kl-to-base`` runs them.
    """
    indices = plan.kept_indices if of_base else range(plan.num_layers)
    blocks = [block_flops(model, plan, index, seq_length) for index in indices]
    logits = 2.0 * model.hidden_size * model.vocab_size
    return sum(block.weights + block.activations for block in blocks) + logits


def flops_per_token(
    model: ModelConfig,
    plan: UpscalePlan,
    seq_length: int,
    *,
    train: Train = "all",
    lora_rank: int | None = None,
    kl_to_base: bool = False,
) -> float:
    """FLOPs of one token's share of a training step: forward and backward, no recomputation.

    ``all`` is three times the forward pass. With ``inserted`` the frozen base needs no weight gradients, and no
    gradients at all before the first inserted block. With ``lora`` every block needs gradients of its activations, and
    the adapters need both. ``values`` needs no weight gradients but those of the slots read. With ``kl_to_base`` the base
    has a forward pass of its own.
    """
    if train == "all":
        return 3.0 * forward_flops_per_token(model, plan, seq_length)
    total = forward_flops_per_token(model, plan, seq_length)
    if kl_to_base:
        total += forward_flops_per_token(model, plan, seq_length, of_base=True)
    if train == "lora":
        blocks = [block_flops(model, plan, index, seq_length) for index in range(plan.num_layers)]
        total += sum(block.weights + 2.0 * block.activations for block in blocks)
        if model.num_moe_experts is not None:  # a token meets the adapters of its own experts
            model = dataclasses.replace(model, num_moe_experts=model.moe_router_topk)
        return total + 2.0 * model.hidden_size * model.vocab_size + 6.0 * _lora_parameters(model, plan, lora_rank)
    learning = [index for index, block in enumerate(plan.blocks) if block.learns(train)]
    if not learning:
        return total
    for index in range(learning[0], plan.num_layers):
        block = block_flops(model, plan, index, seq_length)
        total += block.weights + 2.0 * block.activations
        if index in learning:
            total += block.weights if train == "inserted" else _value_flops(model, plan)
    return total + 2.0 * model.hidden_size * model.vocab_size


def kv_bytes_per_token(model: ModelConfig, plan: UpscalePlan, dtype: str) -> int:
    """Bytes of key/value cache for one token of one sequence, over all blocks that have an attention."""
    attentions = sum(_has_attention(plan, index) for index in range(plan.num_layers))
    return attentions * 2 * model.num_query_groups * model.kv_channels * BYTES[dtype]


def training_bytes(model: ModelConfig, plan: UpscalePlan, dtype: str, *, train: Train) -> int:
    """Bytes of weights, gradients and AdamW state of a whole model in training, without activations.

    A trained parameter in 16 bits takes 18 bytes (weight 2, fp32 gradient, master weight and two moments 4 each), in
    32 bits 16 bytes (no separate master); a frozen one takes its weight alone.
    """
    total = total_parameters(model, plan)
    trained = trainable_parameters(model, plan, train)
    per_trained = 16 if BYTES[dtype] == 4 else 18
    return (total - trained) * BYTES[dtype] + trained * per_trained


@dataclasses.dataclass(frozen=True)
class Cost:
    """The figures of ``--dry-run``; the base's are those of the same model without the inserted blocks."""

    seq_length: int
    dtype: str
    parameters: int
    base_parameters: int
    active_parameters: int
    base_active_parameters: int
    trainable_inserted: int
    forward_flops: float
    base_forward_flops: float
    training_flops: float
    kv_bytes: int
    base_kv_bytes: int
    weight_bytes: int
    training_bytes_inserted: int
    training_bytes_all: int

    @property
    def added_parameters(self) -> int:
        return self.parameters - self.base_parameters


def cost_of(model: ModelConfig, plan: UpscalePlan, *, seq_length: int, dtype: str) -> Cost:
    """All figures of an up-scaled model beside its base's.

    Args:
        model: architecture of the base.
        plan: the up-scaled model.
        seq_length: tokens of a sequence, for the attention's share of the FLOPs.
        dtype: ``float32``, ``bfloat16`` or ``float16``: of weights and key/value cache.
    """
    base = plan.base_plan
    parameters = total_parameters(model, plan)
    return Cost(
        seq_length=seq_length,
        dtype=dtype,
        parameters=parameters,
        base_parameters=total_parameters(model, base),
        active_parameters=active_parameters(model, plan),
        base_active_parameters=active_parameters(model, base),
        trainable_inserted=trainable_parameters(model, plan, "inserted"),
        forward_flops=forward_flops_per_token(model, plan, seq_length),
        base_forward_flops=forward_flops_per_token(model, base, seq_length),
        training_flops=flops_per_token(model, plan, seq_length, train="inserted"),
        kv_bytes=kv_bytes_per_token(model, plan, dtype),
        base_kv_bytes=kv_bytes_per_token(model, base, dtype),
        weight_bytes=parameters * BYTES[dtype],
        training_bytes_inserted=training_bytes(model, plan, dtype, train="inserted"),
        training_bytes_all=training_bytes(model, plan, dtype, train="all"),
    )
