"""The kernel's table of mounts: whose line is a path's, and what it says about locks."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_midus import mounts

TABLE = r"""22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
63 22 0:39 / /scratch/a\040b rw,relatime - lustre mgs:/scratch rw,localflock,lazystatfs
64 22 0:40 / /home rw - nfs4 server:/home rw,vers=4.2,local_lock=none
65 64 0:41 / /home/old rw master:3 - nfs server:/old rw,vers=3,nolock,local_lock=all
66 64 0:42 / /home/old rw - tmpfs none rw
"""


@pytest.fixture
def table(tmp_path, monkeypatch):
    (tmp_path / "mountinfo").write_text(TABLE)
    monkeypatch.setattr(mounts, "_TABLE", tmp_path / "mountinfo")


@pytest.mark.parametrize(
    ("path", "point", "local"),
    [
        ("/etc/x", "/", False),
        ("/scratch/a b/out", "/scratch/a b", True),
        ("/home/me", "/home", False),
        ("/home/old/x", "/home/old", False),  # the later mount hides the earlier one
        ("/homes", "/", False),
    ],
)
def test_the_longest_mount_above_a_path(table, path, point, local):
    found = mounts.mount_of(Path(path))
    assert found is not None and (found.point, found.has_local_locks) == (point, local)
    assert mounts.is_mount_point(Path(path)) == (path == point)


def test_a_mount_without_locks_on_other_hosts():
    assert [m.has_local_locks for m in mounts.parse_mounts(TABLE)] == [False, True, False, True, False]


def test_without_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(mounts, "_TABLE", tmp_path / "absent")
    assert mounts.mount_of(tmp_path) is None
    assert mounts.is_mount_point(Path("/")) and not mounts.is_mount_point(tmp_path)
