"""Families whose files hold several tensors of a layer in one: apart while reading, together again while writing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from megatron_midus.config import ModelConfig
from megatron_midus.conversion.families import FAMILIES
from megatron_midus.upscaling import UpscalePlan
from megatron_midus.upscaling.tensors import Shape, TensorSource, layer_name, split_name


class SplittingReader(Protocol):
    """Files whose tensors can be named by parts."""

    def names(self) -> Sequence[str]: ...

    def split(self, name: str, parts: Mapping[str, int]) -> None: ...


def split_fused(reader: SplittingReader, model: ModelConfig, expected: Mapping[str, Shape]) -> None:
    """Gives the tensors of ``reader`` their canonical names, where its files hold several of them in one."""
    fused = FAMILIES[model.family].fused
    for name in reader.names():
        index, suffix = split_name(name)
        if index is not None and suffix in fused:
            parts = [layer_name(index, part) for part in fused[suffix]]
            reader.split(name, {part: expected.get(part, (0,))[0] for part in parts})


def file_layout(names: Sequence[str], model: ModelConfig, plan: UpscalePlan) -> dict[str, tuple[str, ...]]:
    """``{name in the files: canonical names}`` of a Hugging Face directory; MIDUS models have canonical names alone."""
    fused = {} if plan.memory_indices else FAMILIES[model.family].fused
    whole = {part: (suffix, parts) for suffix, parts in fused.items() for part in parts}
    layout: dict[str, tuple[str, ...]] = {}
    for name in names:
        index, suffix = split_name(name)
        if index is None or suffix not in whole:
            layout[name] = (name,)
            continue
        outer, parts = whole[suffix]
        layout[layer_name(index, outer)] = tuple(layer_name(index, part) for part in parts)
    return layout


def file_shapes(shapes: Mapping[str, Shape], model: ModelConfig, plan: UpscalePlan) -> dict[str, Shape]:
    """Shapes of the tensors as the files of a Hugging Face directory name them."""
    return {name: _joined(shapes, parts) for name, parts in file_layout(list(shapes), model, plan).items()}


def _joined(shapes: Mapping[str, Shape], parts: Sequence[str]) -> Shape:
    return (sum(shapes[part][0] for part in parts), *shapes[parts[0]][1:])


class FusedTensors:
    """A ``TensorSource`` that hands out the tensors of another as the files of the model's family hold them."""

    def __init__(self, source: TensorSource, model: ModelConfig, plan: UpscalePlan) -> None:
        self._source = source
        self._layout = file_layout(source.names(), model, plan)

    def names(self) -> Sequence[str]:
        return list(self._layout)

    def shape(self, name: str) -> Shape:
        parts = self._layout[name]
        return _joined({part: self._source.shape(part) for part in parts}, parts)

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(self._layout[name][0])

    def read(self, name: str) -> torch.Tensor:
        parts = [self._source.read(part) for part in self._layout[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
