"""Every way in which a run ends: signals, time, losses that are refused, ranks that die."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import time

import pytest
import torch
from driver import TINY_MODEL, TINY_RUN, train
from upscaled import read_weights, write_upscaled

from megatron_midus.conversion.checksums import check_checkpoint

ENDLESS = "--train-iters 100000 --lr-warmup-iters 2"


@pytest.fixture(scope="module")
def upscaled(tmp_path_factory):
    return write_upscaled(tmp_path_factory.mktemp("upscaled") / "checkpoint")


def latest(root) -> int:
    return int((root / "latest_checkpointed_iteration.txt").read_text())


# -- outputs ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("mode", "processes"),
    [
        ("", 1),
        ("--async-save", 2),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("--async-save", 1), ("", 2))),
    ],
)
def test_a_save_that_fails_is_one_line_and_leaves_the_checkpoint_before(mode, processes, upscaled, tmp_path):
    """From some moment on no file may pass 20 KB."""

    def take_the_room(ranks, output):
        if (tmp_path / "latest_checkpointed_iteration.txt").exists():
            for process in ranks:
                with contextlib.suppress(ProcessLookupError):
                    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))

    flags = [f"{ENDLESS} --save-interval 2 {mode} --load", upscaled, "--save", tmp_path]
    run = train(*TINY_RUN, *flags, processes=processes, while_running=take_the_room)
    last = latest(tmp_path)
    assert f"a checkpoint of iteration {last + 2} could not be saved to {tmp_path}" in run.error
    assert f"the latest one there is of iteration {last}" in run.error
    assert check_checkpoint(tmp_path / f"iter_{last:07d}")
    assert [path.name for path in tmp_path.glob(".*")] == []


# -- signals and time ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_to_one_rank_saves_and_exits_with_0(number, processes, upscaled, tmp_path):
    told = []

    def tell_one_rank(ranks, output):
        if not told and "] iteration " in output():
            os.kill(ranks[-1].pid, number)
            told.append(True)

    flags = [f"--tensor-model-parallel-size {processes} --load", upscaled, "--save", tmp_path]
    run = train(*TINY_RUN, ENDLESS, *flags, processes=processes, while_running=tell_one_rank).check()
    last = max(run.losses)
    assert latest(tmp_path) == last
    assert f"exiting after iteration {last}: {number.name} was received" in run.out


@pytest.mark.parametrize("flags", ["", "--async-save", "--num-workers 1"])
def test_a_signal_to_every_process_of_the_job_saves_as_well(flags, upscaled, tmp_path):
    """Schedulers do not tell ranks from what they started; checkpoint writers are at work already."""
    told = []

    def tell_all(ranks, output):
        if not told and "a checkpoint of iteration 2" in output():
            for pid in (ranks[0].pid, *descendants(ranks[0].pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            told.append(True)

    run = train(
        *TINY_RUN, ENDLESS, "--save-interval 2", flags, "--load", upscaled, "--save", tmp_path, while_running=tell_all
    ).check()
    assert latest(tmp_path) == max(run.losses) and "SIGTERM was received" in run.out


def descendants(pid: int) -> list[int]:
    children: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # what has ended has none
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as stream:
                children += [int(child) for child in stream.read().split()]
    return children + [grandchild for child in children for grandchild in descendants(child)]


def test_the_time_that_was_given_is_kept(upscaled, tmp_path):
    run = train(*TINY_RUN, ENDLESS, "--exit-duration-in-mins 0.01 --load", upscaled, "--save", tmp_path).check()
    assert f"exiting after iteration {latest(tmp_path)}: it ran for more than 0.01 minutes" in run.out
    assert latest(tmp_path) == max(run.losses)


# -- losses ----------------------------------------------------------------------------------------------------------
# An enormous learning rate overflows fp32 within a few steps.
DIVERGES = "--train-iters 20 --lr 1e30 --clip-grad 0 --train all --load"


def test_a_loss_that_is_nan_ends_the_run_without_touching_the_checkpoint(upscaled, tmp_path):
    run = train(*TINY_RUN, DIVERGES, upscaled, "--save", tmp_path)
    assert run.codes == [16], run.err  # Megatron-Core's "repeats: resume to disambiguate"
    saved = latest(tmp_path)
    assert saved == max(run.losses) >= 1
    assert all(torch.isfinite(weight).all() for weight in read_weights(tmp_path, saved).values())
    # Batches of four, in order.
    indices = ", ".join(str(4 * saved + i) for i in range(4))
    assert f"the step after iteration {saved} was refused" in run.out
    assert f"It read training samples {indices}; exit 16" in run.out


def test_without_a_second_computation_the_samples_are_named_too(upscaled):
    run = train(*TINY_RUN, DIVERGES, upscaled, "--rerun-mode disabled")
    assert "training diverged" in run.error
    first = 4 * max(run.losses)
    assert f"It read training samples {first}, {first + 1}, {first + 2}, {first + 3}" in run.error


# -- ranks that die --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("layout", "processes"),
    [
        ("--tensor-model-parallel-size 2", 2),
        ("--use-distributed-optimizer --overlap-grad-reduce", 2),
        ("--pipeline-model-parallel-size 3", 3),
    ],
)
def test_a_rank_that_dies_ends_the_others_with_one_line(layout, processes, upscaled):
    """Without a launcher that would end them, too: the others notice by themselves."""

    def kill_the_last(ranks, output):
        if "] iteration " in output() and ranks[-1].is_alive():
            ranks[-1].kill()

    run = train(*TINY_RUN, ENDLESS, layout, "--load", upscaled, processes=processes, while_running=kill_the_last)
    assert run.codes[-1] == -signal.SIGKILL and run.codes[0] == 1
    lines = run.err.splitlines()
    assert len(lines) == 1 and re.match(r"error: rank 0 lost another rank \(.*\), so this run cannot go on", lines[0])


def test_a_rank_that_hangs_ends_the_run_when_the_time_is_up(upscaled):
    def stop_the_last(ranks, output):
        if "] iteration " in output() and not stopped:
            os.kill(ranks[-1].pid, signal.SIGSTOP)
            stopped.append(True)

    stopped: list[bool] = []
    flags = "--tensor-model-parallel-size 2 --distributed-timeout-minutes 0.03 --load"
    run = train(*TINY_RUN, ENDLESS, flags, upscaled, processes=2, while_running=stop_the_last)
    assert run.codes == [1, -signal.SIGKILL]
    assert "error: rank 0 lost another rank" in run.err and "imed out" in run.err


def test_what_a_rank_started_ends_with_it(tmp_path):
    """A helper that stayed would keep the output of the job open for ever."""
    helpers: set[int] = set()

    def kill_after_a_save(ranks, output):
        if "a checkpoint of iteration 2" in output() and ranks[0].is_alive():
            helpers.update(descendants(ranks[0].pid))
            ranks[0].kill()

    train(*TINY_RUN, *TINY_MODEL, ENDLESS, "--save-interval 2 --save", tmp_path, while_running=kill_after_a_save)
    assert helpers
    deadline = time.monotonic() + 30
    while running := [pid for pid in helpers if is_running(pid)]:
        assert time.monotonic() < deadline, running
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stream:
            # A zombie has ended; whether anybody collects it is not its own affair.
            return stream.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
