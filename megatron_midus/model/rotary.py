"""Scaled rotary embeddings for Megatron: its own module, with the frequencies that transformers computes.

Megatron-Core knows ``llama3`` with constants of its own, and a ``yarn`` whose factors are not all settable; ``linear``
``dynamic`` and ``longrope`` it has not. Frequencies are ``[rotary_channels / 2]`` angles per position, fp32, bit for bit those of
``transformers.modeling_rope_utils``.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from megatron_midus.config import ModelConfig


class ScaledRotaryEmbedding(RotaryEmbedding):
    """Megatron's rotary embedding for a model with ``rope_scaling``, or with one of their own for the sliding layers.

    With a ``local_rotary_base`` its angles are those of the other layers, then those of the sliding ones; ``LayerAttention``
    takes its half.

    Args:
        model: its kv_channels, rotary_percent, rotary_base, rope_scaling and max_position_embeddings.
        options: of ``RotaryEmbedding``: use_cpu_initialization, cp_group.
    """

    def __init__(self, model: ModelConfig, **options: Any) -> None:
        super().__init__(
            model.kv_channels, rotary_percent=model.rotary_percent, rotary_base=model.rotary_base, **options
        )
        self.model = model
        self.local_inv_freq: torch.Tensor | None = None
        if model.local_rotary_base is not None:
            plain = dataclasses.replace(model, rotary_base=model.local_rotary_base, rope_scaling=None)
            self.local_inv_freq = scaled_frequencies(plain).to(self.inv_freq.device)
        self.inv_freq = scaled_frequencies(model).to(self.inv_freq.device)

    def get_emb(self, max_seq_len: int, offset: int = 0) -> torch.Tensor:
        main = super().get_emb(max_seq_len, offset)
        if self.local_inv_freq is None:
            return main
        positions = torch.arange(max_seq_len, device=main.device, dtype=main.dtype) + offset
        local = torch.outer(positions, self.local_inv_freq.to(main.device))
        return torch.cat((main, torch.cat((local, local), dim=-1)[:, None, None, :]), dim=-1)

    def get_freqs_non_repeated(self, max_seq_len: int, offset: int = 0) -> torch.Tensor:
        if (self.model.rope_scaling or {}).get("rope_type") in ("dynamic", "longrope"):
            # As transformers: one set of frequencies for a whole sequence, by its length.
            self.inv_freq = scaled_frequencies(self.model, max_seq_len + offset).to(self.inv_freq.device)
        return super().get_freqs_non_repeated(max_seq_len, offset)


def attention_settings(model: ModelConfig) -> dict[str, float]:
    """Attributes of ``TransformerConfig`` with which Megatron's attention scales cosines and sines as ``yarn`` and ``longrope`` ask.

    Megatron computes ``0.1 * mscale * log(scaling_factor) + 1``; a scaling factor of e makes any number of it.
    """
    factor = attention_factor(model.rope_scaling, model.max_position_embeddings)
    if factor == 1.0:
        return {}
    return {
        "yarn_rotary_scaling_factor": math.e,
        "yarn_mscale": 10 * (factor - 1),
        "yarn_mscale_all_dim": 0.0,
    }


def attention_factor(rope: dict[str, Any] | None, max_position_embeddings: int) -> float:
    """What cosines and sines are multiplied with; 1 for everything but ``yarn`` and ``longrope``."""
    if rope is None or rope["rope_type"] not in ("yarn", "longrope"):
        return 1.0
    if "attention_factor" in rope:
        return float(rope["attention_factor"])
    if rope["rope_type"] == "longrope":
        context = rope["original_max_position_embeddings"]
        stretch = rope.get("factor") or max_position_embeddings / context
        return 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(context))
    factor, mscale, mscale_all_dim = rope["factor"], rope.get("mscale"), rope.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return _yarn_scale(factor, mscale) / _yarn_scale(factor, mscale_all_dim)
    return _yarn_scale(factor, 1)


def _yarn_scale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def scaled_frequencies(model: ModelConfig, seq_length: int = 0) -> torch.Tensor:
    """``[rotary_channels / 2]``, on the CPU.

    Args:
        model: its ``rope_scaling`` (``config.rope.normalise_rope``) may be none.
        seq_length: tokens of the sequence; counts for ``dynamic`` beyond max_position_embeddings, for ``longrope`` beyond the
            original ones.
    """
    rope, base, size = model.rope_scaling or {"rope_type": "default"}, model.rotary_base, model.rotary_channels
    kind = rope["rope_type"]
    if kind == "dynamic" and seq_length > model.max_position_embeddings:
        # A tensor, so that the arithmetic is that of transformers: fp32.
        length = rope["factor"] * torch.tensor(seq_length) / model.max_position_embeddings
        base = base * (length - (rope["factor"] - 1)) ** (size / (size - 2))
    exponents = torch.arange(0, size, 2, dtype=torch.int64).float() / size
    if kind == "yarn":
        return _yarn_frequencies(base**exponents, model)
    if kind == "longrope":
        name = "long_factor" if seq_length > rope["original_max_position_embeddings"] else "short_factor"
        return 1.0 / (torch.tensor(rope[name], dtype=torch.float32) * base**exponents)
    frequencies = 1.0 / (base**exponents)
    if kind == "llama3":
        return _llama3_frequencies(frequencies, rope)
    return frequencies / rope["factor"] if kind == "linear" else frequencies


def _llama3_frequencies(frequencies: torch.Tensor, rope: dict[str, Any]) -> torch.Tensor:
    """Long wavelengths are stretched by ``factor``, short ones kept, those between interpolated (Llama 3.1)."""
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    context = rope["original_max_position_embeddings"]
    wavelengths = 2 * math.pi / frequencies
    stretched = torch.where(wavelengths > context / low, frequencies / factor, frequencies)
    smooth = (context / wavelengths - low) / (high - low)
    between = (1 - smooth) * stretched / factor + smooth * stretched
    is_between = ~(wavelengths < context / high) * ~(wavelengths > context / low)
    return torch.where(is_between, between, stretched)


def _yarn_frequencies(powers: torch.Tensor, model: ModelConfig) -> torch.Tensor:
    """Channels that turn often are kept, those that turn seldom stretched, with a ramp between (arXiv 2309.00071)."""
    rope, size = model.rope_scaling, model.rotary_channels
    assert rope is not None
    context = rope["original_max_position_embeddings"]

    def channel(rotations: float) -> float:
        """The channel that turns so often within the original context."""
        return (size * math.log(context / (rotations * 2 * math.pi))) / (2 * math.log(model.rotary_base))

    low, high = channel(rope.get("beta_fast") or 32), channel(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(size // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (rope["factor"] * powers) * (1 - kept) + 1.0 / powers * kept
