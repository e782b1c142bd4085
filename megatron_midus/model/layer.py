"""MIDUSMemoryLayer, the decoder layer without an MLP, and what stands in it for the attention.

The only place that knows Megatron's 1-based layer numbers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import make_viewless_tensor

from megatron_midus.memory import HeadWiseMemory


class MIDUSMemoryLayer(TransformerLayer):
    """A Memory block: ``x + memory(attention_heads(norm(x)))`` (Kim et al., MIDUS, arXiv 2512.13751).

    Everything but the memory is the stock layer, so recompute, KV cache and sharded checkpoints work as there: the
    memory is the ``linear_proj`` of the layer's attention, and there is no MLP after the residual addition.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert isinstance(self.mlp, IdentityOp), "a Memory block has no MLP"

    def _forward_attention(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the stock layer; the memory may look at ``x``."""
        memory: HeadWiseMemory = self.self_attention.linear_proj
        memory.residual = hidden_states if memory.memory.reads_residual else None
        try:
            return super()._forward_attention(hidden_states, *args, **kwargs)
        finally:
            memory.residual = None

    def _forward_mlp(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """``[s, b, h]`` unchanged; pipeline schedules want a tensor that is no view."""
        return make_viewless_tensor(inp=hidden_states, requires_grad=hidden_states.requires_grad, keep_graph=True)


class MemoryAttention(SelfAttention):
    """The stock attention; its memory may look at ``norm(x)``, which is what it attends over."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        memory: HeadWiseMemory = self.linear_proj
        memory.normed = hidden_states if memory.memory.reads_normed else None
        try:
            return super().forward(hidden_states, *args, **kwargs)
        finally:
            memory.normed = None


@dataclasses.dataclass
class AttentionFreeSubmodules:
    """Named as in an attention, so that checkpoints call the memory alike."""

    linear_proj: ModuleSpec


class AttentionFree(MegatronModule):
    """In the place of an attention: the memory alone, which reads ``norm(x)`` (memory_attention none).

    Args:
        config: of the model.
        submodules: the memory.
        layer_number, attn_mask_type, cp_comm_type: unused, part of Megatron's contract.
        pg_collection: its ``tp`` group holds the memory's heads.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: AttentionFreeSubmodules,
        layer_number: int,
        attn_mask_type: Any = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config=config)
        self.linear_proj: HeadWiseMemory = build_module(
            submodules.linear_proj,
            config.num_attention_heads * config.kv_channels,
            config.hidden_size,
            config=config,
            tp_group=pg_collection.tp,
        )

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """``norm(x)`` ``[s, b, h]``, with sequence parallelism ``[s/p, b, h]``, to the memory's output of the same shape."""
        self.linear_proj.normed = hidden_states
        try:
            return self.linear_proj(None)
        finally:
            self.linear_proj.normed = None

    def backward_dw(self) -> None:
        """Nothing is left to do: weight gradients are computed with the others."""


def layer_index(layer: TransformerLayer) -> int:
    """0-based position of a layer in the whole decoder, all pipeline stages counted."""
    return layer.layer_number - 1
