"""The mount that a path lies on, as the kernel lists it: where directories cannot be renamed, and whose locks reach how far."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

_TABLE = Path("/proc/self/mountinfo")
# NFS and Lustre: locks that other hosts do not see.
_LOCAL_LOCKS = {"localflock", "nolock", "local_lock=all", "local_lock=flock"}


@dataclasses.dataclass(frozen=True)
class Mount:
    """One line of the table.

    Attributes:
        point: where it is mounted, an absolute path.
        options: of the mount and of its file system.
    """

    point: str
    options: frozenset[str]

    @property
    def has_local_locks(self) -> bool:
        """Whether a lock taken here is unknown to other hosts that have mounted the same files."""
        return bool(self.options & _LOCAL_LOCKS)


def parse_mounts(table: str) -> list[Mount]:
    """The mounts of ``/proc/PID/mountinfo`` (proc(5)), in their order."""
    found = []
    for line in table.splitlines():
        before, _, after = line.partition(" - ")
        fields, rest = before.split(" "), after.split(" ")
        # Blanks and the like are written in octal.
        point = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), fields[4])
        found.append(Mount(point, frozenset([*fields[5].split(","), *rest[-1].split(",")])))
    return found


def mount_of(path: Path) -> Mount | None:
    """The mount that ``path``, absolute and without links, lies on; ``None`` where the system has no such table."""
    try:
        mounts = parse_mounts(_TABLE.read_text(encoding="utf-8", errors="surrogateescape"))
    except OSError:
        return None
    above = {str(path), *map(str, path.parents)}
    # The longest of them; the last one mounted there hides the others.
    return max((m for m in reversed(mounts) if m.point in above), key=lambda m: len(m.point), default=None)


def is_mount_point(path: Path) -> bool:
    """Whether something is mounted at ``path``, also a directory of the same file system, which ``os.path.ismount`` misses."""
    mount = mount_of(path)
    return os.path.ismount(path) if mount is None else mount.point == str(path)
