"""Configuration: frozen dataclasses and the command-line flags made from them. Imports no torch."""

from megatron_midus.config.memory import MemoryConfig
from megatron_midus.config.model import ModelConfig, padded_vocab_size

__all__ = ["MemoryConfig", "ModelConfig", "padded_vocab_size"]
