"""Peak memory of a function above what was held when it began: each in a process of its own, so none inherits another's."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch


def in_own_process(function: Callable[..., Any], *arguments: Any, threads: int | None = None) -> Any:
    """The result of ``function(*arguments)`` in a fresh process. ``function`` is found by its module and name."""
    with own_process() as call:
        return call(function, *arguments, threads=threads)


@contextlib.contextmanager
def own_process() -> Iterator[Callable[..., Any]]:
    """What calls a function as ``in_own_process`` does, in one process for all calls: starting one takes seconds."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:

        def call(function: Callable[..., Any], *arguments: Any, threads: int | None = None) -> Any:
            return pool.submit(_with_threads, threads, function, arguments).result()

        yield call


def _with_threads(threads: int | None, function: Callable[..., Any], arguments: tuple) -> Any:
    if threads is not None:
        torch.set_num_threads(threads)
    return function(*arguments)


def peak_above_start(function: Callable[[], Any], device: str) -> int | None:
    """Bytes that were held at once while ``function`` ran, beyond those held before; its result counts.

    On a GPU what torch's allocator handed out; on the CPU resident memory, ``None`` where the system does not tell.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    return _peak_on_cpu(function)


def _peak_on_cpu(function: Callable[[], Any]) -> int | None:
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    # Freed memory that the C library keeps would serve the function unseen.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        reset.write_text("5")  # VmHWM, the peak, begins at VmRSS again (proc(5))
    except OSError:
        return None
    before = _resident(status, "VmHWM")
    result = function()
    peak = _resident(status, "VmHWM") - before
    del result
    return peak


def _resident(status: Path, field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", status.read_text(), re.MULTILINE)
    assert match, f"no {field} in {status}"
    return 1024 * int(match[1])
