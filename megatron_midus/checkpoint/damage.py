"""What reading a damaged checkpoint raises, told in one line."""

from __future__ import annotations

import contextlib
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from megatron_midus.errors import UserError


@contextlib.contextmanager
def corruption_named(directory: Path) -> Iterator[None]:
    """Turns the many ways in which unpickling a damaged file fails into one line."""
    try:
        yield
    except (
        CheckpointException,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        EOFError,
        RuntimeError,
        AttributeError,
        KeyError,
        UnicodeDecodeError,
    ) as error:
        raise UserError(f"{directory} is corrupt: {type(error).__name__}: {str(error).strip()[:200]}") from None
