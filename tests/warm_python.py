"""Programs that start at once: forks of one process that has imported torch, transformers and Megatron, which takes seconds.

`warm_python(directory)` puts a `python`, and a `midus`, into `directory` that hand its arguments, environment, working directory and
standard streams to that process; a fork of it runs the program to its end, as an interpreter of its own would. Signals go on to the
program, and what it starts with `sys.executable` starts at once as well.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import multiprocessing.process
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Isolated and without site-packages: it only has to reach the socket.
_CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
request = {{"argv": {first!r} + sys.argv[1:], "directory": os.getcwd(), "environment": dict(os.environ), "python": {program!r}}}
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    socket.send_fds(server, [b"."], [0, 1, 2])
    server.sendall(json.dumps(request).encode() + b"\\n")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: server.sendall(b"%d\\n" % number))
    code = int(server.makefile().readline() or 1)
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@contextlib.contextmanager
def warm_python(directory: Path) -> Iterator[Path]:
    """Makes ``directory/python`` and ``directory/midus``, to stand first in ``PATH``; they work while the context lasts."""
    address = str(directory / "socket")
    for name, first in (("midus", ["-m", "megatron_midus"]), ("python", [])):
        client = directory / name
        program = str(directory / "python")
        client.write_text(_CLIENT.format(python=sys.executable, address=address, first=first, program=program))
        client.chmod(0o755)
    with subprocess.Popen([sys.executable, __file__, address], stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None and server.stdout.readline() == b"ready\n"
            yield client
        finally:
            server.terminate()


def serve(address: str) -> None:
    """Answers until it is terminated. Returns in a child, whose ``sys.argv`` says what to run."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    print("ready", flush=True)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:  # one for each program, so that those of a pipe run side by side
            break
        connection.close()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
    listener.close()
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    request = json.loads(connection.makefile("rb", buffering=0).readline())
    program = os.fork()
    if program:
        code = _pass_on_signals(connection, program)
        connection.sendall(f"{code}\n".encode())
        os._exit(0)
    connection.close()
    _become(request, streams)


def _pass_on_signals(connection: socket.socket, program: int) -> int:
    """Sends ``program`` the signals that its client got, SIGKILL when that is gone; its exit code, negative for a signal."""
    ended = os.pidfd_open(program)
    waited_for: list[Any] = [connection, ended]
    while ended not in select.select(waited_for, [], [])[0]:
        received = connection.recv(1024)
        for number in received.split():
            os.kill(program, int(number))
        if not received:
            os.kill(program, signal.SIGKILL)
            waited_for.remove(connection)
    _, status = os.waitpid(program, 0)
    return os.waitstatus_to_exitcode(status)


def _become(request: dict[str, Any], streams: list[int]) -> None:
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["directory"])
    multiprocessing.process.ORIGINAL_DIR = request["directory"]  # where spawned processes look for the program
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path[:] = [*request["environment"].get("PYTHONPATH", "").split(os.pathsep), *sys.path[1:]]
    sys.argv, sys.executable = request["argv"], request["python"]


def run_program() -> int:
    """``python FILE …``, ``python -m MODULE …``, ``python -c CODE …``, ``python - …``, with these words in ``sys.argv``.

    Returns:
        The exit code.
    """
    try:
        _run_arguments()
    except SystemExit as end:
        if isinstance(end.code, (int, type(None))):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _run_arguments() -> None:
    while sys.argv[0] in ("-u", "-B"):
        del sys.argv[0]
    how = sys.argv[0]
    if how == "-m":
        del sys.argv[0]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    elif how in ("-", "-c"):
        code = sys.stdin.read() if how == "-" else sys.argv.pop(1)
        sys.path.insert(0, "")
        exec(compile(code, "<commands>", "exec"), {"__name__": "__main__"})
    else:
        sys.path.insert(0, str(Path(how).resolve().parent))
        runpy.run_path(how, run_name="__main__")


if __name__ == "__main__":
    import torch  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import megatron_midus.model.builder
    import megatron_midus.training.main
    import megatron_midus.training.pretrain  # noqa: F401

    gc.freeze()
    serve(sys.argv[1])
    code = run_program()
    # What an interpreter does at its end, but for tearing down the modules, which takes seconds in a fork.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
