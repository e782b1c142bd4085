"""MIDUSMemoryLayer, the decoder layer without an MLP, and the only place that knows Megatron's 1-based layer numbers."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import make_viewless_tensor


class MIDUSMemoryLayer(TransformerLayer):
    """A Memory block: ``x + memory(attention_heads(norm(x)))`` (Kim et al., MIDUS, arXiv 2512.13751).

    Everything but the memory is the stock layer, so recompute, KV cache and sharded checkpoints work as there: the
    memory is the ``linear_proj`` of the layer's attention, and there is no MLP after the residual addition.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert isinstance(self.mlp, IdentityOp), "a Memory block has no MLP"

    def _forward_mlp(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """``[s, b, h]`` unchanged; pipeline schedules want a tensor that is no view."""
        return make_viewless_tensor(inp=hidden_states, requires_grad=hidden_states.requires_grad, keep_graph=True)


def layer_index(layer: TransformerLayer) -> int:
    """0-based position of a layer in the whole decoder, all pipeline stages counted."""
    return layer.layer_number - 1
