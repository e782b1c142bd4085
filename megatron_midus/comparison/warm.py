"""Steps that start at once: forks of a process that has imported what they need, which takes longer than a short training.

``python -m megatron_midus.comparison.warm ADDRESS MODULE…`` imports the modules and then listens. A request is the words of a
``midus`` command and the log for what it says; the answers are the number of its process and its exit code. The process ends
with its standard input, so with the comparison, however that ends.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn


class WarmProcess:
    """A running command; as much of ``subprocess.Popen`` as the runner needs."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lines = connection.makefile()
        self._code: int | None = None
        self.pid = int(self._lines.readline())

    def poll(self) -> int | None:
        """``None`` while it runs; the exit code once ``wait`` knows it, else 0."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return self._code or 0
        return None

    def wait(self) -> int:
        """The exit code, negative for a signal."""
        if self._code is None:
            self._code = int(self._lines.readline() or 1)
            self._lines.close()
            self._connection.close()
        return self._code


class WarmServer:
    """Starts commands as forks.

    Args:
        modules: imported once, in order, by their full names; ``module:function`` is called as well.
        environment: of all commands.
        directory: in which they run.
    """

    def __init__(self, modules: Sequence[str], environment: dict[str, str], directory: Path) -> None:
        self._home = tempfile.mkdtemp(prefix="midus_")
        self._address = os.path.join(self._home, "socket")
        # close_fds: what is inherited is the lock of the comparison.
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, self._address, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=directory,
            env=environment,
            start_new_session=True,
            close_fds=False,
        )

    def start(self, words: Sequence[str], log: Path) -> WarmProcess:
        """Runs ``midus`` with these words; its output is appended to ``log``."""
        assert self._process.stdout is not None
        if not self._process.stdout.closed:
            ready = self._process.stdout.readline() == b"ready\n"
            self._process.stdout.close()
            if not ready:
                raise OSError(f"the process that starts {words[0]} ended with {self._process.wait()}")
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self._address)
        connection.sendall(json.dumps({"words": list(words), "log": str(log)}).encode() + b"\n")
        return WarmProcess(connection)

    def close(self) -> None:
        """Ends it; commands that run go on."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        shutil.rmtree(self._home, ignore_errors=True)


def main(address: str, modules: Sequence[str]) -> None:
    """Imports, then listens until standard input ends."""
    # As the training does before it imports them.
    warnings.filterwarnings("ignore", module=r"(megatron|torch|transformers)\.")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for name in modules:
        module, _, function = name.partition(":")
        imported = importlib.import_module(module)
        if function:
            getattr(imported, function)()
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        os.write(1, b"ready\n")
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _answer(connection)
            connection.close()
            while _reaped():
                pass


def _reaped() -> bool:
    """Takes note of one command that has ended."""
    try:
        return os.waitpid(-1, os.WNOHANG) != (0, 0)
    except ChildProcessError:
        return False


def _answer(connection: socket.socket) -> NoReturn:
    request = json.loads(connection.makefile().readline())
    program = os.fork()
    if program == 0:
        connection.close()
        _become(Path(request["log"]))
        _run(request["words"])
    with contextlib.suppress(OSError):  # the command has done it itself, or has ended
        os.setpgid(program, program)
    connection.sendall(f"{program}\n".encode())
    _, status = os.waitpid(program, 0)
    connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _become(log: Path) -> None:
    """A process group of its own, with the log for its output."""
    os.setpgid(0, 0)
    streams = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for number, stream in zip((0, 1, 2), (streams[0], streams[1], streams[1])):
        os.dup2(stream, number)


def _run(words: Sequence[str]) -> NoReturn:
    sys.argv = ["midus", *words]  # as python -m megatron_midus
    code = 1
    try:
        runpy.run_module("megatron_midus", run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1 if end.code else 0
    except BaseException:
        traceback.print_exc()
    # What an interpreter does at its end, but for tearing down the modules.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
