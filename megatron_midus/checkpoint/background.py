"""How often text of the old domain reads each slot: a file of a checkpoint that midus background writes and training reads.

The file holds whole tensors, so every layout of processes can read it, and each rank reads its own heads alone. It
travels into every checkpoint of a run.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_midus.checkpoint.checksums import change_file
from megatron_midus.checkpoint.layout import BACKGROUND_FILE
from megatron_midus.errors import UserError
from megatron_midus.files import staged_file

_REMEDY = "count again with midus background"


@dataclasses.dataclass(frozen=True)
class SlotBackground:
    """Background of the slots of one Memory block: ``[N]`` where its heads share a bank, else ``[M, N]``, or some heads.

    Attributes:
        batches: int32, background batches that read the slot.
        reads: int64, reads of the slot in all of them.
    """

    batches: torch.Tensor
    reads: torch.Tensor


@dataclasses.dataclass(frozen=True)
class BackgroundHeader:
    """What the counts were made of.

    Attributes:
        num_batches: B.
        batch_size: sequences of a batch.
        seq_length: tokens of a sequence.
        iteration: of the checkpoint whose queries were counted.
    """

    num_batches: int
    batch_size: int
    seq_length: int
    iteration: int


def write_background(directory: str | Path, header: BackgroundHeader, blocks: dict[int, SlotBackground]) -> Path:
    """Puts the counts of all Memory blocks, by layer index, into a checkpoint, and their hash into its list."""
    tensors: dict[str, torch.Tensor] = {}
    for index, block in blocks.items():
        tensors |= {f"{index}.batches": block.batches.int().cpu(), f"{index}.reads": block.reads.long().cpu()}
    metadata = {name: str(value) for name, value in dataclasses.asdict(header).items()}
    path = Path(directory) / BACKGROUND_FILE

    def write() -> None:
        with staged_file(path) as staged:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, staged, metadata=metadata)

    change_file(directory, BACKGROUND_FILE, write)
    return path


def read_header(path: Path) -> BackgroundHeader:
    """Raises ``UserError`` for a file that is none of ours."""
    with _opened(path) as stored:
        return _header(stored, path)


def read_background(path: Path, layer_index: int, shape: tuple[int, ...], heads: slice | None = None) -> SlotBackground:
    """The counts of one Memory block.

    Args:
        shape: what is expected, ``[N]`` or, with ``heads``, ``[heads, N]``.
        heads: of this rank, where every head has a bank of its own.

    Raises:
        UserError: a block that was not counted, or one of another shape.
    """
    found = {}
    with _opened(path) as stored:
        for name in ("batches", "reads"):
            key = f"{layer_index}.{name}"
            if key not in stored.keys():  # noqa: SIM118 (it is no dictionary)
                raise UserError(f"{path} has no counts of Memory block {layer_index}; {_REMEDY}")
            part = stored.get_slice(key)
            if len(part.get_shape()) != len(shape):
                raise UserError(f"{path}: block {layer_index} has counts of shape {part.get_shape()}; {_REMEDY}")
            found[name] = part[:] if heads is None else part[heads]
            if tuple(found[name].shape) != shape:
                raise UserError(
                    f"{path}: block {layer_index} has {part.get_shape()[-1]} slots there and {shape[-1]} here; {_REMEDY}"
                )
    return SlotBackground(**found)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read ({error}); {_REMEDY}") from None


def _header(stored: Any, path: Path) -> BackgroundHeader:
    metadata = stored.metadata() or {}
    try:
        return BackgroundHeader(**{f.name: int(metadata[f.name]) for f in dataclasses.fields(BackgroundHeader)})
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} does not say what it was counted on ({error}); {_REMEDY}") from None
