"""Start after start of the driver into one --save: no run is taken back, no sample is lost or seen twice."""

from __future__ import annotations

import dataclasses
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from driver import TINY_MODEL, TINY_RUN, Run, train
from upscaled import write_upscaled

from megatron_midus.checkpoint.layout import (
    iteration_directory,
    list_iterations,
    read_latest_iteration,
    write_latest_iteration,
)

STEPS = "--train-iters 8 --lr-warmup-iters 2 --lr-decay-style cosine"


@pytest.fixture(scope="module")
def upscaled(tmp_path_factory) -> Path:
    return write_upscaled(tmp_path_factory.mktemp("upscaled") / "checkpoint")


@pytest.mark.parametrize("form", ["--load {upscaled}", "--pretrained-checkpoint {upscaled}", " ".join(TINY_MODEL)])
def test_the_same_command_goes_on_where_the_run_is(form, upscaled, tmp_path):
    flags = [*TINY_RUN, STEPS, form.format(upscaled=upscaled), "--save", tmp_path]
    first = train(*flags, "--exit-interval 5").check()
    second = train(*flags, "--exit-interval 2").check()
    third = train(*flags, "--exit-interval 7").check()
    assert [list(run.losses) for run in (first, second, third)] == [[1, 2, 3, 4, 5], [6], [7]]
    assert read_latest_iteration(tmp_path) == 7
    assert f"--save {tmp_path} holds iteration 5 already: going on from there" in second.out


def test_a_refused_start_leaves_everything_as_it_was(upscaled, tmp_path):
    root = tmp_path / "run"
    train(*TINY_RUN, STEPS, "--save-interval 2 --exit-interval 5 --load", upscaled, "--save", root).check()
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    for form in (f"--finetune --load {upscaled}", f"--load {root} --ckpt-step 2", f"--load {root}/iter_0000004"):
        assert "would begin at iteration" in train(*TINY_RUN, STEPS, form, "--save", root).error
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    branch = train(*TINY_RUN, STEPS, f"--load {root} --ckpt-step 2 --exit-interval 4 --save", tmp_path / "branch")
    assert list(branch.check().losses) == [3, 4]
    evaluated = "--skip-train --eval-interval 1 --eval-iters 1 --load"
    assert not train(*TINY_RUN, STEPS, evaluated, upscaled, "--save", root).check().losses
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


@pytest.mark.parametrize(("mode", "processes"), [("", 2), ("--async-save", 1)])
def test_a_run_that_another_one_overtook_in_its_save_is_refused(mode, processes, upscaled, tmp_path):
    def overtake(ranks, output):
        if read_latest_iteration(tmp_path) == 2:
            shutil.copytree(iteration_directory(tmp_path, 2), iteration_directory(tmp_path, 1000))
            write_latest_iteration(tmp_path, 1000)

    flags = f"--train-iters 100000 --lr-warmup-iters 2 --save-interval 2 {mode} --load {upscaled} --save {tmp_path}"
    run = train(*TINY_RUN, flags, processes=processes, while_running=overtake)
    assert "holds iteration 1000 of another run that was started meanwhile" in run.error
    assert read_latest_iteration(tmp_path) == 1000 and not list(tmp_path.glob(".iter_*"))


# -- at random -------------------------------------------------------------------------------------------------------
SAMPLES = 640
STARTS = 50
GOES_ON = (
    "--pretrained-checkpoint {upscaled} --load {root} --save {root}",
    "--pretrained-checkpoint {upscaled} --save {link}",
    "--load {upscaled} --save {root}",
    "--load {upscaled}/iter_0000000 --save {link}",
    "--load {link} --save {root}",
    "--load {root} --save {link} --exit-on-missing-checkpoint",
    "--load {root}/iter_{latest:07d} --save {root}",
    "--load {root} --ckpt-step {latest} --save {root}",
    "--save {root}",
)
SAVES_NOTHING = ("--load {root}", "--finetune --load {link}", "--load {root} --ckpt-step {earlier}")
REFUSED = (
    "--finetune --load {upscaled} --save {root}",
    "--finetune --load {root} --save {link}",
    "--load {root} --ckpt-step {earlier} --save {link}",
    "--load {link}/iter_{earlier:07d} --save {root}",
    "--load {upscaled} --ckpt-step 0 --save {root}",
)
BATCHES = ("--global-batch-size 2", "--global-batch-size 4", "--global-batch-size 8", "--global-batch-size 8 --rampup-batch-size 2 2 400")  # fmt: skip


