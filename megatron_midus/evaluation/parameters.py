"""Parameters of a model directory: total, inserted by up-scaling; from safetensors headers and the plan, no weights read."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megatron_midus.errors import UserError
from megatron_midus.json_files import read_json_object
from megatron_midus.upscaling import PLAN_FILE, UpscalePlan
from megatron_midus.weight_files import find_weight_files

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclasses.dataclass(frozen=True)
class ParameterCounts:
    """Counts of scalars; a tied output layer counts once."""

    total: int
    """All parameters."""
    added: int
    """Those of the blocks that up-scaling inserted; 0 without a plan."""
    trainable: int
    """What ``--train inserted`` changes: the inserted blocks, or the chosen layers of policy ``control``; all where there
    are none."""


def count_parameters(directory: str | Path, model: Any = None) -> ParameterCounts:
    """Counts the parameters of a model directory.

    Args:
        directory: a Hugging Face directory; ``midus_plan.json`` in it says which blocks were inserted.
        model: the loaded model, needed only for weights that are not safetensors.

    Raises:
        ValueError: damaged safetensors, a damaged plan, or neither safetensors nor a model.
    """
    directory = Path(directory)
    sizes = {name: math.prod(shape) for name, shape in read_safetensors_shapes(directory).items()}
    if sizes and _is_tied(directory):
        sizes.pop("lm_head.weight", None)
    if not sizes:
        if model is None:
            raise UserError(f"{directory} holds no safetensors, and no model was given to count in")
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    total = sum(sizes.values())
    if (directory / PLAN_FILE).is_file():
        plan = UpscalePlan.load(directory)
    elif "block_types" in (config := _read_config(directory)):
        plan = UpscalePlan.from_hf_config(config)
    else:
        return ParameterCounts(total=total, added=0, trainable=total)
    trainable = _in_layers(sizes, plan.inserted_indices)
    return ParameterCounts(total=total, added=_in_layers(sizes, plan.added_indices), trainable=trainable or total)


def _in_layers(sizes: dict[str, int], layers: tuple[int, ...]) -> int:
    """Scalars of the tensors that belong to ``layers``."""
    return sum(size for name, size in sizes.items() if (m := _LAYER.search(name)) and int(m.group(1)) in layers)


def _is_tied(directory: Path) -> bool:
    return bool(_read_config(directory).get("tie_word_embeddings"))


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    return read_json_object(path) if path.is_file() else {}


def check_safetensors(directory: str | Path) -> None:
    """Raises ``ValueError`` when a safetensors file of ``directory`` is missing, truncated or not one."""
    read_safetensors_shapes(directory)


def read_safetensors_shapes(directory: str | Path) -> dict[str, tuple[int, ...]]:
    """``{name: shape}`` over the files that transformers reads, by their headers; empty when there are no safetensors.

    Raises:
        ValueError: a shard of the index is missing, is cut off, or its header is not readable.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in find_weight_files(directory).names:
        path = Path(directory) / file
        try:
            with safe_open(path, framework="pt", device="cpu") as tensors:
                shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"{path} is damaged or cut off ({error}); copy the model again") from None
    return shapes
