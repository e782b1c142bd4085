"""What a killed rank leaves: no process of its own, and so no lock that the next run finds taken."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from megatron_midus.partials import sweep
from megatron_midus.training.helper_process import end_forks_with_this_process

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")

# A rank with a checkpoint's lock whose writer, and that writer's own, wait for a word that does not come.
RANK = """
import multiprocessing, pathlib, sys, time
from megatron_midus.partials import make_partial
from megatron_midus.training.helper_process import end_forks_with_this_process

end_forks_with_this_process()
directory, lock = make_partial(pathlib.Path(sys.argv[1]), "iter_0000002")
(directory / "content").mkdir()
fork = multiprocessing.get_context("fork")

def write(depth):
    if depth:
        fork.Process(target=write, args=[depth - 1]).start()
    (directory / "content" / str(depth)).touch()
    time.sleep(600)

fork.Process(target=write, args=[1]).start()
time.sleep(600)
"""


def test_the_writers_of_a_killed_rank_end_with_it(tmp_path):
    rank = subprocess.Popen([sys.executable, "-c", RANK, str(tmp_path)], start_new_session=True)
    try:
        _wait_for(lambda: len(list(tmp_path.glob(".*/content/*"))) == 2)
        rank.kill()
        rank.wait()

        def is_swept():
            sweep(tmp_path / "iter_0000002")
            return not os.listdir(tmp_path)

        _wait_for(is_swept)
    finally:
        if _is_there(rank.pid):
            os.killpg(rank.pid, signal.SIGKILL)


def test_what_another_thread_forks_outlives_that_thread():
    end_forks_with_this_process()
    pids = []

    def fork():
        pids.append(os.fork())
        if not pids[0]:
            time.sleep(600)
            os._exit(0)

    thread = threading.Thread(target=fork)
    thread.start()
    thread.join()
    time.sleep(0.2)
    assert os.waitpid(pids[0], os.WNOHANG) == (0, 0)
    os.kill(pids[0], signal.SIGKILL)
    os.waitpid(pids[0], 0)


def _is_there(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _wait_for(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.05)
