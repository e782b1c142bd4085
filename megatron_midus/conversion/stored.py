"""How canonical tensors lie in Hugging Face files where it is not one each under its own name: renamed, or several in one.

All of it is a matter of places: the canonical tensors of a stored one follow each other in the file, byte after byte. So
readers and writers handle one canonical tensor at a time, however large the stored one is.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence

import torch

from megatron_midus.errors import UserError
from megatron_midus.upscaling.tensors import Shape, TensorSource, layer_name, split_name

_EXPERT = re.compile(r"(.*\.experts\.)(\d+)(\..*)")


@dataclasses.dataclass(frozen=True)
class Rule:
    """Tensors of a block that are stored as one, without the layer's prefix; ``*`` stands for the number of an expert.

    Attributes:
        name: in the files. Without a ``*`` the parts of all experts are in it, along an axis of their own.
        parts: canonical names, whose rows follow each other.
    """

    name: str
    parts: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor of a file: its shape, and the canonical ones that it holds, in order."""

    shape: Shape
    parts: tuple[str, ...]


# In memory since transformers 5, in files that it may write, and in exports of this package.
FUSED_EXPERTS = (
    Rule("mlp.experts.gate_up_proj", ("mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight")),
    Rule("mlp.experts.down_proj", ("mlp.experts.*.down_proj.weight",)),
)


def stored_layout(shapes: Mapping[str, Shape], rules: Sequence[Rule]) -> dict[str, Stored]:
    """``{name in the files: what it holds}`` of canonical tensors, in the order of the first of each."""
    rule_of = {part: rule for rule in rules for part in rule.parts}
    parts: dict[str, list[str]] = {}
    stacked: set[str] = set()
    orders: dict[str, tuple[int, int]] = {}  # as the rule lists them, one expert after the other
    for name in shapes:
        layer, suffix = split_name(name)
        expert = _EXPERT.fullmatch(suffix)
        pattern = f"{expert.group(1)}*{expert.group(3)}" if expert else suffix
        rule = rule_of.get(pattern)
        if rule is None or layer is None:
            parts[name] = [name]
            continue
        stored = layer_name(layer, rule.name.replace("*", expert.group(2)) if expert else rule.name)
        parts.setdefault(stored, []).append(name)
        orders[name] = (int(expert.group(2)) if expert else 0, rule.parts.index(pattern))
        if expert and "*" not in rule.name:
            stacked.add(stored)
    for held in parts.values():
        held.sort(key=lambda name: orders.get(name, (0, 0)))
    return {name: Stored(_shape(shapes, held, name in stacked), tuple(held)) for name, held in parts.items()}


def _shape(shapes: Mapping[str, Shape], parts: list[str], is_stacked: bool) -> Shape:
    if len(parts) == 1 and not is_stacked:
        return shapes[parts[0]]
    rest, rows = shapes[parts[0]][1:], sum(shapes[name][0] for name in parts)
    if not is_stacked:
        return (rows, *rest)
    experts = len({name.split(".experts.")[1].split(".")[0] for name in parts})
    return (experts, rows // experts, *rest)


def places(found: Mapping[str, Shape], expected: Mapping[str, Shape], rules: Sequence[Rule]) -> dict[str, list[tuple[str, int]]]:  # fmt: skip
    """Those of the tensors ``found`` that hold canonical ones under another name: ``{stored: [(canonical, first element)]}``.

    Args:
        found: shapes by name.
        expected: shapes of all canonical tensors.
        rules: of the family; fused experts are found as well.

    Raises:
        ValueError: one of them has another shape than the canonical ones, together, would have.
    """
    result: dict[str, list[tuple[str, int]]] = {}
    for name, stored in (stored_layout(expected, FUSED_EXPERTS) | stored_layout(expected, rules)).items():
        if name not in found or stored.parts == (name,):
            continue
        if tuple(found[name]) != stored.shape:
            raise UserError(f"tensor {name} has shape {list(found[name])}, its config asks for {list(stored.shape)}")
        sizes = [math.prod(expected[part]) for part in stored.parts]
        result[name] = list(zip(stored.parts, itertools.accumulate(sizes, initial=0)))
    return result


def canonical_shapes(
    found: Mapping[str, Shape], expected: Mapping[str, Shape], rules: Sequence[Rule]
) -> dict[str, Shape]:
    """The shapes ``found``, under canonical names."""
    result = dict(found)
    for name, parts in places(found, expected, rules).items():
        del result[name]
        result |= {part: expected[part] for part, _ in parts}
    return result


class StoredTensors:
    """A ``TensorSource`` of the tensors as they are stored, made of a source of canonical ones."""

    def __init__(self, source: TensorSource, rules: Sequence[Rule]) -> None:
        self._source = source
        self.layout = stored_layout({name: source.shape(name) for name in source.names()}, rules)
        for name, stored in self.layout.items():
            if len({source.dtype(part) for part in stored.parts}) > 1:
                raise UserError(f"{name} is made of tensors of different dtypes; choose one with --dtype")

    def names(self) -> Sequence[str]:
        return list(self.layout)

    def shape(self, name: str) -> Shape:
        return self.layout[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(self.layout[name].parts[0])

    def read(self, name: str) -> torch.Tensor:
        stored = self.layout[name]
        parts = [self._source.read(part) for part in stored.parts]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(stored.shape)
