"""What the driver offers around training: --config, --dry-run, --profile, and the comparison of replicas."""

from __future__ import annotations

import json
import re
import shutil

import numpy
import pytest
import torch
from driver import TINY_MODEL, TINY_RUN, train
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from upscaled import BASE, read_weights, write_upscaled

from megatron_midus.checkpoint.layout import iteration_directory
from megatron_midus.training.arguments import parse_arguments
from megatron_midus.upscaling import UpscalePlan
from megatron_midus.upscaling.cost import flops_per_token, total_parameters, trainable_parameters


@pytest.fixture(scope="module")
def upscaled(tmp_path_factory):
    """An up-scaled checkpoint: base, memory, base; all weights random."""
    return write_upscaled(tmp_path_factory.mktemp("upscaled") / "checkpoint")


def words(*arguments):
    return [word for argument in arguments for word in str(argument).split()]


# -- --config --------------------------------------------------------------------------------------------------------
def test_a_saved_configuration_says_the_run_again(tmp_path):
    flags = [*TINY_RUN, *TINY_MODEL, "--train-iters 3 --weight-decay 0.05 --no-save-rng --clip-grad 0.7"]
    first = train(*flags, "--save", tmp_path / "first").check()
    saved = tmp_path / "first/run.yaml"
    assert parse_arguments(["--config", str(saved)]) == parse_arguments(words(*flags, "--save", tmp_path / "first"))
    again = train("--config", saved, "--save", tmp_path / "again").check()
    assert again.losses == first.losses and len(first.losses) == 3
    assert (tmp_path / "again/run.yaml").read_text() == saved.read_text().replace("/first", "/again")

    printed = first.out[first.out.index("configuration (what is not the default):") :].splitlines()
    assert "  clip_grad: 0.7" in printed and "  save_rng: false" in printed and "  hidden_size: 32" in printed
    assert "  bf16: false" not in printed and "  profile_ranks: [0]" not in printed


def test_a_configuration_by_hand_and_flags_that_win(tmp_path):
    (tmp_path / "run.yaml").write_text(
        """
        distributed-backend: gloo
        mock-data: true
        num-workers: 0
        seq-length: 32
        micro-batch-size: 2
        lr: 1e-3
        train-iters: 7      # a flag says 2
        eval-iters: 0
        eval-interval: 0
        log-interval: 1
        num-layers: 2
        hidden-size: 32
        ffn-hidden-size: 64
        num-attention-heads: 4
        vocab-size: 101
        """
    )
    run = train("--config", tmp_path / "run.yaml", "--train-iters 2").check()
    assert set(run.losses) == {1, 2}
    (tmp_path / "run.yaml").write_text("train_itres: 3")
    error = train("--config", tmp_path / "run.yaml").error
    assert "run.yaml: 'train_itres' is no flag; did you mean train_iters?" in error


