"""RMSNorm of the local backend: works under sequence parallelism and follows transformers' order of operations."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.Module):
    """``weight * (x / sqrt(mean(x^2) + eps))``, mean and root in fp32 (Zhang and Sennrich 2019, arXiv 1910.07467).

    Megatron's own fallback refuses sequence parallelism. The result is rounded to the input's dtype before the weight
    is applied, as ``LlamaRMSNorm`` does, so that fp32 logits of both worlds agree to the last bits.

    Args:
        config: of the model; with ``sequence_parallel`` the weight's gradient is summed over tensor-parallel ranks.
        hidden_size: size of the last axis.
        eps: added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., hidden_size]`` -> the same shape and dtype."""
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(hidden.dtype)
