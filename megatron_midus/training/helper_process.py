"""The processes beside a rank: no one outlives it, and the one that collects what writers did outlives signals to the job."""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing.managers import SyncManager

from megatron_midus.platform import is_cpu

_PR_SET_PDEATHSIG = 1
_forking: list[int] = []  # the process that is about to fork, where its child is to end with it


def start_result_queue() -> None:
    """Starts Megatron-Core's queue of write results in a process of our making, once.

    Its own dies of the SIGTERM that schedulers send to every process of a job, and with it the checkpoint that the
    signal asks for; and it stays for ever when its rank is killed, with the rank's output open.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        # As Megatron-Core does: a fork of a process with a CUDA context is not safe. Without one a fork is there at once,
        # and has imported the torch that it needs for its first message.
        manager = SyncManager(ctx=multiprocessing.get_context("fork" if is_cpu() else "spawn"))
        manager.start(live_as_long_as_the_rank, (os.getpid(),))
        filesystem_async._results_queue = manager.Queue()


def live_as_long_as_the_rank(rank_pid: int) -> None:
    """Makes this process deaf to the signals that end a rank in order, and end with the rank itself."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    _end_with(rank_pid)


@functools.cache
def end_forks_with_this_process() -> None:
    """From now on every process that this one forks, and every one that those fork, ends when its parent ends.

    Megatron-Core's checkpoint writers wait for a word from their rank. Killed before it sends it, they would wait for ever,
    with the checkpoint's lock held and the rank's output open.
    """
    os.register_at_fork(before=_before_fork, after_in_parent=_forking.clear, after_in_child=_after_fork)


def _before_fork() -> None:
    # The kernel means the thread that forked by "parent"; other threads end earlier than their process.
    if threading.current_thread() is threading.main_thread():
        _forking[:] = [os.getpid()]


def _after_fork() -> None:
    if _forking:
        _end_with(_forking.pop())


def _end_with(parent: int) -> None:
    """The kernel kills this process when ``parent`` ends, however it ends. On Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)  # it ended before the kernel was asked