@dataclasses.dataclass
class Ending:
    """What ends a start: the driver itself, or a signal some time after the first step or after the beginning."""

    flags: str
    number: int | None = None
    delay: float = 0.0
    after_a_step: bool = True
    begin: float = dataclasses.field(default_factory=time.monotonic)
    due: float | None = None

    def __post_init__(self) -> None:
        # A rank whose neighbour was killed is ended by the launcher, or finds it gone. Python gives signals back to the
        # system while it exits, after all is saved.
        killed = {1, -signal.SIGTERM} if self.number == signal.SIGKILL else set()
        self.codes = {0, *killed} | ({-self.number} if self.number is not None else set())

    def __call__(self, ranks, output) -> None:
        if self.number is None:
            return
        if self.due is None and ("] iteration " in output() or not self.after_a_step):
            self.due = time.monotonic() + self.delay
        if self.due is not None and time.monotonic() >= self.due and ranks[-1].is_alive():
            os.kill(ranks[-1].pid, self.number)
            self.number = None


def draw_ending(generator: random.Random) -> Ending:
    number = generator.choice([None, None, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGKILL])
    interval = f"--exit-interval {generator.randint(2, 6)} --save-interval {generator.randint(1, 4)}"
    if number == signal.SIGKILL:
        return Ending(interval, number, generator.uniform(0, 0.4), generator.random() < 0.7)
    return Ending(interval, number, generator.uniform(0, 0.1))


def samples_read(run: Run) -> list[int]:
    return sorted(int(index) for index in re.findall(r"^sample (\d+)$", run.out, re.MULTILINE))


def consumed_at(runs: list[Run], iteration: int) -> int:
    """Samples that lie behind an iteration, as the log of the last run says that made it."""
    for run in reversed(runs):
        for line in run.lines:
            if int(line["iteration"]) == iteration:
                return int(line["consumed samples"])
    return 0


def test_fifty_starts_and_stops_at_random_never_take_the_run_back(upscaled, tmp_path):
    generator = random.Random(16)
    root, link = tmp_path / "run", tmp_path / "link"
    link.symlink_to(root)
    common = f"--train-samples {SAMPLES} --lr-warmup-samples 8 --lr-decay-style cosine"
    saving: list[Run] = []  # runs that save into root, in order
    kinds = {"goes on": 0, "saves nothing": 0, "refused": 0}
    for start in range(STARTS + 1):
        latest = (read_latest_iteration(root) if root.is_dir() else None) or 0
        consumed = consumed_at(saving, latest)
        there = list_iterations(root) if root.is_dir() else []
        kind = generator.choices(list(kinds), [8, 1, 2])[0] if len(there) > 1 and start < STARTS else "goes on"
        forms = {"goes on": GOES_ON if latest else GOES_ON[:1], "saves nothing": SAVES_NOTHING, "refused": REFUSED}
        form = generator.choice(forms[kind]).format(
            upscaled=upscaled, root=root, link=link, latest=latest, earlier=generator.choice(there[:-1] or [0])
        )
        batch = generator.choice(BATCHES)
        processes = 2 if batch == "--global-batch-size 4" and generator.random() < 0.3 else 1
        ending = draw_ending(generator) if start < STARTS else Ending("")
        run = train(
            *TINY_RUN, common, batch, form, ending.flags, processes=processes, log_samples=True, while_running=ending
        )
        described = f"start {start}: {form} {batch} {ending}\n{run.out}\n{run.err}"
        kinds[kind] += 1
        now = (read_latest_iteration(root) if root.is_dir() else None) or 0
        assert now >= latest, described
        if kind != "goes on":
            assert now == latest, described
            assert kind != "refused" or "would begin at iteration" in run.error, described
            continue
        assert set(run.codes) <= ending.codes, described
        saving.append(run)
        # It reads on where the latest checkpoint is, each sample once and none left out.
        read = samples_read(run)
        assert read == list(range(consumed, consumed + len(read))), described
        assert now == latest or consumed < consumed_at([run], now) <= consumed + len(read), described
    # After the last start all samples but a partial batch are behind the latest checkpoint.
    assert SAMPLES - consumed_at(saving, read_latest_iteration(root) or 0) < 8
    assert min(kinds.values()) >= 3
