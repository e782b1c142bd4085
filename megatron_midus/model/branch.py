"""What a block does with the result of one of its branches, and what of its attention differs from layer to layer.

Everything here stands around stock modules of Megatron-Core, of either backend.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig

Rope = Literal["main", "local", "none"]


class BranchAddition(torch.nn.Module):
    """``residual + multiplier * norm(branch)``, in the place of Megatron's bias-dropout-add.

    The branch is what its last matrix put out after the sum over tensor-parallel ranks, or a memory's output, so the norm
    sees whole hidden states; under sequence parallelism its weight is marked as those of other norms.

    Args:
        config: of the model.
        norm: class of the norm; ``None`` = there is none.
        multiplier: factor on what is added.
    """

    def __init__(self, config: TransformerConfig, norm: type | None, multiplier: float) -> None:
        super().__init__()
        self.norm = None if norm is None else norm(
            config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
        )  # fmt: skip
        self.multiplier = multiplier

    def forward(self, training: bool, fused: bool) -> Callable[..., torch.Tensor]:
        """As ``get_bias_dropout_add``: a function of ``((output, bias), residual, dropout)``."""
        add = get_bias_dropout_add(training, fused)

        def weigh_and_add(output: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, dropout: float) -> torch.Tensor:  # fmt: skip
            branch, bias = output
            if bias is not None:
                branch = branch + bias
            if self.norm is not None:
                branch = self.norm(branch)
            if self.multiplier != 1.0:
                branch = branch * self.multiplier
            return add((branch, None), residual, dropout)

        return weigh_and_add


class LayerAttention(SelfAttention):
    """The stock attention, with the rotary embedding of its layer.

    Args:
        rope: ``main``, ``local`` (the second half of the angles that ``model/rotary.py`` makes) or ``none``.
        has_local: whether there are angles of two kinds.
    """

    def __init__(self, config: TransformerConfig, *args: Any, rope: Rope = "main", has_local: bool = False, **kwargs: Any) -> None:  # fmt: skip
        super().__init__(config, *args, **kwargs)
        self.rope, self.has_local = rope, has_local
        if rope == "local" and hasattr(self.config, "yarn_rotary_scaling_factor"):
            # The factor of a scaled embedding is not that of the plain one.
            self.config = copy.copy(self.config)
            del self.config.yarn_rotary_scaling_factor

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        angles = kwargs.get("rotary_pos_emb")
        if angles is not None and (self.rope == "none" or self.has_local):
            halves = {} if self.rope == "none" else dict(zip(("main", "local"), angles.chunk(2, dim=-1)))
            kwargs["rotary_pos_emb"] = halves.get(self.rope)
        return super().forward(hidden_states, *args, **kwargs)


def with_window(core_attention: type, window: int | None) -> type:
    """``core_attention`` with a sliding window of so many tokens, the own one included, whatever the model's config says."""

    def __init__(self: Any, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        config = copy.copy(config)
        config.window_size = None if window is None else (window - 1, 0)
        core_attention.__init__(self, config, *args, **kwargs)  # type: ignore[misc]

    return type(core_attention.__name__, (core_attention,), {"__init__": __init__})


def with_own_norms(attention: type) -> type:
    """``attention`` whose spec has norms of queries and keys although the model's config says that there are none.

    Megatron-Core refuses that since 0.19. In the model's config they stay unsaid, because Megatron would sum the gradients
    of these norms over tensor-parallel ranks.
    """

    def __init__(self: Any, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        config = copy.copy(config)
        config.qk_layernorm = True
        attention.__init__(self, config, *args, **kwargs)  # type: ignore[misc]

    return type(attention.__name__, (attention,), {"__init__": __init__})


def with_bias(linear: type, bias: bool) -> type:
    """A linear layer of Megatron with a bias, or without, whatever the model's config says."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        linear.__init__(self, *args, **{**kwargs, "bias": bias})  # type: ignore[misc]

    return type(linear.__name__, (linear,), {"__init__": __init__})
