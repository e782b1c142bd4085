"""Which files of a Hugging Face directory hold its weights: the choice of transformers, for all who read any."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from megatron_midus.errors import UserError
from megatron_midus.json_files import read_json_object

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class WeightFiles(NamedTuple):
    """The files that are read, by their names relative to the directory."""

    names: list[str]
    """safetensors files, sorted; every one exists. Empty: there is none that transformers would read."""
    index: str | None = None
    """The index that named them, ``None`` for a single file."""
    placed: dict[str, str] = {}
    """``{tensor: file}`` as the index says."""


def find_weight_files(directory: str | Path) -> WeightFiles:
    """What ``from_pretrained(directory)`` reads where it reads safetensors.

    The order is transformers': the file that ``transformers_weights`` in ``config.json`` names, the single file, the
    index. So an index beside a single file, left there by an earlier sharded save, says nothing, and neither do files of
    a variant (``model.fp16.safetensors``).

    Raises:
        ValueError: an index that is none, or a file that it or ``config.json`` names and that is not there.
    """
    directory = Path(directory)
    named = _named_by_config(directory)
    if named is None and (directory / WEIGHTS_FILE).is_file():
        named = WEIGHTS_FILE
    if named is None and (directory / INDEX_FILE).is_file():
        named = INDEX_FILE
    if named is None:
        return WeightFiles([])
    if not named.endswith(".index.json"):
        return WeightFiles([named])
    placed = _read_index(directory / named)
    names = sorted(set(placed.values()))
    for name in names:
        if not (directory / name).is_file():
            raise UserError(f"{directory / name} is named by {named} and does not exist; fetch the missing shard")
    return WeightFiles(names, named, placed)


def _named_by_config(directory: Path) -> str | None:
    """``transformers_weights`` of ``config.json``; a broken ``config.json`` is for its own reader to report."""
    try:
        config = read_json_object(directory / "config.json")
        name = config.get("transformers_weights")
    except (OSError, UserError):
        return None
    if name is None:
        return None
    where = f"config.json in {directory} has transformers_weights={name!r}"
    if not isinstance(name, str) or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise UserError(f"{where}, which is neither a safetensors file nor an index; take the entry out")
    root, path = os.path.abspath(directory), os.path.abspath(directory / name)
    if os.path.commonpath([root, path]) != root:
        raise UserError(f"{where}, which lies outside of it; take the entry out")
    if not (directory / name).is_file():
        raise UserError(f"{where}, which does not exist; fetch it or take the entry out")
    return name


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = read_json_object(path)["weight_map"]
        return {str(name): str(file_name) for name, file_name in weight_map.items()}
    except (UserError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a safetensors index ({type(error).__name__}: {error}); fetch it again"
        ) from None
