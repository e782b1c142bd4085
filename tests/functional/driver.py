"""Starts the training driver in real processes, as torchrun would, and reads its log."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import re
import runpy
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch
from fork_server import fork_server

from megatron_midus.training.helper_process import live_as_long_as_the_rank

UPSTREAM_EXAMPLE = Path(__file__).parents[2] / "examples/megatron_lm/pretrain_gpt_midus.py"

# d = 32, T = 32: a step takes some 20 ms.
TINY_MODEL = [
    "--num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --num-query-groups 2 --vocab-size 101"
]
TINY_RUN = [
    "--distributed-backend gloo --mock-data --num-workers 0 --seq-length 32 --micro-batch-size 2 --global-batch-size 4",
    "--lr 1e-3 --log-interval 1 --eval-interval 0 --eval-iters 0 --make-vocab-size-divisible-by 1",
]

_FIELD = re.compile(r"([a-zA-Z/() ]+): +(\S+)")


@dataclasses.dataclass
class Run:
    """A run of the driver that has ended.

    Attributes:
        codes: exit code of each rank; negative = killed by that signal.
        out, err: what all ranks wrote.
    """

    codes: list[int]
    out: str
    err: str

    @property
    def losses(self) -> dict[int, str]:
        """``{iteration: lm loss}``, as printed: equal text is equal to seven digits."""
        return {int(line["iteration"].rstrip("/")): line["lm loss"] for line in self.lines if "lm loss" in line}

    @property
    def lines(self) -> list[dict[str, str]]:
        """Fields of every log line."""
        found = []
        for line in self.out.splitlines():
            if match := re.search(r"\] iteration +(\d+)/ *\d+ \|", line):
                fields = {m.group(1).strip(): m.group(2) for m in _FIELD.finditer(line[match.end() :])}
                found.append({"iteration": match.group(1), **fields})
        return found

    @property
    def evaluations(self) -> dict[tuple[str, int], float]:
        """``{(split, iteration): loss}``."""
        pattern = r" (\w+(?: EMA)?) loss at iteration (\d+) \| lm loss value: (\S+) \|"
        return {(m[1], int(m[2])): float(m[3]) for m in re.finditer(pattern, self.out)}

    @property
    def error(self) -> str:
        """The one line that a user's mistake ends with; fails when there is more or less."""
        assert all(self.codes), f"codes {self.codes}\n{self.out}\n{self.err}"
        lines = [line for line in self.err.splitlines() if line.strip()]
        assert len(lines) == 1 and lines[0].startswith("error: "), self.err
        return lines[0]

    def check(self) -> Run:
        """Fails unless every rank ended with 0."""
        assert not any(self.codes), f"codes {self.codes}\n{self.out}\n{self.err}"
        return self


def train(
    *arguments: str | Path,
    processes: int = 1,
    timeout: float = 120,
    log_samples: bool = False,
    upstream: bool = False,
    verb: str | None = None,
    while_running: Callable[[list[multiprocessing.Process], Callable[[], str]], None] | None = None,
) -> Run:
    """Runs ``pretrain_midus.py`` with ``arguments``, each of which may hold several words.

    Args:
        processes: ranks.
        timeout: seconds until all are killed, which their exit codes show.
        log_samples: print ``sample INDEX`` for every training or validation sample when it is read.
        upstream: run ``examples/megatron_lm/pretrain_gpt_midus.py`` instead.
        verb: run ``midus VERB`` instead.
        while_running: called again and again with the processes and a function that returns the output so far.
    """
    words = [word for argument in arguments for word in str(argument).split()]
    context = fork_server()
    # As torchrun does, the launcher holds the store. A port that was merely seen to be free may be taken by the time
    # that rank 0 would listen on it.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(processes),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    with tempfile.TemporaryDirectory() as directory:
        ranks = [
            context.Process(
                target=_work, args=(rank, environment, directory, words, processes > 1, log_samples, upstream, verb)
            )
            for rank in range(processes)
        ]
        for process in ranks:
            process.start()

        def output(kind: str = "out") -> str:
            return "".join(p.read_text() for p in sorted(Path(directory).glob(f"*.{kind}")))

        deadline = time.monotonic() + timeout
        while any(process.is_alive() for process in ranks):
            if while_running is not None:
                while_running(ranks, output)
            if time.monotonic() > deadline or any(process.exitcode for process in ranks):
                _end(ranks)
            time.sleep(0.02)
        return Run([process.exitcode for process in ranks], output(), output("err"))


def _end(ranks: list[multiprocessing.Process]) -> None:
    """What torchrun does when a rank failed: the others are asked to end, then made to."""
    for process in ranks:
        process.terminate()
    for process in ranks:
        process.join(2)
        process.kill()


def _work(
    rank: int,
    environment: dict[str, str],
    directory: str,
    words: list[str],
    is_distributed: bool,
    log_samples: bool,
    upstream: bool,
    verb: str | None,
) -> None:
    if is_distributed:
        os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{directory}/{rank}.{name}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["pretrain_midus.py", *words]
    torch.set_num_threads(1)
    _start_result_queue_by_fork()
    if log_samples:
        _log_samples()
    if upstream:
        runpy.run_path(str(UPSTREAM_EXAMPLE), run_name="__main__")
    if verb is not None:
        from megatron_midus.command import main

        sys.argv = ["midus", verb, *words]
        main()
    from megatron_midus.training.main import run

    run()


class _LoggedDataset(torch.utils.data.Dataset):
    def __init__(self, dataset: torch.utils.data.Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        print(f"sample {index}", flush=True)
        return self.dataset[index]


def _log_samples() -> None:
    """In this process alone."""
    from megatron_midus import data

    original = data.build_data_loader
    data.build_data_loader = lambda dataset, **settings: original(_LoggedDataset(dataset), **settings)


def _start_result_queue_by_fork() -> None:
    """Megatron-Core's checkpoint writer starts a process for its results that imports torch afresh, on every rank: most
    of the time of a run of a few steps. A fork has torch already. Runs under torchrun have the original."""
    with warnings.catch_warnings():
        # The driver itself silences what Megatron says while it is imported; here it is imported a little earlier.
        warnings.simplefilter("ignore")
        from megatron.core.dist_checkpointing.strategies import filesystem_async

    assert filesystem_async._results_queue is None
    manager = SyncManager(ctx=multiprocessing.get_context("fork"))
    manager.start(live_as_long_as_the_rank, (os.getpid(),))
    filesystem_async._results_queue = manager.Queue()
