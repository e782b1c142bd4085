"""Commands as forks of one process: what they print, how they end, and that they can be ended."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from megatron_midus.comparison.steps import environment
from megatron_midus.comparison.warm import WarmServer

ROOT = Path(__file__).parents[3]
SLEEPING = "import time\n\ndef main():\n    print('sleeping', flush=True)\n    time.sleep(60)\n"


@pytest.fixture
def server(tmp_path):
    started = WarmServer(("megatron_midus.command",), environment(), ROOT)
    yield started
    started.close()


def test_commands_end_as_programs_do(server, tmp_path):
    logs = [tmp_path / f"{i}.log" for i in range(3)]
    words = (
        ["--version"],
        ["nonsense"],
        ["upscale", "--hf-model", str(tmp_path / "none"), "--save", str(tmp_path / "x")],
    )
    running = [server.start(w, log) for w, log in zip(words, logs)]
    assert [process.wait() for process in running] == [0, 2, 1]
    assert logs[0].read_text().startswith("megatron_midus ")
    assert logs[1].read_text().startswith("error: 'nonsense' is not a verb")
    assert logs[2].read_text().startswith("error: ") and len(logs[2].read_text().splitlines()) == 1
    assert running[1].poll() == 2


def test_a_command_can_be_ended(tmp_path):
    (tmp_path / "sleeping.py").write_text(SLEEPING)
    started = WarmServer(("sleeping:main",), {**environment(), "PYTHONPATH": f"{ROOT}:{tmp_path}"}, ROOT)
    # The server itself sleeps while it imports: closing it must not wait for that.
    began = time.monotonic()
    os.killpg(started._process.pid, signal.SIGTERM)
    with pytest.raises(OSError, match="ended with -15"):
        started.start(["--version"], tmp_path / "log")
    started.close()
    assert time.monotonic() - began < 30


def test_a_group_of_its_own(server, tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    # Reading a pipe that nobody writes lasts for ever.
    words = ["compare", str(fifo), "--output", str(tmp_path / "out")]
    process = server.start(words, tmp_path / "log")
    assert process.poll() is None and os.getpgid(process.pid) == process.pid
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and process.poll() is not None
