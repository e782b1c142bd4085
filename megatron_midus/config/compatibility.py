"""CompatibilityConfig: flags of Megatron launch scripts whose value the Llama-like architecture leaves no choice in."""

from __future__ import annotations

import dataclasses
from typing import Literal

from megatron_midus.errors import UserError

# Flags whose meaning hangs on a layer's number; inserting blocks would move them to other layers without a word.
DEPTH_DEPENDENT = (
    "apply_query_key_layer_scaling",
    "no_rope_freq",
    "window_attn_skip_freq",
    "first_last_layers_bf16",
)


@dataclasses.dataclass(frozen=True)
class CompatibilityConfig:
    """Flags of Megatron launch scripts (accepted where they say what holds anyway)"""

    make_vocab_size_divisible_by: int = 128
    """Pad the rows of the embedding to a multiple of this times --tensor-model-parallel-size."""

    untie_embeddings_and_output_weights: bool = False
    """Same as --no-tie-word-embeddings."""

    group_query_attention: bool = True
    """Attention has --num-query-groups key/value heads."""

    swiglu: bool = True
    """The MLP is gated by SiLU."""

    normalization: Literal["RMSNorm"] = "RMSNorm"
    """The norm of every block."""

    position_embedding_type: Literal["rope"] = "rope"
    """Positions are rotary."""

    disable_bias_linear: bool = True
    """Projections have no bias; those of queries, keys and values follow the checkpoint."""

    use_mcore_models: bool = True
    """The model is built from Megatron-Core."""

    ckpt_format: Literal["torch_dist"] = "torch_dist"
    """Format of checkpoints."""

    masked_softmax_fusion: bool = False
    """Fused masked softmax of the local backend."""

    gradient_accumulation_fusion: bool = False
    """Fused accumulation of weight gradients."""

    rope_fusion: bool = False
    """Fused rotary embedding."""

    apply_query_key_layer_scaling: bool = False
    """Scale attention scores by layer number."""

    no_rope_freq: int | None = None
    """Layers without rotary positions, counted by number."""

    window_attn_skip_freq: int | None = None
    """Layers without the sliding window, counted by number."""

    first_last_layers_bf16: bool = False
    """Keep the first and last layers in bf16 under FP8."""

    def __post_init__(self) -> None:
        if self.make_vocab_size_divisible_by < 1:
            raise UserError(f"make_vocab_size_divisible_by={self.make_vocab_size_divisible_by} must be at least 1")
        free = ("make_vocab_size_divisible_by", "untie_embeddings_and_output_weights")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in DEPTH_DEPENDENT and value != field.default:
                raise UserError(
                    f"{field.name}={value} depends on layer numbers, which inserted blocks shift; leave the flag out"
                )
            if field.name not in free and value != field.default:
                raise UserError(f"{field.name}={value} is not available here, only {field.default}; leave the flag out")
