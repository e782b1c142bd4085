"""Models by their name on the Hugging Face hub: found in the local cache, never fetched."""

from __future__ import annotations

import os
import re
from pathlib import Path

from megatron_midus.errors import UserError

_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SNAPSHOT = re.compile(r"models--.+?--(?P<name>[^/]+)/snapshots/[^/]+$")


def local_model(name: str | os.PathLike) -> str:
    """The directory of a model: ``name`` itself, or of ``org/name`` the snapshot in the local Hugging Face cache.

    A name that cannot be one of the hub's is handed back, for the reader to say what is wrong with it.

    Raises:
        UserError: neither a directory nor in the cache; ends with the command that fetches it.
    """
    text = os.fspath(name)
    if Path(text).exists() or not _NAME.fullmatch(text) or text.startswith("."):
        return text
    found = cached_model(text)
    if found is None:
        raise UserError(
            f"{text} does not exist and is not in the local Hugging Face cache; if it is a model of the hub, get it "
            f"with: hf download {text}"
        )
    return found


def cached_model(name: str) -> str | None:
    """The snapshot of ``org/name`` in the local cache; ``None`` when it is not there."""
    if not _NAME.fullmatch(name):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return str(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def short_name(path: str | os.PathLike) -> str:
    """What to call the model at ``path``: the name of a cached one, the last part of any other path."""
    resolved = Path(path).resolve()
    found = _SNAPSHOT.search(resolved.as_posix())
    return found["name"] if found else resolved.name
