"""Which blocks go to which pipeline stage: layout strings, and the split that makes the slowest stage as fast as it can be.

A Memory block costs less than a Transformer block and the logits of a large vocabulary cost as much as several, so equal
numbers of blocks are not equal work.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Sequence

from megatron_midus.config import ModelConfig
from megatron_midus.errors import UserError
from megatron_midus.upscaling.cost import BlockFlops, Train, block_flops
from megatron_midus.upscaling.plan import UpscalePlan


@dataclasses.dataclass(frozen=True)
class Device:
    """What makes seconds of FLOPs, bytes and comparisons: the shares of its peaks that training reaches.

    Attributes:
        matmul: FLOPs a second of matrix products.
        bandwidth: bytes a second from memory.
        selection: instructions of single lanes a second.
    """

    matmul: float
    bandwidth: float
    selection: float


# The Hopper generation in bf16. Only ratios matter for a split.
HOPPER = Device(matmul=4e14, bandwidth=3.5e12, selection=3e13)
# Finding k of 2 n sub-keys by iterated maxima takes this many such instructions per k * 2 n.
_STEPS_PER_CANDIDATE = 2.6


@dataclasses.dataclass(frozen=True)
class StageCosts:
    """Seconds that one token's share of a training step takes, forward and backward.

    Attributes:
        blocks: of each block of the decoder.
        embedding: of the look-up, on the first stage.
        logits: of the output layer and the loss, on the last stage.
    """

    blocks: tuple[float, ...]
    embedding: float
    logits: float


def estimate_costs(
    model: ModelConfig, plan: UpscalePlan, seq_length: int, *, train: Train = "all", device: Device = HOPPER
) -> StageCosts:
    """An estimate from FLOPs, from the bytes of the values that a memory reads and from its comparisons.

    Args:
        seq_length: tokens of a sequence, for the attention's share.
        train: ``inserted`` spares frozen blocks their weight gradients, and those before the first inserted one the
            whole backward pass; ``lora`` spares all blocks their weight gradients.
        device: what computes.
    """
    trained = [block.learns(train) for block in plan.blocks]
    first = 0 if train == "lora" else trained.index(True) if any(trained) else len(trained)
    blocks = tuple(
        _seconds(
            block_flops(model, plan, index, seq_length),
            device,
            is_trained=trained[index],
            has_backward=index >= first,
        )
        + (
            _memory_seconds(model, plan, device, has_backward=index >= first)
            if plan.blocks[index].kind == "memory"
            else 0.0
        )
        for index in range(plan.num_layers)
    )
    logits = BlockFlops(weights=2.0 * model.hidden_size * model.vocab_size, activations=0.0)
    return StageCosts(
        blocks=blocks,
        embedding=6.0 * model.hidden_size / device.bandwidth,
        logits=_seconds(logits, device, is_trained=train == "all", has_backward=first < len(trained)),
    )


def _seconds(flops: BlockFlops, device: Device, *, is_trained: bool, has_backward: bool) -> float:
    total = flops.weights + flops.activations
    if has_backward:
        total += flops.weights * (2 if is_trained else 1) + 2 * flops.activations
    return total / device.matmul


def _memory_seconds(model: ModelConfig, plan: UpscalePlan, device: Device, *, has_backward: bool) -> float:
    """What a memory does besides matrix products: it finds slots, reads values, and sums their gradients."""
    memory = plan.memory
    assert memory is not None
    heads = memory.num_memory_heads(model.num_attention_heads)
    shapes = memory.parameter_shapes(
        hidden_size=model.hidden_size, num_attention_heads=model.num_attention_heads, kv_channels=model.kv_channels
    )
    read = 2.0 * heads * memory.memory_topk * shapes["value_bank"][-1]  # bf16
    steps = _STEPS_PER_CANDIDATE * heads * memory.memory_topk * 2 * memory.memory_num_keys
    # Backward: the values again for the weights' gradient, and the sorted sum of fp32 rows, twice as wide.
    return steps / device.selection + read * (4 if has_backward else 1) / device.bandwidth


# -- the split -------------------------------------------------------------------------------------------------------
def partition_blocks(
    costs: Sequence[float], num_parts: int, *, embedding_cost: float = 0.0, logits_cost: float = 0.0
) -> list[int]:
    """Splits blocks, in order, into parts whose largest cost is as small as possible.

    Of all such splits it takes the most even one (the least sum of squares). With several model chunks per stage,
    ``num_parts`` is stages times chunks: in the interleaved schedule the stages work on one chunk each at a time, so
    the slowest chunk sets the pace.

    Args:
        costs: of each block.
        num_parts: parts; every part gets a block, but the last, which may hold the logits alone.
        embedding_cost: added to the first part.
        logits_cost: added to the last part.

    Returns:
        Blocks of each part.

    Raises:
        ValueError: more parts than blocks can fill, or a cost that is negative or not finite.
    """
    if not all(math.isfinite(c) and c >= 0 for c in (*costs, embedding_cost, logits_cost)):
        raise UserError(f"costs {list(costs)}, {embedding_cost} and {logits_cost} must be finite and not negative")
    needed = max(1, num_parts - 1)
    if num_parts < 1 or len(costs) < needed:
        raise UserError(f"{len(costs)} blocks cannot be split into {num_parts} parts; choose 1 to {len(costs) + 1}")
    split = _Split([0.0, *itertools.accumulate(costs)], num_parts, embedding_cost, logits_cost)
    bound = split.best(lambda so_far, cost: max(so_far, cost), limit=math.inf)[0]
    # Sums of the same numbers in another order differ in the last bits.
    return split.best(lambda so_far, cost: so_far + cost * cost, limit=bound * (1 + 1e-12))[1]


@dataclasses.dataclass(frozen=True)
class _Split:
    """A partition problem; ``ends[i]`` is the cost of the first i blocks."""

    ends: list[float]
    num_parts: int
    embedding_cost: float
    logits_cost: float

    def cost(self, part: int, begin: int, end: int) -> float:
        extra = (self.embedding_cost if part == 0 else 0.0) + (self.logits_cost if part == self.num_parts - 1 else 0.0)
        return self.ends[end] - self.ends[begin] + extra

    def best(self, combine: Callable[[float, float], float], limit: float) -> tuple[float, list[int]]:
        """Dynamic programme over (parts, blocks before): the least combined cost of parts that keep to the limit."""
        num_blocks = len(self.ends) - 1
        table: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
        for part in range(self.num_parts):
            is_last = part == self.num_parts - 1
            least = 0 if is_last and part > 0 else 1
            following: dict[int, tuple[float, list[int]]] = {}
            for begin, (so_far, sizes) in table.items():
                for end in [num_blocks] if is_last else range(begin + least, num_blocks + 1):
                    cost = self.cost(part, begin, end)
                    if end - begin < least or cost > limit:
                        continue
                    combined = combine(so_far, cost)
                    if end not in following or combined < following[end][0]:
                        following[end] = (combined, [*sizes, end - begin])
            table = following
        return table[num_blocks]


def balanced_layout(
    model: ModelConfig, plan: UpscalePlan, num_parts: int, *, seq_length: int, train: Train = "all"
) -> str:
    """The layout string of the best split of an up-scaled model into ``num_parts`` (stages times chunks)."""
    costs = estimate_costs(model, plan, seq_length, train=train)
    return format_layout(
        partition_blocks(costs.blocks, num_parts, embedding_cost=costs.embedding, logits_cost=costs.logits)
    )


# -- layout strings --------------------------------------------------------------------------------------------------
def format_layout(sizes: Sequence[int]) -> str:
    """``[2, 4]`` -> ``Ett|ttttL``, as Megatron-Core's ``pipeline_model_parallel_layout`` has it."""
    return "E" + "|".join("t" * size for size in sizes) + "L"


