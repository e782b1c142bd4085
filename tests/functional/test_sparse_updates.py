"""``midus background`` and training with ``--memory-update-slots``, from command line to checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from driver import TINY_RUN, Run, train
from safetensors.torch import load_file
from upscaled import read_tensors, write_upscaled

import megatron_midus
from megatron_midus.checkpoint.checksums import check_checkpoint
from megatron_midus.checkpoint.layout import BACKGROUND_FILE

COUNT = (
    "--distributed-backend gloo --mock-data --num-workers 0 --seq-length 32 --micro-batch-size 1 --global-batch-size 2 "
    "--num-batches 3"
)
STEPS = "--train-iters 4 --lr-decay-style constant"
SPARSE = "--memory-update-slots 5"
BANK = "decoder.layers.1.self_attention.linear_proj.values"
SLOTS, HEADS, TOPK = 49, 4, 3  # of upscaled


def count(checkpoint: Path, *flags: str, processes: int = 1) -> Run:
    return train(COUNT, *flags, "--load", checkpoint, verb="background", processes=processes)


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """Without counts."""
    return write_upscaled(tmp_path_factory.mktemp("bare") / "checkpoint")


@pytest.fixture(scope="module")
def upscaled(tmp_path_factory) -> Path:
    root = write_upscaled(tmp_path_factory.mktemp("upscaled") / "checkpoint")
    run = count(root).check()
    assert "3 background batches of 2 samples, 192 tokens, read" in run.out
    return root


def test_counts_are_in_the_checkpoint(upscaled):
    directory = upscaled / "iter_0000000"
    counts = load_file(directory / BACKGROUND_FILE)
    assert set(counts) == {"1.batches", "1.reads"}
    assert int(counts["1.reads"].sum()) == 3 * 2 * 32 * HEADS * TOPK
    assert 1 <= int(counts["1.batches"].max()) <= 3
    assert torch.equal(counts["1.batches"] > 0, counts["1.reads"] > 0)
    assert check_checkpoint(directory)
    settings = {"distributed_backend": "gloo", "mock_data": True, "num_workers": 0, "seq_length": 32}
    settings |= {"global_batch_size": 2, "num_batches": 3}
    again = megatron_midus.background(load=upscaled, show_log=False, **settings)
    assert again == directory / BACKGROUND_FILE and check_checkpoint(directory)
    assert all(torch.equal(tensor, counts[name]) for name, tensor in load_file(again).items())


BF16 = "--bf16 --use-distributed-optimizer --async-save --kl-to-base 0.5"


@pytest.fixture(scope="module")
def runs(upscaled, tmp_path_factory) -> dict[str, tuple[Path, Run]]:
    """Four steps in one go, and two and two, in bf16 with a distributed optimizer of two processes."""
    root = tmp_path_factory.mktemp("runs")
    flags = (*TINY_RUN, STEPS, SPARSE, BF16, "--save-interval 2")
    whole = train(*flags, "--load", upscaled, "--save", root / "whole", processes=2).check()
    first = train(*flags, "--exit-interval 2 --load", upscaled, "--save", root / "parts", processes=2).check()
    second = train(*flags, "--load", root / "parts", "--save", root / "parts", processes=2).check()
    return {"whole": (root / "whole", whole), "first": (root / "parts", first), "second": (root / "parts", second)}


def test_resume_is_exact_and_counts_travel(runs, upscaled):
    whole, first, second = (runs[name][1] for name in ("whole", "first", "second"))
    assert "5 slots of a bank a step, by tfidf against 3 background batches of 2 samples" in whole.out
    assert {**first.losses, **second.losses} == whole.losses
    divergences = [line["kl to base"] for line in whole.lines]
    assert [line["kl to base"] for line in (*first.lines, *second.lines)] == divergences and float(divergences[0]) > 0
    found, expected = (read_tensors(runs[name][0], 4) for name in ("second", "whole"))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    counts = (upscaled / "iter_0000000" / BACKGROUND_FILE).read_bytes()
    for directory in sorted(runs["second"][0].glob("iter_*")):
        assert (directory / BACKGROUND_FILE).read_bytes() == counts and check_checkpoint(directory)


def test_other_slots_are_as_they_were_in_checkpoints(runs, upscaled):
    start, end = read_tensors(upscaled, 0), read_tensors(runs["whole"][0], 4)
    moved = (end[BANK].bfloat16() != start[BANK].bfloat16()).any(-1)
    assert 0 < int(moved.sum()) <= 4 * 5 < SLOTS
    for name in ("exp_avg", "exp_avg_sq"):
        state = end[f"optimizer.state.{name}.{BANK}"]
        assert not state[~moved].any()
    master = next(
        end[key] for key in (f"optimizer.state.param.{BANK}", f"optimizer.state.fp32_param.{BANK}") if key in end
    )
    assert torch.equal(master[~moved], start[BANK].bfloat16().float()[~moved])


def test_damaged_counts_are_seen(runs, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(runs["whole"][0], root)
    path = root / "iter_0000004" / BACKGROUND_FILE
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    run = train(*TINY_RUN, STEPS, SPARSE, "--bf16 --load", root).check()
    assert "Iteration 4 is NOT USED" in run.err and list(run.losses) == [3, 4]


def test_values_alone_by_sgd(upscaled, tmp_path):
    flags = (
        "--train-iters 2 --train values --value-optimizer sgd --recompute-granularity full --recompute-method uniform"
    )
    run = train(*TINY_RUN, flags, "--recompute-num-layers 1 --load", upscaled, "--save", tmp_path).check()
    assert "28,040 in total, 392 trainable (1.4 %, --train values)" in run.out and "memory values: by sgd" in run.out
    start, end = read_tensors(upscaled, 0), read_tensors(tmp_path, 2)
    assert [key for key in start if not torch.equal(start[key], end[key])] == [BANK]
    assert not end[f"optimizer.state.exp_avg.{BANK}"].any()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", "memory_update_slots=5 needs to know which slots text of the old domain reads"),
        ("", "make them with midus background --load DIR --data-path OLD"),
        ("--memory-update-slots 50", "memory_update_slots=50 is more than the 49 slots of a value bank"),
        (
            "--memory-update-slots 0 --train values --memory-log-interval 2 --memory-revive-interval 2",
            "memory_revive_interval=2 moves keys, which --train values freezes",
        ),
        (
            "--memory-update-slots 0 --train lora --lora-rank 2 --memory-log-interval 2 --memory-revive-interval 2",
            "memory_revive_interval=2 moves keys, which --train lora freezes",
        ),
        ("--train all --kl-to-base 2", "kl_to_base=2 needs the base as it was, and --train all of policy interleave"),
        ("--memory-update-slots -1", "memory_update_slots=-1 must not be negative"),
    ],
)
def test_what_cannot_be_is_one_line(flags, words, bare):
    assert words in train(*TINY_RUN, STEPS, SPARSE, flags, "--load", bare).error


def test_what_cannot_be_counted_is_one_line(bare):
    assert "no text of the old domain was given" in train("--load", bare, verb="background").error
