"""Fills the tensors of an up-scaled model from those of its base, one at a time and in any order."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import torch

from megatron_midus.config import ModelConfig
from megatron_midus.errors import UserError
from megatron_midus.ops import initialize_parameter
from megatron_midus.upscaling.plan import Block, UpscalePlan
from megatron_midus.upscaling.tensors import (
    ATTENTION_OUTPUT,
    POST_ATTENTION_NORM,
    Shape,
    TensorSource,
    is_block_output,
    layer_name,
    model_shapes,
    split_name,
)
from megatron_midus.upscaling.transport import LayerFusion, Scale

# {parameter of a memory: what it is copied from}
_COPIED = {"memory.attn_proj": ATTENTION_OUTPUT, "memory.block_norm": POST_ATTENTION_NORM}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_dtype(name: str) -> torch.dtype | None:
    """``"bfloat16"`` -> ``torch.bfloat16``; ``"keep"`` -> ``None``; ``ValueError`` for anything else."""
    if name == "keep":
        return None
    if name not in DTYPES:
        raise UserError(f"dtype {name!r} is not known; choose one of keep, {', '.join(DTYPES)}")
    return DTYPES[name]


class UpscaledTensors:
    """The tensors of the up-scaled model; a ``TensorSource`` that reads from the base only when it is asked.

    A copy never shares storage with what it was copied from.

    Args:
        base: tensors of the base model under canonical names.
        model: architecture of the base.
        plan: the blocks; its ``seed`` and ``memory`` settings fill the memories.
        dtype: ``keep`` leaves every tensor as the base stores it (memory parameters take the dtype of the block they
            were copied from), otherwise every tensor is cast.
        calibrated: sub-keys by canonical name, ``[M, n, D/2]`` each, for ``memory_key_init="calibrated"``. Without
            them those keys are drawn uniformly, as long as nobody has measured the queries.
    """

    def __init__(
        self,
        base: TensorSource,
        model: ModelConfig,
        plan: UpscalePlan,
        *,
        dtype: str = "keep",
        calibrated: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        if model.num_layers != plan.num_base_layers:
            raise UserError(
                f"the plan is for a base of {plan.num_base_layers} layers, this one has {model.num_layers}; "
                "make a plan for it"
            )
        self._base = base
        self._plan = plan
        self._dtype = parse_dtype(dtype)
        self._calibrated = dict(calibrated or {})
        self._shapes = model_shapes(model, plan)
        self._fusing = threading.Lock()
        self._fused: tuple[int, LayerFusion] | None = None

    def names(self) -> Sequence[str]:
        return list(self._shapes)

    def shape(self, name: str) -> Shape:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        if self._dtype is not None:
            return self._dtype
        index, suffix = split_name(name)
        if index is None:
            return self._base.dtype(name)
        block = self._plan.blocks[index]
        return self._base.dtype(layer_name(block.source[0], suffix if block.is_kept else _base_suffix(suffix)))

    def read(self, name: str) -> torch.Tensor:
        index, suffix = split_name(name)
        if index is None:
            tensor = self._base.read(name)
        else:
            tensor = self._read_block(self._plan.blocks[index], index, suffix)
        assert tuple(tensor.shape) == self._shapes[name], (name, tuple(tensor.shape), self._shapes[name])
        return tensor.to(self.dtype(name))

    def _read_block(self, block: Block, index: int, suffix: str) -> torch.Tensor:
        if block.init == "memory":
            return self._read_memory_block(block, index, suffix)
        if block.init in ("transport", "transport_literal") and not is_block_output(suffix):
            return self._fusion(index).tensor(suffix)
        sources = [self._base.read(layer_name(source, suffix)) for source in block.source]
        if block.init == "mean":
            # fp32: the mean of two bf16 values is not always one that bf16 addition finds.
            return torch.stack([tensor.float() for tensor in sources]).mean(dim=0).to(sources[0].dtype)
        if block.init != "exact" and is_block_output(suffix):
            return torch.zeros_like(sources[0])
        return sources[0] if block.is_kept else sources[0].clone()

    def _fusion(self, index: int) -> LayerFusion:
        """Of one block at a time: tensors are asked for block by block, and a transport plan is large."""
        # Threads of a converter are here at a time, at the end of one block and the beginning of the next.
        with self._fusing:
            if self._fused is None or self._fused[0] != index:
                block = self._plan.blocks[index]
                first, second = block.source
                scale: Scale = "literal" if block.init == "transport_literal" else "normalised"
                read = lambda layer, suffix: self._base.read(layer_name(layer, suffix))  # noqa: E731
                self._fused = (index, LayerFusion(read, first, second, scale))
            return self._fused[1]

    def _read_memory_block(self, block: Block, index: int, suffix: str) -> torch.Tensor:
        if _copies_base(suffix):
            return self._base.read(layer_name(block.source[0], _base_suffix(suffix))).clone()
        name = layer_name(index, suffix)
        if name in self._calibrated:
            return self._calibrated[name].clone()
        memory = self._plan.memory
        assert memory is not None
        return initialize_parameter(
            suffix.removeprefix("memory."),
            self._shapes[name],
            key_init=memory.memory_key_init,
            query_scale=memory.memory_query_scale,
            seed=self._plan.seed,
            layer_index=index,
            dtype=self.dtype(name),
        )


def _copies_base(suffix: str) -> bool:
    """Whether a tensor of a Memory block is copied from the base."""
    return not suffix.startswith("memory.") or suffix in _COPIED


def _base_suffix(suffix: str) -> str:
    """Name in the source layer of what a tensor of any block is copied from, or takes its dtype from."""
    if suffix.startswith("memory."):
        return _COPIED.get(suffix, ATTENTION_OUTPUT)
    return suffix.replace("mem_attn.", "self_attn.", 1)
