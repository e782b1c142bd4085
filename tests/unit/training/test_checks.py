"""Layouts that do not divide are refused with both numbers and a way out."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util

import pytest

from megatron_midus.config import MemoryConfig, ModelConfig
from megatron_midus.training.architecture import Architecture, resolve_train
from megatron_midus.training.arguments import parse_arguments
from megatron_midus.training.checks import (
    RunSizes,
    check_environment,
    check_kl_to_base,
    check_schedule,
    num_virtual_stages,
    resolve_pipeline,
    resolve_sizes,
)
from megatron_midus.upscaling import make_plan
from megatron_midus.upscaling.pipeline_layout import parse_layout


def arguments(flags: str = "", length: str = "--train-iters 3"):
    length = "" if "--train-samples" in flags else length
    return parse_arguments(["--mock-data", "--lr", "1e-3", *length.split(), *flags.split()])


@pytest.mark.parametrize(
    ("flags", "world_size", "expected"),
    [
        ("", 1, RunSizes(1, 1, 1)),
        ("--micro-batch-size 3", 4, RunSizes(4, 4, 12)),
        ("--tensor-model-parallel-size 2 --pipeline-model-parallel-size 3", 12, RunSizes(12, 2, 2)),
        ("--global-batch-size 7 --micro-batch-size 3 --decrease-batch-size-if-needed", 2, RunSizes(2, 2, 7)),
    ],
)
def test_what_divides(flags, world_size, expected):
    assert resolve_sizes(arguments(flags), world_size) == expected


@pytest.mark.parametrize(
    ("flags", "world_size", "words"),
    [
        ("--tensor-model-parallel-size 2", 3, "3 processes do not divide into replicas of tensor 2"),
        ("--global-batch-size 5 --micro-batch-size 2", 1, "global_batch_size=5 is not divisible by micro_batch_size=2"),
        ("--global-batch-size 5 --micro-batch-size 3 --decrease-batch-size-if-needed", 2, "raise it"),
    ],
)
def test_what_does_not_divide(flags, world_size, words):
    with pytest.raises(ValueError) as caught:
        resolve_sizes(arguments(flags), world_size)
    assert words in str(caught.value)


def test_rampup_must_fit_the_replicas():
    flags = "--rampup-batch-size 2 2 8 --global-batch-size 12"
    with pytest.raises(ValueError, match="start and increment must be multiples of .* = 4"):
        resolve_sizes(arguments(flags, "--train-samples 30"), 4)


def test_virtual_stages():
    parallel = arguments("--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2").parallel
    assert num_virtual_stages(parallel, 12) == 3
    assert num_virtual_stages(arguments().parallel, 12) is None
    with pytest.raises(ValueError, match="num_layers=10 does not divide into 2 pipeline stages"):
        num_virtual_stages(parallel, 10)
    with pytest.raises(ValueError, match="leaves one chunk per stage"):
        num_virtual_stages(parallel, 4)


@pytest.mark.parametrize(
    ("policy", "flags", "words"),
    [
        ("interleave", "", None),
        ("interleave", "--train values", None),
        (
            "interleave",
            "--train all",
            "needs the base as it was, and --train all of policy interleave changes it; choose",
        ),
        ("interleave", "--pipeline-model-parallel-size 2", "pipeline_model_parallel_size=2 divides it; choose 1"),
        ("none", "--train lora --lora-rank 2", None),
        ("none", "", "--train all of policy none"),
        ("control", "--train inserted", "--train inserted of policy control"),
        ("control", "--train lora --lora-rank 2", None),
        ("solar", "", "--train all of policy solar"),
        ("solar", "--train inserted", None),
    ],
)
def test_whether_there_is_a_base_to_diverge_from(policy, flags, words):
    plan = make_plan(policy, num_layers=4, num_blocks=None if policy == "none" else 2, memory=MemoryConfig())

    def check(coefficient):
        given = arguments(f"{flags} --kl-to-base {coefficient}")
        train = resolve_train(given.training.train, plan)
        check_kl_to_base(given, Architecture(plan.applied_to(MODEL), plan, train, None))

    check(0)
    with contextlib.nullcontext() if words is None else pytest.raises(ValueError) as caught:
        check(0.5)
    assert words is None or (str(caught.value).startswith("kl_to_base=0.5 ") and words in str(caught.value))


def test_the_divergence_has_no_negative_weight():
    with pytest.raises(ValueError, match="kl_to_base=-1.0 must be 0"):
        arguments("--kl-to-base=-1")


MODEL = ModelConfig(
    num_layers=7,
    hidden_size=24,
    ffn_hidden_size=40,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=6,
    vocab_size=37,
    max_position_embeddings=64,
)


def resolved(flags):
    """The arguments after ``resolve_pipeline``, for a model of 5 layers and 2 Memory blocks."""
    given = arguments(flags)
    plan = make_plan("interleave", num_layers=5, insert_after=(1, 3), memory=MemoryConfig())
    parallel = resolve_pipeline(given.parallel, MODEL, plan, seq_length=32, train="all")
    return dataclasses.replace(given, parallel=parallel)


@pytest.mark.parametrize(
    ("flags", "layout", "chunks"),
    [
        ("--pipeline-model-parallel-size 7", None, None),
        ("--pipeline-model-parallel-size 2 --pipeline-layout auto", None, None),
        ("--pipeline-model-parallel-size 2 --pipeline-layout E(tt|)*3tL", "Ett|tt|tt|tL", 2),
        ("--pipeline-model-parallel-size 2 --pipeline-layout auto --num-virtual-stages-per-pipeline-rank 3", None, 3),
        ("--pipeline-model-parallel-size 3 --decoder-first-pipeline-num-layers 1", "Et|ttt|tttL", None),
        ("--pipeline-model-parallel-size 3 --decoder-last-pipeline-num-layers 1", "Ettt|ttt|tL", None),
        (
            "--pipeline-model-parallel-size 3 --decoder-first-pipeline-num-layers 4 "
            "--decoder-last-pipeline-num-layers 1",
            "Etttt|tt|tL",
            None,
        ),
    ],
)
def test_where_the_blocks_go(flags, layout, chunks):
    parallel = resolved(flags).parallel
    if "auto" not in flags:
        assert parallel.pipeline_model_parallel_layout == layout
    else:
        sizes = parse_layout(parallel.pipeline_model_parallel_layout, num_layers=7, num_stages=2)
        assert len(sizes) == 2 * (chunks or 1)
    assert num_virtual_stages(parallel, 7) == chunks


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            "2",
            "num_layers=7 (5 of the base) do not divide evenly into 2 pipeline stages of 1 chunks; give --pipeline-m",
        ),
        ("2 --pipeline-layout Ettt|tttL", "places 6 blocks and the model has 7"),
        ("3 --decoder-first-pipeline-num-layers 2", "leave 5 of num_layers=7 for 2 pipeline stages"),
        ("2 --decoder-first-pipeline-num-layers 2 --decoder-last-pipeline-num-layers 4", "leave 1 of num_layers=7"),
        (
            "2 --pipeline-layout Ett|tt|tt|tL --num-virtual-stages-per-pipeline-rank 3",
            "num_virtual_stages_per_pipeline_rank=3 contradicts",
        ),
    ],
)
def test_blocks_that_cannot_be_placed(flags, words):
    with pytest.raises(ValueError) as caught:
        resolved(f"--pipeline-model-parallel-size {flags}")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "chunked", ["--pipeline-layout Ett|tt|tt|tL", "--pipeline-layout auto --num-virtual-stages-per-pipeline-rank 2"]
)
@pytest.mark.parametrize(
    ("flags", "length", "words"),
    [
        ("--no-overlap-p2p-comm", "", "without overlapped transfers"),
        ("--global-batch-size 3", "", "micro-batches (3) to be a multiple of pipeline_model_parallel_size=2"),
        ("--global-batch-size 6 --rampup-batch-size 2 2 8", "--train-samples 30", "rampup_batch_size does not go with"),
    ],
)
def test_what_the_interleaved_schedule_cannot_do(chunked, flags, length, words):
    """However the chunks were asked for."""
    with pytest.raises(ValueError) as caught:
        given = resolved(f"--pipeline-model-parallel-size 2 {chunked} {flags} {length}".strip())
        check_schedule(given, resolve_sizes(given, 2), 7)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "package"),
    [("--save x", "psutil"), ("--tensorboard-dir x", "tensorboard"), ("--wandb-project x --wandb-exp-name y", "wandb")],
)
def test_packages_that_are_missing_are_named_before_the_run(flags, package, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(ValueError, match=f"pip install {package}"):
        check_environment(arguments(flags))
    check_environment(arguments())
