"""RMSNorms of the local backend: they work under sequence parallelism and follow transformers' order of operations."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint


class RMSNorm(torch.nn.Module):
    """``weight * (x / sqrt(mean(x^2) + eps))``, mean and root in fp32 (Zhang and Sennrich 2019, arXiv 1910.07467).

    Megatron's own fallback refuses sequence parallelism. The result is rounded to the input's dtype before the weight
    is applied, as ``LlamaRMSNorm`` does, so that fp32 logits of both worlds agree to the last bits.

    Args:
        config: of the model; with ``sequence_parallel`` the weight's gradient is summed over tensor-parallel ranks, with
            ``layernorm_zero_centered_gamma`` the factor is ``1 + weight``, with ``wide_norm`` (an attribute of ours) the
            result is rounded after the weight is applied.
        hidden_size: size of the last axis.
        eps: added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.is_centered = config.layernorm_zero_centered_gamma
        self.is_wide = getattr(config, "wide_norm", False)
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        start = torch.zeros if self.is_centered else torch.ones
        self.weight = torch.nn.Parameter(start(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., hidden_size]`` -> the same shape and dtype."""
        wide = hidden.float()
        return self._weigh(wide * torch.rsqrt(self._mean_square(wide) + self.eps), hidden.dtype)

    def _mean_square(self, wide: torch.Tensor) -> torch.Tensor:
        return wide.pow(2).mean(-1, keepdim=True)

    def _weigh(self, wide: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if self.is_centered:
            return (wide * (1.0 + self.weight.float())).to(dtype)
        return (self.weight * wide).to(dtype) if self.is_wide else self.weight * wide.to(dtype)


class HeadsNorm(RMSNorm):
    """One RMSNorm over all heads of a query or key, those of the other tensor-parallel ranks included (OLMo 2).

    Args:
        config: of the model.
        hidden_size: channels of one head; unused, part of Megatron's contract.
        eps: added to the mean square.
        num_heads: of the whole model; each rank has an equal part of them, and of the weight.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, *, num_heads: int) -> None:
        group = parallel_state.get_tensor_model_parallel_group()
        super().__init__(config, num_heads * config.kv_channels // group.size(), eps)
        self.tp_group, self.width = group, num_heads * config.kv_channels
        # Each rank's gradient is that of its own heads, over all positions.
        self.weight.sequence_parallel = False
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[s, b, heads/p, kv_channels]`` -> the same shape and dtype."""
        return super().forward(hidden.flatten(-2)).view(hidden.shape)

    def _mean_square(self, wide: torch.Tensor) -> torch.Tensor:
        if self.tp_group.size() == 1:
            return super()._mean_square(wide)
        # Flat: Megatron's all-reduce leaves a tensor that is not contiguous as it is, and says nothing; so would be the
        # gradient, which has the strides of the attention's.
        squares = reduce_from_tensor_model_parallel_region(wide.pow(2).sum(-1).flatten(), group=self.tp_group)
        # Every rank's channels depend on the sum, so its gradient is summed over the ranks as well.
        squares = copy_to_tensor_model_parallel_region(squares, group=self.tp_group)
        return squares.view(*wide.shape[:-1], 1) / self.width

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The weight as a sharded tensor of its global shape."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )
