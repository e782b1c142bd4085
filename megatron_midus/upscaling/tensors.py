"""Names and shapes of every tensor of a decoder, base or up-scaled, in the canonical name space of docs/architecture.md."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from megatron_midus.config import MemoryConfig, ModelConfig
from megatron_midus.errors import UserError
from megatron_midus.upscaling.plan import UpscalePlan

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
OUTPUT_LAYER = "lm_head.weight"
ATTENTION_OUTPUT = "self_attn.o_proj.weight"
POST_ATTENTION_NORM = "post_attention_layernorm.weight"
ROUTER = "mlp.gate.weight"

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


class TensorSource(Protocol):
    """Anything that hands out named tensors one at a time: a directory on disk, or a rule that makes them."""

    def names(self) -> Sequence[str]:
        """Names of all tensors, in order."""

    def shape(self, name: str) -> Shape:
        """Shape of one tensor, without reading it."""

    def dtype(self, name: str) -> torch.dtype:
        """dtype of one tensor, without reading it."""

    def read(self, name: str) -> torch.Tensor:
        """The tensor itself, on the CPU."""


def split_name(name: str) -> tuple[int | None, str]:
    """``model.layers.3.mlp.up_proj.weight`` -> ``(3, "mlp.up_proj.weight")``; ``(None, name)`` outside the layers."""
    match = _LAYER.fullmatch(name)
    return (int(match.group(1)), match.group(2)) if match else (None, name)


def layer_name(index: int, suffix: str) -> str:
    """Inverse of ``split_name``."""
    return f"model.layers.{index}.{suffix}"


def attention_shapes(model: ModelConfig, prefix: str) -> dict[str, Shape]:
    """Query, key and value projections of one block and what belongs to them; no output projection."""
    widths = {
        "q": model.num_attention_heads * model.kv_channels,
        "k": model.num_query_groups * model.kv_channels,
        "v": model.num_query_groups * model.kv_channels,
    }
    shapes: dict[str, Shape] = {}
    for letter, width in widths.items():
        shapes[f"{prefix}.{letter}_proj.weight"] = (width, model.hidden_size)
        if model.add_qkv_bias:
            shapes[f"{prefix}.{letter}_proj.bias"] = (width,)
    if model.qk_layernorm:
        sizes = {letter: widths[letter] if model.qk_norm_width else model.kv_channels for letter in "qk"}
        shapes |= {f"{prefix}.{letter}_norm.weight": (size,) for letter, size in sizes.items()}
    return shapes


def expert_name(expert: int, projection: str) -> str:
    """``(3, "up_proj")`` -> ``mlp.experts.3.up_proj.weight``."""
    return f"mlp.experts.{expert}.{projection}.weight"


def is_block_output(suffix: str) -> bool:
    """Whether a tensor of a Transformer block writes to the residual stream: at zero the block adds nothing."""
    module, _, kind = suffix.rpartition(".")
    is_output = module == "self_attn.o_proj" or (module.startswith("mlp.") and module.endswith("down_proj"))
    return is_output and kind in ("weight", "bias")


def mlp_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Tensors of the MLP of one Transformer block, or of its router and experts; names without the layer prefix."""
    hidden, ffn = model.hidden_size, model.expert_ffn_hidden_size
    shapes: dict[str, Shape] = {"gate_proj": (ffn, hidden), "up_proj": (ffn, hidden), "down_proj": (hidden, ffn)}
    if model.num_moe_experts is None:
        return {f"mlp.{name}.weight": shape for name, shape in shapes.items()}
    experts = {
        expert_name(expert, name): shape for expert in range(model.num_moe_experts) for name, shape in shapes.items()
    }
    return {ROUTER: (model.num_moe_experts, hidden), **experts}


def norm_names(model: ModelConfig) -> dict[str, str | None]:
    """Canonical names of a Transformer block's norms by their place: before and behind its attention, and its MLP.

    They are those of the families in transformers, in which ``post_attention_layernorm`` stands before the MLP where no norm
    stands behind the attention.
    """
    before, behind = model.norm_before, model.norm_behind
    before_mlp = "pre_feedforward_layernorm.weight" if behind else POST_ATTENTION_NORM
    return {
        "before_attention": "input_layernorm.weight" if before else None,
        "behind_attention": POST_ATTENTION_NORM if behind else None,
        "before_mlp": before_mlp if before else None,
        "behind_mlp": "post_feedforward_layernorm.weight" if behind else None,
    }


def transformer_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Tensors of one Transformer block, names without the layer prefix."""
    hidden = model.hidden_size
    norms = norm_names(model)

    def norm(*places: str) -> dict[str, Shape]:
        return {name: (hidden,) for name in map(norms.get, places) if name is not None}

    shapes = {
        **norm("before_attention"),
        **attention_shapes(model, "self_attn"),
        ATTENTION_OUTPUT: (hidden, model.num_attention_heads * model.kv_channels),
        **norm("behind_attention", "before_mlp"),
        **mlp_shapes(model),
        **norm("behind_mlp"),
    }
    if model.add_output_bias:
        shapes["self_attn.o_proj.bias"] = (hidden,)
    if model.add_mlp_bias:
        sizes = {"gate": model.ffn_hidden_size, "up": model.ffn_hidden_size, "down": hidden}
        shapes |= {f"mlp.{part}_proj.bias": (size,) for part, size in sizes.items()}
    return shapes


def memory_shapes(model: ModelConfig, memory: MemoryConfig) -> dict[str, Shape]:
    """Tensors of one Memory block, names without the layer prefix.

    Raises:
        ValueError: a query that this model's blocks do not have, or a gate that their norms undo.
    """
    if memory.memory_domain_gate and model.norm_behind:
        raise UserError(
            f"--memory-domain-gate makes a memory's output smaller, and norm_placement={model.norm_placement} scales it up again; leave it out"
        )
    if memory.memory_query == "block" and (model.norm_placement != "pre" or model.residual_multiplier != 1.0):
        raise UserError(
            f"memory_query=block asks with what a block hands to its MLP, and norm_placement={model.norm_placement} with "
            f"residual_multiplier={model.residual_multiplier} makes that something else; choose another --memory-query"
        )
    parameters = memory.parameter_shapes(
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        kv_channels=model.kv_channels,
    )
    norms = norm_names(model)
    own = [name for name in (norms["before_attention"], norms["behind_attention"]) if name is not None]
    return {
        **{name: (model.hidden_size,) for name in own},
        **(attention_shapes(model, "mem_attn") if memory.has_attention else {}),
        **{f"memory.{name}": shape for name, shape in parameters.items()},
    }


def block_shapes(model: ModelConfig, plan: UpscalePlan, index: int) -> dict[str, Shape]:
    """Tensors of block ``index`` of the up-scaled model, names without the layer prefix."""
    if plan.blocks[index].kind == "memory":
        assert plan.memory is not None
        return memory_shapes(model, plan.memory)
    return transformer_shapes(model)


def model_shapes(model: ModelConfig, plan: UpscalePlan) -> dict[str, Shape]:
    """Every tensor of the up-scaled model in order; ``lm_head.weight`` is absent when it is tied.

    Args:
        model: the architecture; its ``num_layers`` does not matter, the plan's blocks do.
        plan: ``none`` gives the tensors of a base model.
    """
    shapes: dict[str, Shape] = {EMBEDDING: (model.vocab_size, model.hidden_size)}
    for index in range(plan.num_layers):
        shapes |= {layer_name(index, suffix): shape for suffix, shape in block_shapes(model, plan, index).items()}
    shapes[FINAL_NORM] = (model.hidden_size,)
    if not model.tie_word_embeddings:
        shapes[OUTPUT_LAYER] = (model.vocab_size, model.hidden_size)
    return shapes