def parse_layout(text: str, *, num_layers: int, num_stages: int) -> list[int]:
    """Blocks of each part of a layout string; part ``i`` is chunk ``i // num_stages`` of stage ``i % num_stages``.

    Parts are separated by ``|``; ``E`` is the embedding, ``t`` a block of either kind, ``L`` output layer and loss.
    ``x*3`` and ``(tt|)*2`` repeat; commas and blanks are for the eye.

    Raises:
        ValueError: a string that does not place this model's blocks.
    """
    expanded = re.sub(r"[,\s]", "", text)
    for pattern in (r"\(([^()]+)\)\*(\d+)", r"(.)\*(\d+)"):
        expanded = re.sub(pattern, lambda match: match.group(1) * int(match.group(2)), expanded)
    if not re.fullmatch(r"E[t|]*L", expanded):
        raise UserError(
            f"pipeline_model_parallel_layout={text!r} reads {expanded!r}; it begins with E (embedding), ends with L "
            "(loss), and has one t for each block and | between stages, like 'Ettt|tttL'"
        )
    sizes = [part.count("t") for part in expanded.split("|")]
    if sum(sizes) != num_layers:
        raise UserError(
            f"pipeline_model_parallel_layout={text!r} places {sum(sizes)} blocks and the model has {num_layers}, "
            "inserted ones counted; change it or give auto"
        )
    if len(sizes) % num_stages:
        raise UserError(
            f"pipeline_model_parallel_layout={text!r} has {len(sizes)} parts, which is no multiple of "
            f"pipeline_model_parallel_size={num_stages}; change either"
        )
    if 0 in sizes[:-1]:
        raise UserError(
            f"pipeline_model_parallel_layout={text!r} leaves part {sizes.index(0)} without a block; only the last one "
            "may be, with L alone"
        )
    return sizes
