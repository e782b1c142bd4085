"""What the driver tells about Memory blocks: the log, TensorBoard, the alarm; and that telling changes nothing."""

from __future__ import annotations

import re

import pytest
from driver import TINY_RUN, Run, train
from upscaled import BASE, write_upscaled

FLAGS = "--train-iters 4 --memory-log-interval 2"
REVIVE = "--memory-log-steps 2 --memory-revive-interval 2 --memory-dead-threshold 0.3"


@pytest.fixture(scope="module")
def upscaled(tmp_path_factory):
    return write_upscaled(tmp_path_factory.mktemp("upscaled") / "checkpoint")


@pytest.fixture(scope="module")
def watched(upscaled, tmp_path_factory) -> tuple[Run, dict]:
    """A run with an alarm that nearly everything sets off, and what TensorBoard has of it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    directory = tmp_path_factory.mktemp("tensorboard")
    flags = "--memory-alarm-threshold 0.99 --tensorboard-dir"
    run = train(*TINY_RUN, FLAGS, flags, directory, "--load", upscaled).check()
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    found |= {tag: [(e.step, e.histogram_value) for e in events.Histograms(tag)] for tag in events.Tags()["histograms"]}
    return run, found


def memory_lines(run: Run) -> dict[int, str]:
    return {int(m[1]): m[2] for m in re.finditer(r" memory at iteration +(\d+) \| (.*) \|", run.out)}


def test_the_log_and_tensorboard_tell_the_same(watched):
    run, found = watched
    lines = memory_lines(run)
    assert list(lines) == [2, 4]
    for label, name, factor in (("slots used", "slots-used", 100), ("top-1 mass", "top1-mass", 1)):
        for step, value in found[f"memory/{name}/all"]:
            assert f"{label}: {value * factor:.{1 if factor == 100 else 3}f}" in lines[step]
    assert [step for step, _ in found["memory/entropy/block-001"]] == [2, 4]
    assert [step for step, _ in found["update-to-weight/memory-values"]] == [2, 4]
    histograms = found["memory/row-usage/block-001"]
    assert [histogram.num for _, histogram in histograms] == [BASE.num_attention_heads * 7] * 2


def test_training_is_the_same_without(watched, upscaled):
    run, _ = watched
    without = train(*TINY_RUN, "--train-iters 4 --memory-log-interval 0 --load", upscaled).check()
    assert memory_lines(without) == {}
    assert without.losses == run.losses
    assert [line["grad norm"] for line in without.lines] == [line["grad norm"] for line in run.lines]


def test_a_collapse_is_said_once_and_where_to_read_on(watched):
    run, _ = watched
    alarms = [line for line in run.out.splitlines() if "ALARM" in line]
    assert len(alarms) == 1 and "memory of block 1 has collapsed at iteration 2" in alarms[0]
    assert "docs/telemetry.md" in alarms[0] and "--memory-alarm-threshold 0.99" in alarms[0]


def test_averages_and_revival_go_on_after_a_stop(upscaled, tmp_path):
    flags = f"{FLAGS} {REVIVE}"
    whole = train(*TINY_RUN, flags, "--load", upscaled).check()
    first = train(*TINY_RUN, flags, "--exit-interval 2 --load", upscaled, "--save", tmp_path).check()
    second = train(*TINY_RUN, flags, "--load", tmp_path).check()
    assert "revived dead sub-keys after iteration 2" in first.out
    assert {**first.losses, **second.losses} == whole.losses
    # Dead shares come from averages of all reports.
    assert {**memory_lines(first), **memory_lines(second)} == memory_lines(whole)


def test_a_balance_loss_is_trained_and_told(upscaled, watched):
    run = train(*TINY_RUN, FLAGS, "--memory-balance-loss-coeff 1 --load", upscaled).check()
    assert all(re.search(r"balance loss: [1-6]\.\d{3}", line) for line in memory_lines(run).values())
    assert run.losses[1] == watched[0].losses[1]  # the loss that is told is that of the tokens
    assert run.losses[4] != watched[0].losses[4]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--memory-revive-interval 3", "memory_revive_interval=3 must be a multiple of memory_log_interval=2"),
        ("--memory-log-steps 3", "memory_log_steps=3 must lie between 1 and memory_log_interval=2"),
        ("--memory-dead-threshold 1", "memory_dead_threshold=1.0 must be at least 0 and below 1"),
    ],
)
def test_wrong_settings_are_one_line(flags, words, upscaled):
    assert words in train(*TINY_RUN, FLAGS, flags, "--load", upscaled).error


def test_what_needs_memory_blocks_is_refused_without_them():
    model = "--num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --vocab-size 101"
    run = train(*TINY_RUN, "--train-iters 2 --memory-balance-loss-coeff 0.1", model)
    assert "memory_balance_loss_coeff=0.1 is a setting of Memory blocks, and policy none has none" in run.error
