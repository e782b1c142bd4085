"""Outputs are whole or absent: on a full disk, in directories that cannot be written, where a file is in the way."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import stat

import pytest

from megatron_midus.files import check_output_directory, check_output_file, staged_directory, write_text_atomically


@contextlib.contextmanager
def full_disk(num_bytes: int = 100):
    """No file of this process may pass ``num_bytes``."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_text_replaces_text(tmp_path):
    path = tmp_path / "made/on/the/way/a.json"
    for text in ("old", "größer"):
        write_text_atomically(path, text)
        assert path.read_text(encoding="utf-8") == text and os.listdir(path.parent) == ["a.json"]


@pytest.mark.parametrize("before", [None, "old"])
def test_a_full_disk_leaves_the_old_text(tmp_path, before):
    path = tmp_path / "a.json"
    if before is not None:
        path.write_text(before)
    with full_disk(), pytest.raises(OSError) as error:
        write_text_atomically(path, "x" * 101)
    assert error.value.errno == errno.EFBIG
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == ({} if before is None else {"a.json": before})


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_appears_when_it_is_whole(tmp_path, overwrite):
    target = tmp_path / "made/out"
    if overwrite:
        target.mkdir(parents=True)
        (target / "old").write_text("")
    with staged_directory(target, overwrite=overwrite) as staging:
        (staging / "new").write_text("whole")
        assert not (target / "new").exists()
    assert {p.name: p.read_text() for p in target.iterdir()} == {"new": "whole"} and os.listdir(target.parent) == [
        "out"
    ]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o777 & ~umask


@pytest.mark.parametrize("failure", [ValueError("no"), OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_directory(tmp_path, failure):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old").write_text("kept")
    with pytest.raises(type(failure)), staged_directory(tmp_path / "out", overwrite=True) as staging:
        (staging / "half").write_text("")
        raise failure
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["old"]


def test_what_cannot_be_an_output(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for check, path, message in (
        (check_output_file, tmp_path, "is a directory; name a file"),
        (check_output_file, tmp_path / "file/a", "file is not a writable directory, so"),
        (check_output_directory, tmp_path / "file", "is not a directory; choose another output"),
        (check_output_directory, tmp_path, "is not empty; choose another output directory, or give --overwrite"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            check(path)
        assert "\n" not in str(error.value)
    # The user of a container is root, whom no permission stops.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for check in (check_output_file, check_output_directory):
        with pytest.raises(ValueError, match=f"{tmp_path} is not .*writable"):
            check(tmp_path / "new")
    assert os.listdir(tmp_path) == ["file"]