# -- --dry-run -------------------------------------------------------------------------------------------------------
LAYOUTS = {
    "one": ("", 1),
    "tp2-bf16": ("--tensor-model-parallel-size 2 --bf16 --kl-to-base 1", 2),
    "pp3-distributed-optimizer": ("--pipeline-model-parallel-size 3 --use-distributed-optimizer --train all", 3),
    "dp2-distributed-optimizer-bf16": ("--use-distributed-optimizer --overlap-grad-reduce --bf16", 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dry_run_reports_and_leaves_everything_as_it_was(layout, upscaled, tmp_path):
    flags, processes = LAYOUTS[layout]
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(upscaled, checkpoint)
    data = write_documents(tmp_path / "documents")
    before = contents(tmp_path)
    run = train(
        *TINY_RUN, "--train-iters 5 --no-mock-data --tokenizer-type NullTokenizer --split 1 --data-path", data,
        "--load", checkpoint, "--save", checkpoint, "--save-interval 1 --tensorboard-dir", tmp_path / "tensorboard",
        "--profile --log-throughput --dry-run", flags, processes=processes,
    ).check()  # fmt: skip
    assert contents(tmp_path) == before
    assert run.lines == [] and "nothing was trained and nothing written" in run.out

    plan = UpscalePlan.load(iteration_directory(upscaled, 0))
    model = BASE.with_layers([0] * 3)
    which = "all" if "--train all" in flags else "inserted"
    flops = flops_per_token(model, plan, 32, train=which, kl_to_base="kl-to-base" in flags)
    assert f"FLOPs: {flops:.4g} a token, {flops * 4 * 32:.4g} a step of 128 tokens" in run.out
    assert f"{flops * 128 / processes:.4g} a step on each of {processes} devices" in run.out
    assert "steps: 5 to go of 5, 640 tokens" in run.out

    ranks = ranks_of(run.out)
    assert sum(rank["count"] for rank in ranks) == processes
    total, trained = total_parameters(model, plan), trainable_parameters(model, plan, which)
    copies = 2 if layout.startswith("dp2") else 1
    if "tensor" not in flags:
        assert sum(rank["count"] * rank["parameters"] for rank in ranks) == copies * total
        assert sum(rank["count"] * rank["trainable"] for rank in ranks) == copies * trained
    size = 2 if "bf16" in flags else 4
    for rank in ranks:
        # Three digits are printed; buckets and their shards are padded to multiples of 64 and 128 elements.
        assert rank["weights"] == pytest.approx(size * rank["parameters"], rel=5e-3)
        assert 4 * rank["trainable"] <= 1.005 * rank["gradients"] + 5 <= 4 * rank["trainable"] * 1.01 + 4 * 5 * 128
        assert rank["together"] == pytest.approx(rank["weights"] + rank["gradients"] + rank["optimizer"], rel=1e-2)
        assert rank["peak"] > 1e7
    state = 8 + (4 if "bf16" in flags else 0)
    optimizer = sum(rank["count"] * rank["optimizer"] for rank in ranks)
    # A distributed optimizer shares the state among the replicas.
    held = trained if "distributed" in flags else sum(rank["count"] * rank["trainable"] for rank in ranks)
    assert optimizer == pytest.approx(state * held, rel=5e-3)


def ranks_of(out):
    pattern = (
        r"ranks? (\d+)(?:-(\d+), each)?: ([\d,]+) parameters, ([\d,]+) trainable; weights ([\d.]+ \w+), "
        r"gradients ([\d.]+ \w+), optimizer ([\d.]+ \w+), together ([\d.]+ \w+); peak of a pass ([\d.]+ \w+),"
    )
    names = ("parameters", "trainable", "weights", "gradients", "optimizer", "together", "peak")
    units = {"": 1, "B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}
    found = []
    for first, last, *values in re.findall(pattern, out):
        parts = [value.replace(",", "").partition(" ") for value in values]
        numbers = {name: float(number) * units[unit] for name, (number, _, unit) in zip(names, parts)}
        found.append({"count": int(last or first) - int(first) + 1, **numbers})
    assert found, out
    return found


def write_documents(prefix):
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    for length in range(5, 45):
        builder.add_document(numpy.arange(length), [length])
    builder.finalize(f"{prefix}.idx")
    return prefix


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_dry_run_of_data_that_do_not_fit_fails(upscaled, tmp_path):
    flags = "--train-iters 5 --no-mock-data --tokenizer-type NullTokenizer --dry-run --data-path"
    run = train(*TINY_RUN, flags, tmp_path / "nowhere", "--load", upscaled)
    assert "nowhere.idx does not exist" in run.error


# -- --profile -------------------------------------------------------------------------------------------------------
def test_a_window_of_steps_is_recorded(upscaled, tmp_path):
    flags = "--train-iters 6 --profile --profile-step-start 3 --profile-step-end 5 --profile-ranks 1 --load"
    run = train(*TINY_RUN, flags, upscaled, "--profile-dir", tmp_path / "traces", processes=2).check()
    assert [path.name for path in (tmp_path / "traces").iterdir()] == ["rank_1.json"]
    assert f"rank 1 wrote the profile {tmp_path / 'traces/rank_1.json'}" in run.out
    events = json.loads((tmp_path / "traces/rank_1.json").read_text())["traceEvents"]
    # Adam works once a step.
    assert sum(event.get("name", "").startswith("Optimizer.step#") for event in events) == 2
    plain = train(*TINY_RUN, "--train-iters 6 --load", upscaled, processes=2).check()
    assert run.losses == plain.losses


def test_a_run_that_ends_inside_the_window_keeps_its_trace(upscaled, tmp_path):
    flags = "--train-iters 3 --profile --profile-step-start 2 --profile-step-end 9 --load"
    train(*TINY_RUN, flags, upscaled, "--save", tmp_path).check()
    assert json.loads((tmp_path / "profile/rank_0.json").read_text())["traceEvents"]
    assert "give --profile-dir" in train(*TINY_RUN, flags, upscaled).error


# -- replicas --------------------------------------------------------------------------------------------------------
CHECK = "--train-iters 4 --check-weight-hash-across-dp-replicas-interval 2 --load"


@pytest.mark.parametrize(
    "layout",
    ["", "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather", "--tensor-model-parallel-size 2"],
)
def test_replicas_are_equal(layout, upscaled):
    """In fp32 and after steps that move every weight, the replicated values of the memory among them."""
    run = train(*TINY_RUN, "--train all", layout, CHECK, upscaled, processes=2).check()
    assert len(run.losses) == 4


def test_weights_do_not_change_by_looking(upscaled, tmp_path):
    flags = "--train-iters 2 --load"
    train(*TINY_RUN, flags, upscaled, "--save", tmp_path / "a").check()
    train(
        *TINY_RUN, flags, upscaled, "--check-weight-hash-across-dp-replicas-interval 1 --save", tmp_path / "b"
    ).check()
    one, other = read_weights(tmp_path / "a", 2), read_weights(tmp_path / "b", 2)
    assert all(torch.equal(one[name], other[name]) for name in one)
