"""The process that collects what checkpoint writers did: it outlives signals to the whole job, and never its rank."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from multiprocessing.managers import SyncManager

_PR_SET_PDEATHSIG = 1


def start_result_queue() -> None:
    """Starts Megatron-Core's queue of write results in a process of our making, once.

    Its own dies of the SIGTERM that schedulers send to every process of a job, and with it the checkpoint that the
    signal asks for; and it stays for ever when its rank is killed, with the rank's output open.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        # As Megatron-Core does: a fork of a process with a CUDA context is not safe.
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        manager.start(live_as_long_as_the_rank, (os.getpid(),))
        filesystem_async._results_queue = manager.Queue()


def live_as_long_as_the_rank(rank_pid: int) -> None:
    """Makes this process deaf to the signals that end a rank in order, and end with the rank itself."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != rank_pid:
            os._exit(1)  # it ended before it could be asked for
