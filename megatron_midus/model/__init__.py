"""The up-scaled GPT as Megatron-Core specs: norm, attention, Memory layer, builder, weights in checkpoints."""

from megatron_midus.model.builder import build_model, freeze
from megatron_midus.model.config import make_transformer_config
from megatron_midus.model.layer import MIDUSMemoryLayer
from megatron_midus.model.specs import get_midus_block_spec, get_midus_layer_spec

__all__ = [
    "MIDUSMemoryLayer",
    "build_model",
    "freeze",
    "get_midus_block_spec",
    "get_midus_layer_spec",
    "make_transformer_config",
]
