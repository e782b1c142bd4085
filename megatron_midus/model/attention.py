"""Core attention of the local backend on torch's scaled_dot_product_attention, which never writes the score matrix; with
soft-capped scores in the open.

Shapes: s query positions, t key positions, b batch, a attention heads of this rank, g key/value heads of this rank,
d channels of one head.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_midus.errors import UserError


class SdpaAttention(MegatronModule):
    """Softmax attention with grouped key/value heads, causal masks, sliding windows and packed sequences.

    Takes the place of ``megatron.core.transformer.dot_product_attention.DotProductAttention``.

    Args:
        config: of the model: ``attention_dropout``, ``window_size`` (``(w - 1, 0)`` sees w positions, the own one
            included), ``context_parallel_size``, and an attribute of ours, ``attention_softcap``.
        layer_number: unused, part of Megatron's contract.
        attn_mask_type: ``causal``, or ``no_mask`` and ``padding`` for bidirectional attention.
        attention_type: unused, part of Megatron's contract.
        softmax_scale: factor on the scores; ``1 / sqrt(d)`` when absent.

    Raises:
        ValueError: for settings that this attention does not have.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        if config.context_parallel_size > 1:
            raise UserError(
                f"context_parallel_size={config.context_parallel_size} needs Transformer Engine's attention; "
                "choose --transformer-impl transformer_engine or 1"
            )
        if config.softmax_type != "vanilla":
            raise UserError(f"softmax_type={config.softmax_type!r} needs Transformer Engine's attention; use vanilla")
        self.softcap = getattr(config, "attention_softcap", None)
        self.causal = attn_mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal)
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.window = config.window_size[0] if config.window_size and config.window_size[0] >= 0 else None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attends.

        Args:
            query: ``[s, b, a, d]``; packed ``[s, a, d]``.
            key: ``[t, b, g, d]``; packed ``[t, g, d]``. With a cache t > s, and the queries are the last positions.
            value: as ``key``.
            attention_mask: bool, broadcastable to ``[b, a, s, t]``, True = not seen; joins the causal mask.
            attn_mask_type: ignored: for a cached step Megatron passes ``no_mask``, which several new positions at
                once must not have.
            attention_bias: refused.
            packed_seq_params: boundaries of packed sequences; none attends to another.

        Returns:
            ``[s, b, a*d]``; packed ``[s, a*d]``.
        """
        if attention_bias is not None:
            raise UserError("attention_bias needs Transformer Engine's attention; choose --transformer-impl local "
                             "without it")  # fmt: skip
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params)
        context = self._attend(query, key, value, attention_mask)  # [b, a, s, d]
        return context.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """``[s, b, a, d]``, two of ``[t, b, g, d]`` -> ``[b, a, s, d]``."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        seen = self._mask(query.shape[2], key.shape[2], attention_mask, query.device)
        dropout = self.dropout if self.training else 0.0
        if self.softcap is not None:
            return self._attend_capped(query, key, value, seen, dropout)
        with self._dropout_generator(dropout):
            return F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=seen,
                dropout_p=dropout,
                is_causal=seen is None and self.causal and query.shape[2] > 1,
                scale=self.softmax_scale,
            )

    def _attend_capped(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor | None, dropout: float
    ) -> torch.Tensor:
        """As torch's kernels, which cannot cap, all of ``[b, heads, positions, d]``; in the order of transformers."""
        assert self.softcap is not None
        scale = query.shape[-1] ** -0.5 if self.softmax_scale is None else self.softmax_scale
        scores = torch.tanh(query @ key.transpose(2, 3) * scale / self.softcap) * self.softcap  # [b, a, s, t]
        if seen is None and self.causal and query.shape[2] > 1:
            seen = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
        if seen is not None:
            scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
        with self._dropout_generator(dropout):
            weights = F.dropout(weights, dropout)
        return weights @ value

    def _mask(
        self, num_queries: int, num_keys: int, attention_mask: torch.Tensor | None, device: torch.device
    ) -> torch.Tensor | None:
        """Bool, broadcastable to ``[b, a, s, t]``, True = seen; ``None`` where ``is_causal`` alone says it all."""
        square = num_queries == num_keys
        windowed = self.window is not None and self.window < num_keys - 1
        if attention_mask is None and not windowed and (square or not self.causal or num_queries == 1):
            return None
        seen = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
        if self.causal:
            # The queries are the last positions, so the diagonal ends in the lower right corner.
            seen = seen.tril(num_keys - num_queries)
        if windowed:
            assert self.window is not None
            seen = seen.triu(num_keys - num_queries - self.window)
        return seen if attention_mask is None else seen & ~attention_mask

    def _dropout_generator(self, dropout: float) -> contextlib.AbstractContextManager:
        # Heads of different ranks drop differently; under sequence parallelism the whole block runs in this fork.
        if dropout == 0.0 or self.config.sequence_parallel:
            return contextlib.nullcontext()
        return get_cuda_rng_tracker().fork()

    def _packed(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSeqParams
    ) -> torch.Tensor:
        """One call per packed sequence: ``[s, a, d]``, two of ``[t, g, d]`` -> ``[s, a*d]``."""
        padded = packed.cu_seqlens_q_padded is not None
        query_ends = (packed.cu_seqlens_q_padded if padded else packed.cu_seqlens_q).tolist()
        key_ends = (packed.cu_seqlens_kv_padded if padded else packed.cu_seqlens_kv).tolist()
        parts = []
        for q0, q1, k0, k1 in zip(query_ends, query_ends[1:], key_ends, key_ends[1:]):
            context = self._attend(query[q0:q1, None], key[k0:k1, None], value[k0:k1, None], None)  # [1, a, s, d]
            parts.append(context[0].transpose(0, 1).flatten(1))
        return torch.cat(parts)
