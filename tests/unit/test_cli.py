"""How programs end: one line for a user's mistake, a traceback for a bug, and nothing half-written after a signal."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys

import numpy
import pytest

from megatron_midus import cli
from megatron_midus.errors import UsageError, UserError


def end(main, capsys):
    """``(exit code, lines on stderr)``"""
    with pytest.raises(SystemExit) as exit:
        cli.run(main, handle_signals=False)
    return exit.value.code, capsys.readouterr().err.splitlines()


def raising(error):
    def main():
        raise error

    return main


MISTAKES = {
    "ours": (UserError("--lr -1 is\n negative; give more than 0"), 1, "error: --lr -1 is negative; give more than 0"),
    "usage": (UsageError("no flag --lrr"), 2, "error: no flag --lrr"),
    "no such file": (FileNotFoundError(errno.ENOENT, "No such file or directory", "a"), 1, "error: .*'a'"),
    "full disk": (OSError(errno.ENOSPC, "No space left on device"), 1, "error: .*No space left on device"),
    "lost rank": (ConnectionError("rank 1 is gone"), 1, "error: rank 1 is gone"),
}


@pytest.mark.parametrize(("error", "code", "line"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_users_mistake_is_one_line(capsys, monkeypatch, error, code, line):
    monkeypatch.delenv("MIDUS_TRACEBACK", raising=False)
    got, lines = end(raising(error), capsys)
    assert got == code and len(lines) == 1 and re.fullmatch(line, lines[0])
    monkeypatch.setenv("MIDUS_TRACEBACK", "1")
    got, lines = end(raising(error), capsys)
    assert got == code and lines[0].startswith("Traceback") and cli.REPORT not in lines


BUGS = {
    "json": lambda: json.loads("{"),
    "numpy": lambda: numpy.zeros(3) + numpy.zeros(4),
    "int": lambda: int("x"),
    "key": lambda: {}["x"],
    "library": lambda: __import__("ctypes").CDLL("libnothing.so"),
    "bad descriptor": lambda: os.close(10**6),
}


@pytest.mark.parametrize("main", BUGS.values(), ids=BUGS.keys())
def test_a_bug_shows_its_traceback_and_asks_for_a_report(capsys, monkeypatch, main):
    monkeypatch.delenv("MIDUS_TRACEBACK", raising=False)
    code, lines = end(main, capsys)
    assert code == 1 and lines[0] == "Traceback (most recent call last):" and lines[-1] == cli.REPORT
    assert not any(line.startswith("error:") for line in lines)


def test_ctrl_c(capsys):
    assert end(raising(KeyboardInterrupt()), capsys) == (130, ["interrupted"])


PROGRAM = """
import os, signal, sys, time
from megatron_midus import cli
from megatron_midus.files import staged_directory, staged_file

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, for all that the tests start as well

def main():
    with staged_file(sys.argv[1] + "/a.json") as partial, staged_directory(sys.argv[1] + "/out") as staging:
        (staging / "half").write_text("")
        partial.write_text("")
        ready, say = os.pipe()
        child = os.fork()
        if not child:
            os.write(say, b"x")  # Python drops signals that come while it forks
            time.sleep(600)  # a fork that is sent a signal dies of it, and cleans up nothing of its parent's
        os.read(ready, 1)
        os.kill(child, signal.SIGTERM)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, (staging / "half").exists(), flush=True)
        time.sleep(600)

cli.run(main)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing_half_written(tmp_path, number):
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == f"{-signal.SIGTERM} True\n"
        assert len(os.listdir(tmp_path)) == 2
        process.send_signal(number)
        assert process.stderr.read().splitlines() == [f"ended by {number.name}"]
    assert process.returncode == 128 + number and os.listdir(tmp_path) == []
