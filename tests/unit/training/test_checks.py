"""Layouts that do not divide are refused with both numbers and a way out."""

from __future__ import annotations

import importlib.util

import pytest

from megatron_midus.training.arguments import parse_arguments
from megatron_midus.training.checks import Layout, check_environment, num_virtual_stages, resolve_layout


def arguments(flags: str = "", length: str = "--train-iters 3"):
    return parse_arguments(["--mock-data", "--lr", "1e-3", *length.split(), *flags.split()])


@pytest.mark.parametrize(
    ("flags", "world_size", "expected"),
    [
        ("", 1, Layout(1, 1, 1)),
        ("--micro-batch-size 3", 4, Layout(4, 4, 12)),
        ("--tensor-model-parallel-size 2 --pipeline-model-parallel-size 3", 12, Layout(12, 2, 2)),
        ("--global-batch-size 7 --micro-batch-size 3 --decrease-batch-size-if-needed", 2, Layout(2, 2, 7)),
    ],
)
def test_what_divides(flags, world_size, expected):
    assert resolve_layout(arguments(flags), world_size) == expected


@pytest.mark.parametrize(
    ("flags", "world_size", "words"),
    [
        ("--tensor-model-parallel-size 2", 3, "3 processes do not divide into replicas of tensor 2"),
        ("--global-batch-size 5 --micro-batch-size 2", 1, "global_batch_size=5 is not divisible by micro_batch_size=2"),
        ("--global-batch-size 5 --micro-batch-size 3 --decrease-batch-size-if-needed", 2, "raise it"),
        (
            "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --global-batch-size 3",
            2,
            "micro-batches (3) to be a multiple of pipeline_model_parallel_size=2",
        ),
    ],
)
def test_what_does_not_divide(flags, world_size, words):
    with pytest.raises(ValueError) as caught:
        resolve_layout(arguments(flags), world_size)
    assert words in str(caught.value)


def test_rampup_must_fit_the_replicas():
    flags = "--rampup-batch-size 2 2 8 --global-batch-size 12"
    with pytest.raises(ValueError, match="start and increment must be multiples of .* = 4"):
        resolve_layout(arguments(flags, "--train-samples 30"), 4)


def test_virtual_stages():
    parallel = arguments("--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2").parallel
    assert num_virtual_stages(parallel, 12) == 3
    assert num_virtual_stages(arguments().parallel, 12) is None
    with pytest.raises(ValueError, match="num_layers=10 does not divide into 2 pipeline stages"):
        num_virtual_stages(parallel, 10)
    with pytest.raises(ValueError, match="leaves one chunk per stage"):
        num_virtual_stages(parallel, 4)


@pytest.mark.parametrize(
    ("flags", "package"),
    [("--save x", "psutil"), ("--tensorboard-dir x", "tensorboard"), ("--wandb-project x --wandb-exp-name y", "wandb")],
)
def test_packages_that_are_missing_are_named_before_the_run(flags, package, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(ValueError, match=f"pip install {package}"):
        check_environment(arguments(flags))
    check_environment(arguments())
