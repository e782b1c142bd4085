"""What dead processes left is removed, what a living one writes stays, and a directory that was set aside comes back."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys

import pytest
from leftovers import leave_partial

from megatron_midus import partials
from megatron_midus.files import remove_partials, staged_directory, staged_file, write_text_atomically
from megatron_midus.mounts import Mount

# Writes for ever: says so, and waits to be killed.
WRITER = """
import sys, time
from megatron_midus.files import {how}
with {how}(sys.argv[1]) as partial:
    if {how}.__name__ == "staged_directory":
        (partial / "half").write_text("half")
    else:
        partial.write_text("half")
    print("writing", flush=True)
    time.sleep(600)
"""


@pytest.fixture(params=["staged_directory", "staged_file"])
def writer(request, tmp_path):
    """Another process in the middle of writing ``out``."""
    program = [sys.executable, "-c", WRITER.format(how=request.param), str(tmp_path / "out")]
    with subprocess.Popen(program, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"writing\n"
        yield process
        process.kill()


def test_partials_of_the_dead_go_and_those_of_the_living_stay(tmp_path, writer):
    (partial,) = tmp_path.iterdir()
    remove_partials(tmp_path / "out")
    write_text_atomically(tmp_path / "out", "another")
    assert partial.exists() and (tmp_path / "out").read_text() == "another"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert partial.exists()
    # Of another output, though its name begins alike.
    leave_partial(tmp_path, "out.txt")
    write_text_atomically(tmp_path / "out", "third")
    assert not partial.exists() and sorted(os.listdir(tmp_path)) == [".out.txt.00000000dead.partial", "out"]


def test_the_next_directory_removes_what_a_killed_one_left(tmp_path):
    leave_partial(tmp_path, "out", content={"half": ""})
    with staged_directory(tmp_path / "out") as staging:
        (staging / "a").write_text("")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["a"]


@pytest.mark.parametrize("replaced", [False, True])
def test_what_a_killed_run_had_set_aside_comes_back(tmp_path, replaced):
    """Killed between its two renames, or after them."""
    leave_partial(tmp_path, "out", old={"model": "old"})
    if replaced:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/model").write_text("new")
    remove_partials(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out/model").read_text() == ("new" if replaced else "old")
    with pytest.raises(ValueError, match="is not empty"), staged_directory(tmp_path / "out"):
        pass


def test_a_directory_killed_before_it_had_a_lock(tmp_path):
    (tmp_path / ".out.00000000dead.partial").mkdir()
    (tmp_path / ".out.foreign.partial").mkdir()
    (tmp_path / ".out.foreign.partial/data").touch()  # whose it is nobody knows
    (tmp_path / ".out.file.partial").touch()
    remove_partials(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == [".out.file.partial", ".out.foreign.partial"]


def test_a_sweep_between_directory_and_lock(tmp_path, monkeypatch):
    """The new directory looks dead until it is locked: a sweep that comes then costs a second attempt."""
    taken = []
    real = fcntl.flock

    def slow(stream, operation):
        if operation == fcntl.LOCK_EX and not taken:
            taken.append(stream)
            partials.sweep(tmp_path / "out")
        real(stream, operation)

    monkeypatch.setattr(fcntl, "flock", slow)
    with staged_file(tmp_path / "out") as partial:
        partial.write_text("whole")
        partials.sweep(tmp_path / "out")
    assert taken and (tmp_path / "out").read_text() == "whole"


def test_file_systems_without_locks(tmp_path, monkeypatch, capsys):
    """Nobody knows who lives: nothing is removed, and it is said."""

    def refuse(stream, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    leave_partial(tmp_path, "out")
    write_text_atomically(tmp_path / "out", "whole")
    assert sorted(os.listdir(tmp_path)) == [".out.00000000dead.partial", "out"]
    assert ".out.00000000dead.partial was left by another run, or one is writing it" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["here", "elsewhere"])
def test_file_systems_whose_locks_end_at_the_host(tmp_path, monkeypatch, capsys, host):
    monkeypatch.setattr(partials, "mount_of", lambda path: Mount("/", frozenset({"localflock"})))
    leave_partial(tmp_path, "out", host=partials._this_host() if host == "here" else "another")
    remove_partials(tmp_path / "out")
    assert os.listdir(tmp_path) == ([] if host == "here" else [".out.00000000dead.partial"])
    assert bool(capsys.readouterr().err) == (host == "elsewhere")
