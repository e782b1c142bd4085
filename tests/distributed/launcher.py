"""Runs a function in several real processes that talk over Gloo, and brings back what each returned."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fork_server import fork_server


def launch(function: Callable, world_size: int, *args: Any, timeout: float = 300, **kwargs: Any) -> list[Any]:
    """Calls ``function(*args, **kwargs)`` in ``world_size`` processes with torchrun's environment.

    Args:
        function: importable by name; tensors in its result must be on the CPU.
        world_size: processes.
        timeout: seconds after which the processes are killed and the call fails.

    Returns:
        What every rank returned, by rank.
    """
    context = fork_server()
    # As torchrun's agent does: whoever looks for a free port and opens it later may find it taken by then.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    with tempfile.TemporaryDirectory() as directory:
        processes = [
            # No daemons: those may have no children, and saving a checkpoint starts some.
            context.Process(target=_work, args=(function, rank, environment, directory, args, kwargs))
            for rank in range(world_size)
        ]
        try:
            for process in processes:
                process.start()
            _wait(processes, timeout)
        finally:
            for process in processes:
                process.kill()
        failures = [_failure(rank, process, directory) for rank, process in enumerate(processes)]
        if any(failures):
            raise AssertionError("\n".join(failure for failure in failures if failure))
        return [torch.load(Path(directory) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _work(function: Callable, rank: int, environment: dict, directory: str, args: tuple, kwargs: dict) -> None:
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    try:
        torch.set_num_threads(1)
        from megatron_midus.platform import initialize_distributed

        initialize_distributed("gloo", timeout_minutes=2)
        torch.save(function(*args, **kwargs), Path(directory) / f"{rank}.pt")
        # Whoever leaves closes connections that another rank may still be opening, for a group that nobody used yet.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        (Path(directory) / f"{rank}.txt").write_text(traceback.format_exc())
        raise SystemExit(1) from None


def _wait(processes: list, timeout: float) -> None:
    """Until all are done; one that fails takes the others, which wait for it, along."""
    deadline = time.monotonic() + timeout
    while any(process.is_alive() for process in processes):
        if time.monotonic() > deadline or any(process.exitcode for process in processes):
            # Others may fail for reasons of their own: let them say so first.
            for process in processes:
                process.join(1)
                process.kill()
        time.sleep(0.02)


def _failure(rank: int, process: Any, directory: str) -> str | None:
    if process.exitcode == 0:
        return None
    report = Path(directory) / f"{rank}.txt"
    return f"rank {rank}: " + (report.read_text() if report.exists() else f"killed, exit code {process.exitcode}")
