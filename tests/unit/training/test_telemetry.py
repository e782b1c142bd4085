"""The log line, what counts as skipped and NaN, perplexity, and who prints."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import pty
import re
import struct
import sys
import termios
import types

import pytest

from megatron_midus.config.logging import LoggingConfig
from megatron_midus.training.telemetry import StepReport, Telemetry, format_seconds


def telemetry(
    is_writer: bool = True, run_settings: dict | None = None, save_directory: str | None = None, **config
) -> Telemetry:
    return Telemetry(
        LoggingConfig(**{"log_interval": 2, **config}),
        train_iters=100,
        flops_per_token=1e9,
        seq_length=10,
        world_size=2,
        first_iteration=0,
        is_writer=is_writer,
        run_settings=run_settings,
        save_directory=save_directory,
    )


def report(iteration: int, loss: float | None = 1.0, **changes) -> StepReport:
    values = {
        "iteration": iteration,
        "consumed_samples": 4 * iteration,
        "batch_size": 4,
        "loss": loss,
        "skipped": False,
        "grad_norm": 0.5,
        "learning_rate": 1e-3,
        "value_learning_rate": 1e-2,
        "loss_scale": None,
        "num_zeros": None,
    }
    return StepReport(**{**values, **changes})


def test_a_line_every_interval_with_the_mean_loss(capsys):
    log = telemetry()
    for iteration, loss in ((1, 1.0), (2, 2.0), (3, 4.0), (4, 8.0)):
        log.step(report(iteration, loss))
    first, second = capsys.readouterr().out.splitlines()
    assert " iteration        2/     100 | consumed samples:            8 | elapsed time per iteration (ms): " in first
    assert (
        "| learning rate: 1.000000E-03 | global batch size:     4 | lm loss: 1.500000E+00 | grad norm: 0.500 |" in first
    )
    rest = first.partition("| grad norm: 0.500 ")[2]
    # Megatron's end, then ours.
    assert re.fullmatch(
        r"\| number of skipped iterations: +0 \| number of nan iterations: +0 \| tokens per second: \d+ \| time left: 0:00:\d\d \|",
        rest,
    )
    assert "lm loss: 6.000000E+00" in second and "throughput" not in first and "loss scale" not in first


def test_the_divergence_from_the_base_comes_behind_what_megatron_says(capsys):
    log = telemetry()
    log.step(report(1, kl_to_base=0.0))
    log.step(report(2, kl_to_base=0.5))
    assert "number of nan iterations:   0 | kl to base: 2.500000E-01 | tokens per second" in capsys.readouterr().out


def test_skipped_and_nan_steps_are_counted_and_left_out_of_the_mean(capsys):
    log = telemetry(log_interval=4)
    log.step(report(1, 2.0))
    log.step(report(2, math.inf, skipped=True, loss_scale=64.0))
    log.step(report(3, math.nan))
    log.step(report(4, 4.0, loss_scale=32.0))
    line = capsys.readouterr().out
    assert "lm loss: 3.000000E+00 | loss scale: 32.0 |" in line
    assert "number of skipped iterations:   1 | number of nan iterations:   2 |" in line


def test_throughput_tokens_and_time_left(capsys, monkeypatch):
    clock = iter([0.0, 8.0, 8.0])
    monkeypatch.setattr("megatron_midus.training.telemetry.time.perf_counter", lambda: next(clock))
    log = telemetry(log_throughput=True)
    log.pause(4.0)
    log.step(report(1))
    log.step(report(2))
    line = capsys.readouterr().out
    # 2 steps of 40 tokens in 8 - 4 seconds; 1e9 FLOPs a token on two devices.
    assert "elapsed time per iteration (ms): 2000.0 | throughput per GPU (TFLOP/s/GPU): 0.0 |" in line
    assert "tokens per second: 20 | time left: 0:03:16 |" in line


def test_only_the_writer_prints(capsys):
    log = telemetry(is_writer=False)
    log.step(report(2, None))
    log.evaluation(iteration=2, consumed_samples=8, split="validation", loss=1.0)
    assert capsys.readouterr().out == ""


def test_evaluations_are_framed_and_perplexity_does_not_overflow(capsys):
    telemetry().evaluation(iteration=2, consumed_samples=8, split="validation", loss=1000.0)
    rule, line, rule_again = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r" validation loss at iteration 2 \| lm loss value: 1\.000000E\+03 \| lm loss PPL: 4\.851652E\+08 \| ", line
    )
    assert set(rule) == {"-"} and rule == rule_again and len(rule) == len(line) + 1


def test_no_progress_bar_outside_a_terminal(capsys):
    log = telemetry()
    log.step(report(1))
    assert log._bar is None and capsys.readouterr().err == ""


def test_on_a_terminal_one_line_moves_on_and_the_log_stays_whole(capfd, monkeypatch):
    """stderr is a real terminal, 200 columns wide; stdout a file."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 200, 0, 0))
    with open(theirs, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        log = telemetry()
        # Steps of microseconds: drawn every time, not ten times a second.
        log._bar.mininterval, log._bar.miniters, log._bar.dynamic_miniters = 0, 1, False
        for iteration in (1, 2, 3):
            log.step(report(iteration, loss=iteration / 4))
        log.close()
    shown = "".join(read_terminal(ours))
    last = shown.split("\r")[-3]  # what follows wipes it out
    # done/all [time<time left, rate, loss]
    assert re.search(r"\| 3/100 \[\d\d:\d\d<\S+, +\S+step/s, loss 0\.7500\]", last), shown
    assert "\n" not in shown
    (line,) = capfd.readouterr().out.splitlines()
    assert " iteration        2/     100 |" in line and line.endswith("|")


def read_terminal(descriptor):
    """All that was written to a terminal whose other end is closed, which Linux tells by an error."""
    with contextlib.suppress(OSError):
        while text := os.read(descriptor, 1 << 16):
            yield text.decode()
    os.close(descriptor)


def test_weights_and_biases_gets_the_settings_and_every_figure(monkeypatch, tmp_path):
    """Its package is not needed by the tests: what it is called with is recorded."""
    calls = []
    run = types.SimpleNamespace(
        log=lambda scalars, step: calls.append((step, scalars)), finish=lambda: calls.append("finish")
    )
    package = types.SimpleNamespace(init=lambda **settings: calls.append(settings) or run)
    monkeypatch.setitem(sys.modules, "wandb", package)
    log = telemetry(
        wandb_project="p", wandb_exp_name="e", run_settings={"lr": 1e-3}, save_directory=str(tmp_path / "save")
    )
    log.step(report(1))
    log.step(report(2, loss=3.0, params_norm=9.0))
    log.evaluation(iteration=2, consumed_samples=8, split="validation", loss=0.0)
    log.close()
    begin, first, second, interval, evaluation, end = calls
    assert begin == {"project": "p", "name": "e", "config": {"lr": 1e-3}, "dir": str(tmp_path / "save" / "wandb")}
    assert (tmp_path / "save" / "wandb").is_dir() and end == "finish"
    assert first[0] == 1 and first[1]["lm loss"] == 1.0 and "params-norm" not in first[1]
    assert second == (2, {**second[1], "lm loss": 3.0, "params-norm": 9.0, "grad-norm": 0.5, "batch-size": 4})
    assert interval[0] == 2 and {"iteration-time", "throughput", "tokens-per-second"} <= set(interval[1])
    assert evaluation == (2, {"lm loss validation": 0.0, "lm loss validation ppl": 1.0})


def test_a_missing_wandb_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        telemetry(wandb_project="x", wandb_exp_name="y")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00:00"), (3661, "1:01:01"), (360_000, "100:00:00"), (-1, "0:00:00")]
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text
