"""Hidden directories ``.NAME.TOKEN.partial`` for what is not whole yet: locked while their process lives, removed later.

    .NAME.TOKEN.partial/
        lock      held (flock) by the process that writes; the kernel lets go when it dies, however it dies
        content   what will be NAME
        old       the NAME that is being replaced, for the moment between two renames

Who takes the lock of such a directory knows that nobody writes there any more.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import socket
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from megatron_midus.mounts import mount_of

CONTENT = "content"
OLD = "old"
_LOCK = "lock"
# The token apart from what may be part of another name: the partial of `a.b` is none of `a`.
_NAME = re.compile(r"\.(.+)\.[0-9a-f]{12}\.partial", re.DOTALL)


def remove(path: str | Path) -> None:
    """Deletes a file or a directory, if there is one."""
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def partial_directory(target: Path, *, parent: Path | None = None) -> Iterator[Path]:
    """A locked directory for ``target``, in ``parent`` (by default beside it); gone at the end, with all that is in it."""
    directory, lock = make_partial(parent or target.parent, target.name)
    with lock:
        try:
            yield directory
        finally:
            destroy(directory, target)


def make_partial(parent: Path, name: str, token: str | None = None) -> tuple[Path, BinaryIO]:
    """``(directory, lock)``; whoever wants to keep the directory keeps the lock open.

    Args:
        parent: an existing directory.
        name: what it will be.
        token: of ``new_token``; tells it from others of the same name.
    """
    while True:
        directory = partial_path(parent, name, token or new_token())
        directory.mkdir()
        try:
            lock = open(directory / _LOCK, "x+b")  # noqa: SIM115
        except FileNotFoundError:
            continue  # a sweep came in between and took it for what a dead process had left
        # Some file systems have no locks. Nobody can take one there, so nobody removes this directory.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(_this_host().encode())
        lock.flush()
        if (directory / _LOCK).exists():
            return directory, lock
        lock.close()


def new_token() -> str:
    return uuid.uuid4().hex[:12]


def partial_path(parent: Path, name: str, token: str) -> Path:
    """Where ``make_partial`` puts it."""
    return parent / f".{name}.{token}.partial"


def bring_back(directory: Path, target: Path) -> None:
    """Gives a ``target`` that was set aside in a partial its place again, unless there is a new one."""
    if (directory / OLD).exists() and not target.exists():
        os.rename(directory / OLD, target)


def destroy(directory: Path, target: Path) -> None:
    """Deletes a partial of ``target`` whose lock is held, but never the only ``target`` there is.

    The lock goes last, so that a later run removes what a kill leaves.
    """
    with contextlib.suppress(OSError):
        bring_back(directory, target)
        for entry in list(directory.iterdir()):
            if entry.name != _LOCK:
                shutil.rmtree(entry, ignore_errors=True) if _is_directory(entry) else entry.unlink(missing_ok=True)
        if os.listdir(directory) != [_LOCK]:
            return  # another rank of a killed run is still writing here: for the next sweep, which needs the lock
        (directory / _LOCK).unlink()
        directory.rmdir()


def sweep(target: Path) -> None:
    """Removes the partials of ``target`` whose processes are dead, beside it and in it.

    One that died between setting the old ``target`` aside and putting the new one in its place: the old one comes back.
    """
    for parent in (target.parent, target):
        with contextlib.suppress(OSError):  # not there, or not ours to read
            for name in os.listdir(parent):
                if target_name(name) == target.name:
                    _sweep_one(parent / name, target)


def target_name(name: str) -> str | None:
    """Of what a directory of this name is a partial; ``None`` for any other name."""
    match = _NAME.fullmatch(name)
    return match and match[1]


def _sweep_one(directory: Path, target: Path) -> None:
    if not _is_directory(directory):
        return
    try:
        lock = open(directory / _LOCK, "r+b")  # noqa: SIM115
    except FileNotFoundError:
        with contextlib.suppress(OSError):
            directory.rmdir()  # killed before it had a lock; one with content is not of our making
        return
    except OSError:
        return  # somebody else's
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return  # alive
        except OSError:
            _say_unknown(directory)
            return
        mount = mount_of(directory)
        if mount is not None and mount.has_local_locks and lock.read().decode(errors="replace") != _this_host():
            _say_unknown(directory)
            return
        destroy(directory, target)


def _say_unknown(directory: Path) -> None:
    print(
        f"{directory} was left by another run, or one is writing it: locks do not tell on this file system. Delete it "
        "when no run is",
        file=sys.stderr,
    )


def _is_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _this_host() -> str:
    """A name for this start of this machine; containers share it as they share the machine's locks."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
