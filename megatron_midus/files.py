"""Files that are whole or absent: everything is written beside its target and renamed, and what was there comes back on failure."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_midus.errors import UserError
from megatron_midus.mounts import is_mount_point
from megatron_midus.partials import CONTENT, OLD, bring_back, partial_directory, remove, sweep

__all__ = [
    "check_output_directory",
    "check_output_file",
    "check_writable_directory",
    "discard_directory",
    "remove",
    "remove_partials",
    "replace_directory",
    "staged_directory",
    "staged_file",
    "write_text_atomically",
]

# What a fresh file system has in it.
_NOT_CONTENT = {"lost+found"}


def remove_partials(target: str | Path) -> None:
    """Deletes what dead processes left beside ``target`` while they wrote it, and nothing that a living one writes."""
    sweep(_resolve(target))


def _resolve(target: str | Path) -> Path:
    """Absolute and without links: what is replaced is what a link points at, never the link."""
    try:
        return Path(target).resolve()
    except RuntimeError:  # until Python 3.12
        raise UserError(f"{target} is a link that leads to itself; choose another output") from None


# -- checks before any work ------------------------------------------------------------------------------------------
def check_output_directory(target: str | Path, *, overwrite: bool = False) -> Path:
    """Raises ``UserError`` before any work is done when ``target`` cannot become a fresh output directory.

    Returns:
        ``target``, absolute and without links.
    """
    shown, target = target, _resolve(target)
    if target.exists() and not target.is_dir():
        raise UserError(f"{shown} exists and is not a directory; choose another output")
    sweep(target)
    if target.is_dir() and not _is_empty(target):
        if not overwrite:
            raise UserError(
                f"{shown} exists and is not empty; choose another output directory, or give --overwrite to replace it"
            )
        reason = _reason_to_stay(target)
        if reason:
            raise UserError(
                f"{shown} {reason}, so it cannot be replaced as a whole; empty it, or name a directory in it"
            )
    parent = target if target.is_dir() and _reason_to_stay(target) else target.parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir():
        raise UserError(f"{parent} is not a directory, so {shown} cannot be made")
    if not os.access(parent, os.W_OK):
        raise UserError(f"{parent} is not writable, so {shown} cannot be made")
    return target


def _is_empty(directory: Path) -> bool:
    return not set(os.listdir(directory)) - (_NOT_CONTENT if is_mount_point(directory) else set())


def _reason_to_stay(directory: Path) -> str | None:
    """Why an existing directory has to be filled where it is and cannot give way to another one."""
    if is_mount_point(directory):
        return "is a mount point"
    with contextlib.suppress(FileNotFoundError):  # somebody deleted it
        if directory in (here := Path.cwd(), *here.parents):
            return "holds the working directory"
    if not os.access(directory.parent, os.W_OK):
        return f"lies in {directory.parent}, which is not writable"
    return None


def check_output_file(target: str | Path) -> Path:
    """Raises ``UserError`` before any work is done when ``target`` cannot become a file."""
    shown, target = target, _resolve(target)
    if target.is_dir():
        raise UserError(f"{shown} is a directory; name a file")
    if target.exists() and not target.is_file():
        return target  # a terminal, a pipe, /dev/null
    parent = target.parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{parent} is not a writable directory, so {shown} cannot be written")
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


# -- directories -----------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def staged_directory(target: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty directory on the file system of ``target`` that becomes ``target`` on success and vanishes on an exception.

    A mount point and the working directory cannot be renamed over: they are filled in place, at the end and by renames.
    When the finished directory cannot be put in its place, it is kept under a name that the error says.

    Raises:
        UserError: before any work, when ``target`` cannot become the output.
        OSError: the last renames failed; what was at ``target`` is there again.
    """
    target = check_output_directory(target, overwrite=overwrite)
    in_place = target.is_dir() and _reason_to_stay(target) is not None
    if not in_place:
        target.parent.mkdir(parents=True, exist_ok=True)
    with partial_directory(target, parent=target if in_place else None) as partial:
        staging = partial / CONTENT
        staging.mkdir()
        yield staging
        try:
            (_fill if in_place else replace_directory)(staging, target)
        except OSError as error:
            kept = _keep(staging, target)
            raise OSError(
                error.errno, f"{error.strerror}; the finished output is kept in {kept}", str(target)
            ) from error


def replace_directory(staging: Path, target: Path) -> None:
    """Renames ``staging``, a directory in a partial, to ``target``; an older ``target`` gives way at the last moment, and
    comes back when that fails, at the latest with the end of the partial."""
    try:
        if target.exists() and os.listdir(target):
            os.rename(target, staging.parent / OLD)
        os.rename(staging, target)
    except BaseException:
        bring_back(staging.parent, target)
        raise


def discard_directory(directory: Path) -> None:
    """Deletes a directory that others may be reading: it vanishes in one step."""
    with partial_directory(directory) as partial:
        os.rename(directory, partial / CONTENT)


def _fill(staging: Path, target: Path) -> None:
    """Moves what is in ``staging`` into the empty ``target``; takes it back when that fails."""
    moved: list[str] = []
    try:
        for name in sorted(os.listdir(staging)):
            os.rename(staging / name, target / name)
            moved.append(name)
    except BaseException:
        for name in moved:
            os.rename(target / name, staging / name)
        raise


def _keep(staging: Path, target: Path) -> Path:
    """Moves a finished directory out of its partial."""
    parent = staging.parent.parent
    names = (f"{target.name}.finished" + (f".{n}" if n else "") for n in range(1000))
    kept = next(parent / name for name in names if not os.path.lexists(parent / name))
    os.rename(staging, kept)
    return kept


# -- files -----------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def staged_file(target: str | Path) -> Iterator[Path]:
    """Yields the path of a file to write, with the name of ``target``, that replaces ``target`` on success.

    Any number of threads and processes may do so at a time: one of them is the last, and no reader sees a part. What is
    no regular file (a terminal, ``/dev/null``) or mounted alone is written to instead.
    """
    target = _resolve(target)
    if target.exists() and not target.is_file():
        yield target
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target)
    with partial_directory(target) as directory:
        partial = directory / target.name
        yield partial
        descriptor = os.open(partial, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        try:
            os.replace(partial, target)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            shutil.copyfile(partial, target)


def write_text_atomically(target: str | Path, text: str) -> None:
    """Replaces ``target`` by ``text``; a reader sees the old content or the new, never a part."""
    with staged_file(target) as partial:
        partial.write_text(text, encoding="utf-8")
