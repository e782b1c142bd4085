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
from driver import TINY_MODEL, TINY_RUN, fork_server, train
from upscaled import read_weights, write_upscaled

from megatron_midus.checkpoint.checksums import check_checkpoint
from megatron_midus.training.signals import TerminationSignal

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
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("flags", ["", "--async-save", "--num-workers 1"])
def test_a_signal_to_every_process_of_the_job_saves_as_well(flags, number, upscaled, tmp_path):
    """Schedulers do not tell ranks from what they started; checkpoint writers are at work already."""
    told = []

    def tell_all(ranks, output):
        if not told and "a checkpoint of iteration 2" in output():
            for pid in (ranks[0].pid, *descendants(ranks[0].pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            told.append(True)

    run = train(
        *TINY_RUN, ENDLESS, "--save-interval 2", flags, "--load", upscaled, "--save", tmp_path, while_running=tell_all
    ).check()
    assert latest(tmp_path) == max(run.losses) and f"{number.name} was received" in run.out
    assert run.err.count("interrupted") == (number == signal.SIGINT)


# Without a signal these take minutes.
EVALUATES = "--eval-interval 2 --eval-iters 100000"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("layout", ["", "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 3"])
def test_a_signal_during_an_evaluation_leaves_it_and_saves(number, layout, upscaled, tmp_path):
    processes = int(layout[-1]) if layout else 1
    told: list[float] = []

    def tell_one_rank(ranks, output):
        if not told and "] iteration        2/" in output():
            told.append(time.monotonic() + 0.1)
        if told and told[0] and time.monotonic() > told[0]:
            os.kill(ranks[0].pid, number)
            told[0] = 0.0

    flags = [EVALUATES, layout, "--load", upscaled, "--save", tmp_path]
    run = train(*TINY_RUN, ENDLESS, *flags, processes=processes, while_running=tell_one_rank).check()
    assert latest(tmp_path) == 2 and not run.evaluations
    assert re.search(r"left the evaluation on the validation split after \d+ of 100000 batches", run.out)
    assert f"exiting after iteration 2: {number.name} was received" in run.out


def test_the_time_that_was_given_is_kept_in_an_evaluation_too(upscaled, tmp_path):
    time_limit = "--eval-interval 1 --exit-duration-in-mins 0.0001 --load"
    run = train(*TINY_RUN, ENDLESS, EVALUATES, time_limit, upscaled, "--save", tmp_path).check()
    assert latest(tmp_path) == 1 and "left the evaluation" in run.out


def test_an_evaluation_that_is_left_without_training_is_no_success(upscaled):
    told = []

    def tell(ranks, output):
        if not told and "configuration (what is not the default)" in output():
            told.append(os.kill(ranks[0].pid, signal.SIGTERM))

    run = train(*TINY_RUN, ENDLESS, EVALUATES, "--skip-train --load", upscaled, while_running=tell)
    assert run.codes == [1] and "exiting without the evaluation: SIGTERM was received" in run.out


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_interrupt_ends_at_once(second):
    """torchrun passes a second Ctrl-C on as SIGTERM."""
    process = fork_server().Process(target=interrupted_twice, args=(second,))
    process.start()
    process.join(60)
    assert process.exitcode == -second


def interrupted_twice(second: int) -> None:
    signals = TerminationSignal()
    signals.install()
    signals.install_interrupt()
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):  # a scheduler's warnings are no second Ctrl-C
        os.kill(os.getpid(), number)
    assert TerminationSignal.received_here == signal.SIGUSR1
    os.kill(os.getpid(), second)


def test_an_interrupt_before_there_is_anything_to_save_is_one_line(upscaled):
    def interrupt(ranks, output):
        if ranks[0].is_alive() and not told and "model:" in output():
            told.append(os.kill(ranks[0].pid, signal.SIGINT))

    told: list[None] = []
    run = train(*TINY_RUN, ENDLESS, "--load", upscaled, while_running=interrupt)
    assert run.codes[0] in (0, 130) and "Traceback" not in run.err


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
