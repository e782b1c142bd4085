"""Kill -9 at random moments, again and again, until the run is through: it is the run that was never killed.

Every loss equals that run's digit for digit, and every sample is read once, in its order.
"""

from __future__ import annotations

import random
import re
import signal
import time
from pathlib import Path

import pytest
from driver import TINY_RUN, Run, train
from upscaled import write_upscaled

from megatron_midus.checkpoint.checksums import check_checkpoint
from megatron_midus.checkpoint.layout import read_latest_iteration

BATCH_SIZE = 4
# Between two kills a run gets some five steps further. The cyclic order of samples is a random one, and dropout draws
# random numbers in every step.
ITERATIONS = 120
STEPS = f"--train-iters {ITERATIONS} --lr-warmup-iters 2 --lr-decay-style cosine --dataloader-type cyclic --hidden-dropout 0.1"


class Killer:
    """Kills a rank at a moment drawn at random, of a kind drawn at random.

    Kinds: while the run starts; after some steps; while a checkpoint is written; when one has just been published.
    """

    def __init__(self, generator: random.Random, root: Path) -> None:
        self.kind = generator.choice(["start", "step", "save", "save", "published"])
        # A start takes some 0.4 s, a save 0.1 s, a step 0.02 s.
        self.delay = generator.uniform(0, {"start": 0.5, "step": 0.15, "save": 0.15, "published": 0.05}[self.kind])
        self.draw = generator.random()
        self.root = root
        self.latest = read_latest_iteration(root)
        self.begin = time.monotonic()
        self.due: float | None = None
        self.happened_during_save = False

    def __call__(self, ranks, output) -> None:
        if self.due is None and self._moment_has_come(output):
            self.due = time.monotonic() + self.delay
        if self.due is not None and time.monotonic() >= self.due:
            self.happened_during_save |= any(self.root.glob(".iter_*.partial"))
            ranks[int(self.draw * len(ranks))].kill()

    def _moment_has_come(self, output) -> bool:
        if self.kind == "start":
            return True
        if self.kind == "step":
            return output().count("] iteration ") >= 1
        if self.kind == "save":
            return any(self.root.glob(".iter_*.partial")) and output().count("] iteration ") >= 1
        return read_latest_iteration(self.root) != self.latest


def samples_of(run: Run) -> dict[int, list[int]]:
    """``{iteration: samples that it read}`` of the iterations that the log reports."""
    match = re.search(r"resuming after iteration (\d+)", run.out)
    first = int(match[1]) if match else 0
    read = [int(index) for index in re.findall(r"^sample (\d+)$", run.out, re.MULTILINE)]
    batches = [read[i : i + BATCH_SIZE] for i in range(0, len(read), BATCH_SIZE)]
    return {first + 1 + i: batch for i, batch in enumerate(batches) if first + 1 + i in run.losses}


@pytest.fixture(scope="module")
def upscaled(tmp_path_factory) -> Path:
    return write_upscaled(tmp_path_factory.mktemp("upscaled") / "checkpoint")


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "processes", "kills"), [("", 1, 13), ("--async-save", 2, 5)])
def test_a_run_that_is_killed_again_and_again_is_the_run_that_was_not(mode, processes, kills, upscaled, tmp_path):
    flags = f"{STEPS} --tensor-model-parallel-size {processes} {mode} --pretrained-checkpoint {upscaled}"
    whole = train(*TINY_RUN, flags, processes=processes, log_samples=True).check()
    samples = samples_of(whole)
    # Within the first pass over the data, which is one permutation of it.
    assert len({index for batch in samples.values() for index in batch}) == ITERATIONS * BATCH_SIZE

    root = tmp_path / "run"
    root.mkdir()
    generator = random.Random(f"{mode} {processes}")
    runs: list[Run] = []
    during_saves = 0
    flags += f" --save-interval 2 --keep-last 3 --load {root} --save {root}"
    for _ in range(kills):
        killer = Killer(generator, root)
        run = train(*TINY_RUN, flags, processes=processes, log_samples=True, while_running=killer)
        assert -signal.SIGKILL in run.codes, (killer.kind, run.codes, run.err)
        runs.append(run)
        during_saves += killer.happened_during_save
    runs.append(train(*TINY_RUN, flags, processes=processes, log_samples=True).check())

    assert during_saves >= 2, "the kills all missed the saves"
    seen: set[int] = set()
    for run in runs:
        for iteration, loss in run.losses.items():
            assert loss == whole.losses[iteration], iteration
        for iteration, batch in samples_of(run).items():
            assert batch == samples[iteration], iteration
        seen |= run.losses.keys()
    assert seen == set(range(1, ITERATIONS + 1))
    # Nothing was damaged on the way, nothing lies about, and the last checkpoint is whole.
    assert not any("NOT USED" in run.err for run in runs)
    assert sorted(p.name for p in root.glob("*iter_*")) == [f"iter_{i:07d}" for i in (116, 118, 120)]
    assert check_checkpoint(root / f"iter_{ITERATIONS:07d}")
