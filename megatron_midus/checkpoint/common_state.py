"""The part of a torch_dist checkpoint that all ranks have alike, read without running anything that lies in it.

Megatron-Core before 0.19 keeps it in ``common.pt``, later ones under the key ``common_state`` beside the tensors. Upstream's
runs put objects there: ``argparse.Namespace``, signals, enums of whichever release wrote them. Each becomes a ``Foreign``,
which has the attributes that were stored and runs no code of theirs.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

COMMON_FILE = "common.pt"
_COMMON_KEY = "common_state/"  # and which part of how many, of which there is one


class Foreign:
    """Stands in for an object of another program: keeps its attributes and none of its behaviour."""

    def __new__(cls, *arguments: Any) -> Foreign:
        made = super().__new__(cls)
        made.arguments = arguments  # of an enum: its value
        return made

    arguments: tuple

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def read_common_state(directory: str | Path) -> dict[str, Any]:
    """What all ranks of a run stored alike; empty where a checkpoint has nothing of the kind.

    A state with objects that cannot be stood in for (as of a subclass of ``dict``) is empty too.

    Raises:
        Exception: whatever reading a damaged file raises; see ``corruption_named``.
    """
    path = Path(directory) / COMMON_FILE
    if path.is_file():
        return _load_inert(path.read_bytes())
    stored = _read_common_object(Path(directory))
    return {} if stored is None else (_load_inert(stored) or [{}])[0]


def _read_common_object(directory: Path) -> bytes | None:
    """The bytes that lie under ``common_state``; ``None`` where nothing does."""
    if not (directory / ".metadata").is_file():
        return None
    reader = dcp.FileSystemReader(directory)
    metadata = reader.read_metadata()
    entries = metadata.state_dict_metadata.items()
    key = next((k for k, v in entries if k.startswith(_COMMON_KEY) and isinstance(v, BytesStorageMetadata)), None)
    if key is None:
        return None
    reader.set_up_storage_reader(metadata, True)
    planner = _BytesPlanner()
    planner.set_up_planner({key: io.BytesIO()}, metadata, is_coordinator=True)
    reader.read_data(planner.create_local_plan(), planner).wait()
    return planner.content


class _BytesPlanner(DefaultLoadPlanner):
    """Keeps an object as the bytes that were stored; DCP's own planner would unpickle them, whatever they hold."""

    content = b""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.content = value.getvalue()


def _load_inert(content: bytes) -> Any:
    """``torch.load`` of plain data and tensors, everything else stood in for; ``{}`` where that is not possible."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(content))
    except ValueError as error:  # no zip file
        raise pickle.UnpicklingError(str(error)) from None
    with torch.serialization.safe_globals([(Foreign, name) for name in names]):
        try:
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            if not names:
                raise
            return {}
