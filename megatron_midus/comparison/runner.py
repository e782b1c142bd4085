"""Runs the steps of an experiment: what is done is not done again, what fails takes nothing else with it."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TypeVar

from megatron_midus.comparison.arms import ResolvedArm
from megatron_midus.comparison.curves import make_curves, read_scalars
from megatron_midus.comparison.experiment import REPOSITORY
from megatron_midus.comparison.runs import Chain, Runs, command_line, is_one_process, one_of_each_architecture
from megatron_midus.comparison.steps import FileHashes, Step, StepFailed, environment
from megatron_midus.comparison.warm import WarmProcess, WarmServer
from megatron_midus.errors import UserError
from megatron_midus.report.machine import machine_facts

Item = TypeVar("Item")
# Seconds that a driver gets to save a checkpoint when the comparison is stopped.
PATIENCE = 60.0


@contextlib.contextmanager
def lock(output: Path) -> Iterator[None]:
    """Held while an experiment runs, by the processes it starts as well; ``ValueError`` when another one holds it."""
    output.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(output / ".lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"another comparison, or a process that it left, is running in {output}; wait for it or stop it"
        ) from None
    os.set_inheritable(descriptor, True)
    try:
        yield
    finally:
        os.close(descriptor)


class Runner:
    """Executes steps.

    Args:
        hashes: of what steps read.
        say: prints one line.
        jobs: chains at a time.
        warm: ``{verb: what it imports}``, see ``WarmServer``: steps with such a verb that are one process start at once.
    """

    def __init__(
        self,
        hashes: FileHashes,
        say: Callable[[str], None],
        *,
        jobs: int = 1,
        warm: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        self.hashes = hashes
        self.say = say
        self.jobs = jobs
        self.machine = machine_facts()
        self.failures: dict[str, str] = {}
        self._mutex = threading.Lock()
        self._step_locks: dict[Path, threading.Lock] = {}
        self._processes: set[subprocess.Popen | WarmProcess] = set()
        self._warm = dict(warm or {})
        self._servers: dict[tuple[str, ...], WarmServer] = {}
        self._stopped = False

    # -- one step ------------------------------------------------------------------------------------------------
    def run(self, step: Step, label: str, *, force: bool = False) -> None:
        """Runs a step unless it is done; raises ``StepFailed``."""
        with self._mutex:
            fingerprint = step.fingerprint(self.hashes)
            # Chains with several learning rates share their up-scaling: the second one waits for the first.
            alone = self._step_locks.setdefault(step.marker, threading.Lock())
        with alone:
            self._run_alone(step, label, fingerprint, force=force)

    def _run_alone(self, step: Step, label: str, fingerprint: str, *, force: bool) -> None:
        if step.is_done(fingerprint) and not force:
            return
        step.begin(fingerprint)
        began = time.monotonic()
        self.say(f"{label}: {step.name}")
        code = self._execute(step)
        if code:
            raise StepFailed(f"{step.name} ended with {code}: {last_line(step.log)} (log: {step.log})")
        missing = [path for path in step.makes if not path.exists()]
        if missing:
            raise StepFailed(f"{step.name} did not make {missing[0]} (log: {step.log})")
        if step.check is not None:
            step.check()
        step.finish(fingerprint, seconds=time.monotonic() - began, machine=self.machine)

    def _execute(self, step: Step) -> int:
        with open(step.log, "a", encoding="utf-8") as log:
            with self._mutex:
                if self._stopped:
                    raise StepFailed("stopped")
                process = self._start(step, log)
                self._processes.add(process)
            try:
                return process.wait()
            finally:
                with self._mutex:
                    self._processes.discard(process)

    def _start(self, step: Step, log: IO[str]) -> subprocess.Popen | WarmProcess:
        modules = self._warm.get(step.words[0])
        if modules is not None and is_one_process(step):
            if modules not in self._servers:
                self._servers[modules] = WarmServer(modules, environment(), REPOSITORY)
            return self._servers[modules].start(step.words, step.log)
        # A session of its own: the launcher and its ranks are ended together. What is inherited is the lock.
        return subprocess.Popen(
            command_line(step),
            cwd=REPOSITORY,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            close_fds=False,
        )

    def close(self) -> None:
        """Ends what waits for steps to start."""
        for server in self._servers.values():
            server.close()
        self._servers.clear()

    def stop(self) -> None:
        """Ends what runs: a driver saves first."""
        with self._mutex:
            self._stopped = True
            processes = list(self._processes)
        for number, patience in ((signal.SIGTERM, PATIENCE), (signal.SIGKILL, PATIENCE)):
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
            deadline = time.monotonic() + patience
            while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
                time.sleep(0.05)

    # -- many ----------------------------------------------------------------------------------------------------
    def each(self, items: Sequence[Item], work: Callable[[Item], None], label: Callable[[Item], str]) -> None:
        """``work`` for all items, ``jobs`` at a time and begun in order; a failure is kept and told, and no more."""

        def guarded(item: Item) -> None:
            try:
                work(item)
            except (StepFailed, UserError, OSError) as error:  # anything else is our bug, and ends the comparison
                message = " ".join(str(error).split())
                with self._mutex:
                    if not self._stopped:
                        self.failures[label(item)] = message
                        self.say(f"{label(item)}: FAILED, {message}")

        pool = ThreadPoolExecutor(self.jobs)
        try:
            for future in [pool.submit(guarded, item) for item in items]:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            self.stop()
            raise
        pool.shutdown()

    def run_chain(self, chain: Chain) -> None:
        """All steps of one run."""
        for step in chain.steps:
            self.run(step, chain.label)


def run_experiment(runs: Runs, runner: Runner) -> list[Chain]:
    """Everything, seed by seed with all arms of a seed in turn; returns the chains that the results are made of.

    Raises:
        StepFailed: the data could not be made; without them no arm can run.
    """
    try:
        return _run_all(runs, runner)
    except BaseException:
        runner.stop()
        raise
    finally:
        runner.close()


def _run_all(runs: Runs, runner: Runner) -> list[Chain]:
    missing = [path for path in runs.prepared_paths() if not Path(path).exists()]
    for step in runs.prepare:
        runner.run(step, "data", force=bool(missing))
    for step in runs.datasets:
        runner.run(step, "data")
    candidates = [
        runs.chain(arm, runs.experiment.seeds[0], rate)
        for arm in runs.arms
        if len(rates := runs.experiment.rates(arm.arm)) > 1
        for rate in rates
    ]

    def try_rate(chain: Chain) -> None:
        for step in chain.steps[:2]:
            runner.run(step, chain.label)

    runner.each(candidates, try_rate, lambda chain: f"{chain.label} (candidate)")
    chains = chosen_chains(runs, runner.hashes)
    runner.each(chains, runner.run_chain, lambda chain: chain.label)
    done = finished(chains, runner.hashes)
    latency = runs.latency(one_of_each_architecture(done))
    if latency is not None:
        runner.each([latency], lambda step: runner.run(step, "all architectures"), lambda step: "latency")
    return chains


def chosen_chains(runs: Runs, hashes: FileHashes) -> list[Chain]:
    """The runs that count, seed by seed: every arm with its learning rate, or the best of several on the first seed."""
    found = []
    for seed in runs.experiment.seeds:
        for arm in runs.arms:
            if seed in runs.seeds_of(arm):
                found.append(runs.chain(arm, seed, choose_rate(runs, arm, hashes)))
    return found


def rate_losses(runs: Runs, arm: ResolvedArm, hashes: FileHashes) -> dict[float, float]:
    """``{learning rate: held-out loss at the end}`` of the first seed; infinite for a run not there, or of other settings."""
    losses = {}
    for rate in runs.experiment.rates(arm.arm):
        chain = runs.chain(arm, runs.experiment.seeds[0], rate)
        assert chain.train is not None
        losses[rate] = math.inf
        if chain.train.is_done(chain.train.fingerprint(hashes)):
            losses[rate] = make_curves(read_scalars(chain.tensorboard), tokens_per_iteration=1).final_validation
    return losses


def choose_rate(runs: Runs, arm: ResolvedArm, hashes: FileHashes) -> float | None:
    """The learning rate of an arm; ``None`` when it does not train."""
    rates = runs.experiment.rates(arm.arm)
    if len(rates) < 2:
        return rates[0] if rates else None
    losses = rate_losses(runs, arm, hashes)
    return min(rates, key=lambda rate: losses[rate])


def finished(chains: Sequence[Chain], hashes: FileHashes) -> list[Chain]:
    """Those whose figures are there, and of these settings."""
    return [c for c in chains if all(step.is_done(step.fingerprint(hashes)) for step in c.steps)]


def last_line(log: Path) -> str:
    """What a program said last, preferably its error."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["no output"])[-1][:300]
