"""Over how many tensor-parallel ranks a model can be split, from its sizes alone."""

from __future__ import annotations

from megatron_midus.config import ModelConfig
from megatron_midus.errors import UserError
from megatron_midus.upscaling.plan import UpscalePlan


def _axes(model: ModelConfig, plan: UpscalePlan) -> dict[str, int]:
    """What every rank takes an equal part of."""
    axes = {"num_attention_heads": model.num_attention_heads}
    if model.num_moe_experts is None:  # experts have parallel sizes of their own
        axes["ffn_hidden_size"] = model.ffn_hidden_size
    if plan.memory is not None:
        axes["memory heads"] = plan.memory.num_memory_heads(model.num_attention_heads)
    return axes


def tensor_parallel_sizes(model: ModelConfig, plan: UpscalePlan) -> list[int]:
    """All sizes that divide heads, channels of the MLP and memory heads. Query groups are split, or where there are
    fewer of them than ranks each is shared by a whole number of ranks."""
    groups = model.num_query_groups
    return [
        size
        for size in range(1, model.num_attention_heads + 1)
        if all(axis % size == 0 for axis in _axes(model, plan).values()) and (groups % size == 0 or size % groups == 0)
    ]


def check_tensor_parallel_size(model: ModelConfig, plan: UpscalePlan, size: int, *, name: str) -> None:
    """Raises ``ValueError`` when the model cannot be split over ``size`` ranks.

    Args:
        name: of the flag that said so.
    """
    choices = tensor_parallel_sizes(model, plan)
    if size not in choices:
        axes = {**_axes(model, plan), "num_query_groups": model.num_query_groups}
        described = ", ".join(f"{axis}={count}" for axis, count in axes.items())
        raise UserError(f"{described} cannot be split over {name}={size}; choose one of {choices}")
