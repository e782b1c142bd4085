"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685) on every linear layer of the decoder, those of each expert
included; all else is frozen, routers too.

Shapes: s sequence, b batch, i and o the width before and behind a linear layer, r the rank, P the matrices of the Hugging
Face model that Megatron keeps in one weight (query, key, value; gate, up). Each of them has an adapter of its own.

Checkpoints hold the merged weight under the weight's usual key, so whatever reads them sees an ordinary model. What the
training goes on from, the frozen weight and the adapters, lies beside it under keys that begin with ``lora.``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_midus.model.builder import freeze_balance, routers
from megatron_midus.model.layer import layer_index

KEY_PREFIX = "lora."
_MODULE = "adapter"
# What the name of an entry with a merged weight ends with.
MERGED = "merged"
_LINEAR_LAYERS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


class Adapter(torch.nn.Module):
    """``scale * up(down(x))`` beside a linear layer, for each of the matrices in its weight.

    Args:
        weight: of the linear layer, ``[o, i]``; gives sizes, dtype and device.
        groups: the rows of the weight are so many repetitions of ``rows``.
        rows: of each matrix within one group, in order.
        rank: r.
        alpha: ``scale`` is ``alpha / rank``.
        seed: of ``down``; ``up`` is zero, so nothing changes before the first step.
    """

    def __init__(
        self, weight: torch.Tensor, *, groups: int, rows: Sequence[int], rank: int, alpha: float, seed: int
    ) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        assert groups * sum(rows) == outputs, (groups, rows, outputs)
        self.groups, self.rows, self.rank, self.scale = groups, tuple(rows), rank, alpha / rank
        self.is_on = True
        generator = torch.Generator().manual_seed(seed)
        bound = 1 / math.sqrt(inputs)
        down = torch.empty(len(rows) * rank, inputs).uniform_(-bound, bound, generator=generator)
        self.down = torch.nn.Parameter(down.to(weight))  # [P*r, i]
        self.up = torch.nn.Parameter(weight.new_zeros(outputs, rank))  # [o, r], in the order of the weight's rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., i]`` to ``[..., o]``."""
        return self._apply_to(x, self.down, self.up)

    def _apply_to(self, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        low = F.linear(x, down).split(self.rank, dim=-1)
        ups = up.view(self.groups, -1, self.rank).split(self.rows, dim=1)
        parts = [F.linear(a, b.reshape(-1, self.rank)).unflatten(-1, (self.groups, -1)) for a, b in zip(low, ups)]
        return torch.cat(parts, dim=-1).flatten(-2) * self.scale

    @torch.no_grad()
    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """``weight`` with the adapter added, ``[o, i]``; computed in fp32."""
        eye = torch.eye(weight.shape[1], device=weight.device)
        return (weight.float() + self._apply_to(eye, self.down.float(), self.up.float()).T).to(weight.dtype)


def add_adapters(
    model_chunks: Sequence[torch.nn.Module], config: TransformerConfig, *, rank: int, alpha: float, seed: int
) -> None:
    """Adds an adapter, the only thing that learns, to every linear layer of every block; a memory or a router is none."""
    for chunk in model_chunks:
        chunk.requires_grad_(False)
        for layer in (module for module in chunk.modules() if isinstance(module, TransformerLayer)):
            for number, name, linear in _linear_layers(layer):
                groups, rows = _rows(name, config, linear.weight.shape[0])
                adapter = Adapter(
                    linear.weight,
                    groups=groups,
                    rows=rows,
                    rank=rank,
                    alpha=alpha,
                    seed=seed + 1000 * layer_index(layer) * len(_LINEAR_LAYERS) + number,
                )
                for parameter in adapter.parameters():
                    # Gradients of experts are summed over the ranks that hold the same ones.
                    parameter.allreduce = getattr(linear.weight, "allreduce", True)
                linear.add_module(_MODULE, adapter)
                linear.register_forward_hook(_add_output)
        for router in routers(chunk):
            freeze_balance(router)


def _linear_layers(layer: TransformerLayer) -> Iterator[tuple[int, str, Any]]:
    """``(number, name, module)`` of the linear layers that this rank holds of a block; an expert has the same number on
    whichever rank it lies."""
    for number, name in enumerate(_LINEAR_LAYERS):
        linear = _submodule(layer, name)
        if isinstance(linear, (ColumnParallelLinear, RowParallelLinear)):
            yield 1000 * number, name, linear
    if isinstance(layer.mlp, MoELayer):
        for expert, mlp in zip(layer.mlp.local_expert_indices, layer.mlp.experts.local_experts):
            yield 2000 + 1 + expert, "mlp.linear_fc1", mlp.linear_fc1
            yield 3000 + 1 + expert, "mlp.linear_fc2", mlp.linear_fc2


def _submodule(layer: torch.nn.Module, name: str) -> torch.nn.Module | None:
    parent, _, child = name.partition(".")
    return getattr(getattr(layer, parent, None), child, None)


def _rows(name: str, config: TransformerConfig, outputs: int) -> tuple[int, list[int]]:
    """Groups, and the rows of each matrix in one of them; see docs/architecture.md, names of tensors."""
    if name.endswith("linear_qkv"):
        groups = config.num_query_groups
        return groups, [config.num_attention_heads // groups * config.kv_channels, *[config.kv_channels] * 2]
    if name.endswith("linear_fc1") and config.gated_linear_unit:
        return 1, [outputs // 2] * 2
    return 1, [outputs]


def _add_output(linear: Any, inputs: tuple, output: tuple) -> tuple:
    """Forward hook of a linear layer of Megatron, whose result is (output, bias)."""
    if not linear.adapter.is_on:
        return output
    return (output[0] + linear.adapter(inputs[0]), *output[1:])


def adapters(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and modules of the linear layers that have one."""
    return (
        (name, module) for name, module in model.named_modules() if isinstance(getattr(module, _MODULE, None), Adapter)
    )


@contextlib.contextmanager
def adapters_off(model: torch.nn.Module) -> Iterator[None]:
    """Inside, adapters contribute nothing."""
    found = [linear.adapter for _, linear in adapters(model)]
    for adapter in found:
        adapter.is_on = False
    try:
        yield
    finally:
        for adapter in found:
            adapter.is_on = True


def merge_state(model: torch.nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Gives a sharded state dict the keys of this file's head: merged weights as usual, the rest under ``lora.``."""
    state = dict(state)
    for name, linear in adapters(model):
        weight = state[f"{name}.weight"]
        state[f"{name}.{MERGED}"] = dataclasses.replace(weight, data=linear.adapter.merged(linear.weight))
        for entry in (f"{name}.weight", f"{name}.{_MODULE}.down", f"{name}.{_MODULE}.up"):
            state[entry] = dataclasses.replace(state[entry], key=KEY_PREFIX + state[entry].key)
    return state
