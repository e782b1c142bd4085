"""Files that are whole or absent: everything is written beside its target and renamed."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_midus.errors import UserError


def remove(path: str | Path) -> None:
    """Deletes a file or a directory, if there is one."""
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_partials(target: str | Path) -> None:
    """Deletes what killed processes left beside ``target`` while they wrote it. Nobody may be writing it now."""
    target = Path(target)
    for partial in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
        remove(partial)


def check_output_directory(target: str | Path, *, overwrite: bool = False) -> Path:
    """Raises ``ValueError`` before any work is done when ``target`` cannot become a fresh output directory."""
    target = Path(target)
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} exists and is not a directory; choose another output")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise UserError(
            f"{target} exists and is not empty; choose another output directory, or give --overwrite to replace it"
        )
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        raise UserError(f"{parent} is not writable, so {target} cannot be made")
    return target


def check_output_file(target: str | Path) -> Path:
    """Raises ``ValueError`` before any work is done when ``target`` cannot become a file."""
    target = Path(target)
    if target.is_dir():
        raise UserError(f"{target} is a directory; name a file")
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{parent} is not a writable directory, so {target} cannot be written")
    return target


def check_writable_directory(target: str | Path, *, what: str) -> None:
    """Raises ``ValueError`` when no file can be made in ``target``, which need not exist yet. Leaves nothing behind.

    Args:
        what: the flag that names it.
    """
    place = Path(target).absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise UserError(f"{what} {target}: {place} is not a directory; choose another one")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(
            f"{what} {target} cannot be written ({place}: {error.strerror}); choose another directory"
        ) from None


@contextlib.contextmanager
def staged_directory(target: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty directory beside ``target`` that becomes ``target`` on success and vanishes on an exception."""
    target = check_output_directory(target, overwrite=overwrite)
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.absolute().parent))
    # mkdtemp makes 0700; an output directory follows the umask like any other.
    umask = os.umask(0)
    os.umask(umask)
    staging.chmod(0o777 & ~umask)
    try:
        yield staging
        if target.exists():
            shutil.rmtree(target)
        os.rename(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def write_text_atomically(target: str | Path, text: str) -> None:
    """Replaces ``target`` by ``text``; a reader sees the old content or the new, never a part."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
