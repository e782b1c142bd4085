"""--train lora in real processes: it resumes exactly, only adapters learn, and a checkpoint is an ordinary model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from driver import TINY_RUN, Run, train
from upscaled import BASE, read_tensors, write_averages, write_upscaled

STEPS = "--train-iters 8 --lr 1e-2 --lr-warmup-iters 2 --lr-decay-style cosine"
LORA = "--train lora --lora-rank 3"


@pytest.fixture(scope="module")
def upscaled(tmp_path_factory):
    """Base, memory, base; all weights random."""
    return write_upscaled(tmp_path_factory.mktemp("upscaled") / "checkpoint")


@pytest.fixture(scope="module")
def stopped(upscaled, tmp_path_factory) -> tuple[Run, object]:
    """Three of eight steps, with an evaluation behind them."""
    save = tmp_path_factory.mktemp("stopped")
    evaluate = "--eval-interval 3 --eval-iters 2 --exit-interval 3"
    return train(*TINY_RUN, STEPS, LORA, evaluate, "--load", upscaled, "--save", save).check(), save


LAYOUTS = {
    "alone": ("", 1),
    "dp2-distributed-optimizer": ("--use-distributed-optimizer", 2),
    "pp3": ("--pipeline-model-parallel-size 3", 3),
    "recompute": ("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1", 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resume_is_exact_at_every_layout(layout, upscaled, stopped, tmp_path):
    flags, processes = LAYOUTS[layout]
    whole = train(*TINY_RUN, STEPS, LORA, flags, "--load", upscaled, processes=processes).check()
    assert float(whole.losses[8]) != float(whole.losses[1])
    if layout == "alone":
        _, save = stopped
    else:
        save = tmp_path
        words = (*TINY_RUN, STEPS, LORA, flags, "--exit-interval 3 --load", upscaled, "--save", save)
        train(*words, processes=processes).check()
    second = train(*TINY_RUN, STEPS, LORA, flags, "--load", save, processes=processes).check()
    assert second.losses == {i: loss for i, loss in whole.losses.items() if i > 3}


def test_a_checkpoint_holds_the_merged_model(upscaled, stopped):
    run, save = stopped
    before, after = read_tensors(upscaled, 0), read_tensors(save, 3)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    linear = {
        key
        for key in before
        if ".linear_" in key and key.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight"))
    }
    assert changed == linear and len(changed) == 4 + 1 + 4
    for key in linear:
        assert torch.equal(after[f"lora.{key}"], before[key]), "the weight below the adapter is the base's"
    # Whoever knows nothing of adapters reads the same model: two evaluations of the same batches.
    plain = train(*TINY_RUN, "--skip-train --eval-iters 2 --load", save).check()
    (mine,) = [loss for (split, iteration), loss in run.evaluations.items() if (split, iteration) == ("validation", 3)]
    theirs = plain.evaluations["validation", 3]
    assert theirs == pytest.approx(mine, rel=1e-5) and mine != pytest.approx(float(run.losses[1]), rel=1e-3)


# -- mixtures of experts ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    base = dataclasses.replace(BASE, num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=24)
    return write_upscaled(tmp_path_factory.mktemp("mixture") / "checkpoint", base=base)


def test_adapters_of_experts(mixture, tmp_path):
    """Two processes that share the experts train as one does and write what one writes, an ordinary mixture."""
    runs, saved = [], []
    for flags, processes in (("", 1), ("--expert-model-parallel-size 2", 2)):
        save = tmp_path / str(processes)
        evaluate = "--eval-interval 3 --eval-iters 2 --exit-interval 3 --ema-decay 0.9"
        words = (*TINY_RUN, STEPS, LORA, flags, evaluate, "--load", mixture, "--save", save)
        runs.append(train(*words, processes=processes).check())
        saved.append(read_tensors(save, 3))
    curves = [[float(loss) for loss in run.losses.values()] for run in runs]
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    plain = train(*TINY_RUN, "--skip-train --eval-iters 2 --load", tmp_path / "1").check()
    assert plain.evaluations["validation", 3] == pytest.approx(runs[0].evaluations["validation", 3], rel=1e-5)
    # The average of the weights is the model of averaged adapters.
    alone = write_averages(tmp_path / "1", 3, tmp_path / "averages")
    plain = train(*TINY_RUN, "--skip-train --eval-iters 2 --load", alone).check()
    assert plain.evaluations["validation", 0] == pytest.approx(runs[0].evaluations["validation EMA", 3], rel=1e-5)
    assert runs[0].evaluations["validation EMA", 3] != pytest.approx(runs[0].evaluations["validation", 3], rel=1e-5)
    before = read_tensors(mixture, 0)
    changed = {key for key in before if not torch.equal(before[key], saved[0][key])}
    experts = [f"decoder.layers.{block}.mlp.experts.experts.linear_fc{i}.weight" for block in (0, 2) for i in (1, 2)]
    assert changed == {key for key in before if "linear_qkv.weight" in key or key.endswith("linear_proj.weight")} | set(experts)  # fmt: skip
    for key, tensor in saved[0].items():
        torch.testing.assert_close(saved[1][key], tensor, rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
    for key in experts:
        down, up = (saved[0][f"lora.{key.removesuffix('weight')}adapter.{name}"] for name in ("down", "up"))
        matrices = down.shape[1] // 3  # gate and up, or one
        deltas = [16 / 3 * u @ d for u, d in zip(up.chunk(matrices, 1), down.chunk(matrices, 1))]
        assert torch.equal(saved[0][f"lora.{key}"], before[key])
        torch.testing.assert_close(saved[0][key], before[key] + torch.cat(deltas, 1), rtol=1e-5, atol=1e-6)
        assert all((saved[0][key][expert] != before[key][expert]).any() for expert in range(4)), "every expert learns"
    # The run goes on exactly from the frozen weights, the adapters, and their average.
    averaged = "--eval-interval 8 --eval-iters 2 --ema-decay 0.9"
    words = (*TINY_RUN, STEPS, LORA, averaged, "--expert-model-parallel-size 2 --load")
    second = train(*words, tmp_path / "2", processes=2).check()
    whole = train(*words, mixture, processes=2).check()
    assert second.losses == {i: loss for i, loss in whole.losses.items() if i > 3}
    assert second.evaluations == whole.evaluations and ("validation EMA", 8) in whole.evaluations


@pytest.mark.parametrize(
    ("flags", "processes", "message"),
    [
        ("--train lora", 1, "--train lora and --lora-rank need each other"),
        ("--train lora --lora-rank 3 --tensor-model-parallel-size 2", 2, "does not split its adapters; choose 1"),
        ("--train lora --lora-rank 3 --expert-tensor-parallel-size 2", 1, "does not split its adapters; choose 1, and"),
        ("--train lora --lora-rank 3 --moe-grouped-gemm", 1, "adapts experts one by one; leave --moe-grouped-gemm out"),
        ("--train lora --lora-rank 4", 1, "whose adapters have rank 3; give --lora-rank 3"),
    ],
)
def test_what_cannot_be_is_refused(flags, processes, message, stopped):
    _, save = stopped
    run = train(*TINY_RUN, STEPS, flags, "--load", save, processes=processes)
    assert message in run.err, run.err
