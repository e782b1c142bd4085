"""Outputs are whole or absent: on a full disk, in directories that cannot be written, where a file is in the way."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

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


def write_directory(target, *, overwrite=False):
    with staged_directory(target, overwrite=overwrite) as staging:
        (staging / "sub").mkdir()
        (staging / "sub/weights").write_text("new")
        (staging / "config").write_text("new")


def tree(directory):
    return {str(p.relative_to(directory)): p.read_text() for p in directory.rglob("*") if p.is_file()}


NEW = {"config": "new", "sub/weights": "new"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_link_is_followed(tmp_path, overwrite):
    """To an empty directory, to one that is replaced, and into nowhere."""
    real = tmp_path / "elsewhere/real"
    real.mkdir(parents=True)
    if overwrite:
        (real / "old").write_text("old")
    (tmp_path / "out").symlink_to(real)
    write_directory(tmp_path / "out", overwrite=overwrite)
    assert (tmp_path / "out").is_symlink() and tree(real) == NEW and os.listdir(real.parent) == ["real"]
    (tmp_path / "nowhere").symlink_to("not/yet")
    write_directory(tmp_path / "nowhere")
    assert tree(tmp_path / "not/yet") == NEW
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises((ValueError, OSError)):
        check_output_directory(tmp_path / "circle")
    (tmp_path / "a.json").symlink_to("elsewhere/a.json")
    write_text_atomically(tmp_path / "a.json", "text")
    assert (tmp_path / "a.json").is_symlink() and (tmp_path / "elsewhere/a.json").read_text() == "text"


@pytest.mark.parametrize("save", [".", "../out", ""])
def test_the_working_directory_is_filled_where_it_is(tmp_path, monkeypatch, save):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    before = os.stat(".").st_ino
    write_directory(save)
    # Who stands in it sees the files: it is the same directory.
    assert os.stat(tmp_path / "out").st_ino == before and os.getcwd() == str(tmp_path / "out")
    assert tree(tmp_path / "out") == NEW and os.listdir(tmp_path) == ["out"]
    with pytest.raises(ValueError, match="holds the working directory, so it cannot be replaced as a whole"):
        write_directory(save, overwrite=True)
    monkeypatch.chdir("sub")
    with pytest.raises(ValueError, match="holds the working directory"):
        write_directory("..", overwrite=True)
    assert tree(tmp_path / "out") == NEW


@pytest.mark.parametrize("failing", ["first", "second"])
def test_a_rename_that_fails_brings_the_old_directory_back_and_keeps_the_new_one(tmp_path, monkeypatch, failing):
    """The first one sets the old directory aside, the second one puts the new one in its place."""
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    real, calls = os.rename, []

    def rename(source, destination):
        calls.append(source)
        if len(calls) == {"first": 1, "second": 2}[failing]:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        real(source, destination)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match=f"the finished output is kept in {tmp_path}/out.finished"):
        write_directory(target, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["out", "out.finished"]
    assert tree(target) == {"old": "old"} and tree(tmp_path / "out.finished") == NEW


def test_a_signal_between_the_renames_brings_the_old_directory_back(tmp_path, monkeypatch):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    real = os.rename

    def rename(source, destination):
        real(source, destination)
        if str(source) == str(target):
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        write_directory(target, overwrite=True)
    assert os.listdir(tmp_path) == ["out"] and tree(target) == {"old": "old"}


def test_filling_in_place_takes_back_what_it_moved(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    real = os.rename

    def rename(source, destination):
        if str(destination) == str(tmp_path / "out/sub"):
            raise OSError(errno.EIO, "Input/output error")
        real(source, destination)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="kept in"):
        write_directory(".")
    assert os.listdir(tmp_path / "out") == ["out.finished"] and tree(tmp_path / "out/out.finished") == NEW


def test_an_empty_directory_in_one_that_cannot_be_written(tmp_path, monkeypatch):
    """As a container's volume is to a user who is not root."""
    (tmp_path / "out").mkdir()
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path) and real(path, mode))
    write_directory(tmp_path / "out")
    assert tree(tmp_path / "out") == NEW and os.listdir(tmp_path) == ["out"]
    with pytest.raises(ValueError, match=f"lies in {tmp_path}, which is not writable, so it cannot be replaced"):
        write_directory(tmp_path / "out", overwrite=True)


IN_OWN_MOUNTS = """
import os, subprocess, sys
from megatron_midus.errors import UserError
from megatron_midus.files import staged_directory, write_text_atomically
where, kind = sys.argv[1:]
volume = os.path.join(where, "volume")
mount = {"tmpfs": ["-t", "tmpfs", "none"], "bind": ["--bind", os.path.join(where, "source")]}[kind]
subprocess.run(["mount", *mount, volume], check=True)
os.mkdir(os.path.join(volume, "lost+found"))

def write(target, overwrite=False):
    with staged_directory(target, overwrite=overwrite) as staging:
        (staging / "model").write_text("new")

write(volume)
assert sorted(os.listdir(volume)) == ["lost+found", "model"], os.listdir(volume)
try:
    write(volume, overwrite=True)
except UserError as error:
    assert "is a mount point, so it cannot be replaced as a whole" in str(error), error
else:
    raise AssertionError("replaced a mount point")
write(os.path.join(volume, "below"))
write(os.path.join(volume, "below"), overwrite=True)
assert sorted(os.listdir(volume)) == ["below", "lost+found", "model"], os.listdir(volume)
# A link onto another file system.
os.symlink(os.path.join(volume, "far"), os.path.join(where, "link"))
write(os.path.join(where, "link"))
assert os.listdir(os.path.join(volume, "far")) == ["model"]
# One file mounted alone, as containers get it.
for name in ("host.json", "alone.json"):
    open(os.path.join(where, name), "w").close()
subprocess.run(["mount", "--bind", os.path.join(where, "host.json"), os.path.join(where, "alone.json")], check=True)
write_text_atomically(os.path.join(where, "alone.json"), "text")
assert open(os.path.join(where, "host.json")).read() == "text"
print(sorted(os.listdir(where)))
"""


@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
def test_a_mount_point_is_filled_where_it_is(tmp_path, kind):
    """A real one, seen by this process alone."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount: root, with CAP_SYS_ADMIN")
    for name in ("volume", "source"):
        (tmp_path / name).mkdir()
    done = subprocess.run(
        ["unshare", "-m", sys.executable, "-c", IN_OWN_MOUNTS, str(tmp_path), kind], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(["alone.json", "host.json", "link", "source", "volume"])


def test_threads_replace_one_file(tmp_path):
    """At one moment, again and again: none fails, a reader sees one of the texts whole."""
    path, barrier = tmp_path / "a.json", threading.Barrier(4)
    texts = [letter * 1000 for letter in "abcd"]

    def write(text):
        try:
            for _ in range(50):
                barrier.wait()
                write_text_atomically(path, text)
                assert path.read_text() in texts
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, texts))
    assert os.listdir(tmp_path) == ["a.json"]


def test_what_is_no_file_is_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    assert check_output_file(pipe) == pipe
    write_text_atomically(pipe, "text")
    assert os.read(reader, 100) == b"text" and stat.S_ISFIFO(pipe.stat().st_mode)
    os.close(reader)
    check_output_file("/dev/null")
    write_text_atomically("/dev/null", "text")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
