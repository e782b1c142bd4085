"""Checkpoints from every layout to every other: the run goes on along the curve of the one that was never interrupted, decaying
towards the same start, and so does the average of its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import training_runs
from launcher import launch
from scenarios import assemble
from training_runs import Run

LAYOUTS = {
    "one": (1, ""),
    "tp2": (2, "--tensor-model-parallel-size 2"),
    "tp2 sp, latent": (
        2,
        "--tensor-model-parallel-size 2 --sequence-parallel --memory-value-placement latent",
    ),
    "pp2, by cost": (2, "--pipeline-model-parallel-size 2 --pipeline-layout auto"),
    "pp2 vpp3": (2, "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 3"),
    "dp2, distributed optimizer": (2, "--use-distributed-optimizer"),
    "tp2 dp2, overlapped": (
        4,
        "--tensor-model-parallel-size 2 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    ),
}
FAST = ("tp2 sp, latent",)
FIRST, LAST = 3, 6
AVERAGED = "--ema-decay 0.9 --l2-to-start 50"  # 15 % of the way, of values 45 %


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("start")
    launch(training_runs.write_checkpoints, 1, root)
    return root / "hive"


@pytest.fixture(scope="module")
def whole(checkpoint: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """``[steps, (iteration, loss, gradient norm)]`` after the interruption, and the average, of one process without one."""
    (found,) = launch(training_runs.train_and_average, 1, {"whole": Run(checkpoint, AVERAGED, LAST)}, "")
    curve, average = found["whole"]
    return torch.tensor(curve, dtype=torch.float64)[FIRST:], assemble([average])


@pytest.fixture(scope="module")
def expected(whole: tuple[torch.Tensor, dict[str, torch.Tensor]]) -> torch.Tensor:
    return whole[0]


@pytest.fixture(scope="module")
def saved(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory):
    """``saved(layout)``: the root of a checkpoint that this layout wrote after ``FIRST`` steps."""
    root = tmp_path_factory.mktemp("saved")

    def save(layout: str) -> Path:
        directory = root / layout.replace(" ", "_")
        if not directory.exists():
            world_size, flags = LAYOUTS[layout]
            run = Run(checkpoint, AVERAGED, FIRST, directory)
            launch(training_runs.train_runs, world_size, {"first": run}, flags)
        return directory

    return save


def on_the_last_stage(ranks: list[dict[str, list]], name: str) -> list[torch.Tensor]:
    found = [torch.tensor(rank[name], dtype=torch.float64) for rank in ranks if rank[name][0][1] is not None]
    assert found
    return found


@pytest.mark.parametrize("target", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in LAYOUTS])
def test_the_curve_and_the_average_go_on(target: str, expected: torch.Tensor, whole, saved) -> None:
    """From each layout, with or without a distributed optimizer; the moments are part of what decides the curve."""
    world_size, flags = LAYOUTS[target]
    sources = LAYOUTS if target not in FAST else ("one", "tp2", "dp2, distributed optimizer")
    runs = {source: Run(saved(source), AVERAGED, LAST) for source in sources}
    outcomes = launch(training_runs.train_and_average, world_size, runs, flags)
    ranks = [{source: curve for source, (curve, _) in rank.items()} for rank in outcomes]
    for source in runs:
        found = assemble([rank[source][1] for rank in outcomes])
        for key, average in whole[1].items():
            torch.testing.assert_close(
                found[key], average, rtol=1e-5, atol=1e-5, msg=lambda m, key=key, source=source: f"{source}, {key}: {m}"
            )
        for found in on_the_last_stage(ranks, source):
            # As close as two layouts without a checkpoint between them.
            torch.testing.assert_close(
                found, expected, rtol=1e-5, atol=0, msg=lambda m, source=source: f"{source}: {m}"
            )


def test_without_the_moments_the_curve_is_another(expected: torch.Tensor, saved) -> None:
    """Or the comparison above could not tell."""
    run = Run(saved("one"), "--no-load-optim", steps=LAST)
    (curves,) = launch(training_runs.train_runs, 1, {"fresh": run}, "")
    found = torch.tensor(curves["fresh"], dtype=torch.float64)
    assert (found[1:, 1] / expected[1:, 1] - 1).abs().max() > 1e-3


def test_a_run_with_another_start_is_another(expected: torch.Tensor, saved) -> None:
    """Or the comparison above could not tell the start in a checkpoint from the weights there."""
    runs = {"free": Run(saved("one"), "", LAST), "late": Run(saved("one"), "--finetune --l2-to-start 50", LAST - FIRST)}
    (curves,) = launch(training_runs.train_runs, 1, runs, "")
    for curve in curves.values():
        assert (torch.tensor(curve, dtype=torch.float64)[1:, 1] / expected[1:, 1] - 1).abs().max() > 1e-3


def test_a_step_begins_with_the_share_of_the_way_back(checkpoint: Path) -> None:
    """The first step has no way to go. The second has the gradient of the run without decay, so it differs by the pull alone."""
    plain = "--weight-decay 0 --value-lr-mult 5 --micro-batch-size 1"
    runs = {"free": Run(checkpoint, plain, 2), "held": Run(checkpoint, f"{plain} --l2-to-start 50", 2)}
    ranks = launch(training_runs.train_and_watch, 4, runs, "--use-distributed-optimizer")
    free, held = ([assemble(list(step)) for step in zip(*(rank[name] for rank in ranks))] for name in runs)
    assert sum(not torch.equal(free[0][key], free[1][key]) for key in free[0]) > 30
    for key, start in free[0].items():
        assert torch.equal(free[1][key], held[1][key])
        share = 3e-3 * 50 * (5 if key.endswith(".values") else 1)
        pulled = free[2][key].double() - share * (free[1][key].double() - start.double())
        torch.testing.assert_close(
            held[2][key].double(), pulled, rtol=0, atol=1e-7, msg=lambda m, key=key: f"{key}: {m}"
        )


def test_sixteen_bit_weights_are_averaged_as_their_masters(checkpoint: Path, tmp_path: Path) -> None:
    """In steps far below a unit of bf16, which the weights themselves do not show; a distributed optimizer averages parts."""
    slow = "--bf16 --lr 1e-5 --adam-eps 1e-8 --clip-grad 0"
    runs = {}
    for name, flags in {"plain": slow, "distributed": f"{slow} --use-distributed-optimizer"}.items():
        runs[name] = Run(checkpoint, f"{flags} {AVERAGED}", 4)
        runs[f"{name}, first"] = Run(checkpoint, f"{flags} {AVERAGED}", 2, tmp_path / name)
        runs[f"{name}, resumed"] = Run(tmp_path / name, f"{flags} {AVERAGED}", 4)
    runs["without"] = Run(checkpoint, slow, 2, tmp_path / "without")
    runs["begins late"] = Run(tmp_path / "without", f"{slow} {AVERAGED}", 4)
    for rank in launch(training_runs.average_of_masters, 2, runs, ""):
        for run in ("plain", "begins late"):
            for name, average in rank[run]["average"].items():
                of_weights, of_masters = ([step[name][i] for step in rank[run]["steps"]] for i in (0, 1))
                # Each of up to four updates is rounded to fp32.
                message = f"{run}: {name}"
                torch.testing.assert_close(average.double(), averaged(of_masters), rtol=5e-7, atol=1e-8, msg=message)
                assert (average - averaged(of_weights)).abs().max() > 4e-6, message
        for name, average in rank["plain"]["average"].items():
            for run in ("plain, resumed", "distributed", "distributed, resumed"):
                assert torch.equal(rank[run]["average"][name], average), f"{run}: {name}"


def averaged(values: list[torch.Tensor]) -> torch.Tensor:
    """By the recursion of ``--ema-decay 0.9``, in fp64."""
    average = values[0].double()
    for number, value in enumerate(values[1:], 1):
        kept = min(0.9, number / (number + 9))
        average = kept * average + (1 - kept) * value.double()
    return average


@pytest.mark.slow
def test_optimizer_state_travels_between_the_kinds_of_optimizer(checkpoint: Path, tmp_path: Path) -> None:
    """Bit by bit, through a load and a save: moments, step counts and, in bf16, the masters that know more than weights.

    An fp32 optimizer that is not distributed stores no masters; its weights are what they become.
    """
    kinds = {"fp32": "", "bf16": "--bf16", "distributed": "--bf16 --use-distributed-optimizer"}
    first = {name: Run(checkpoint, flags, FIRST, tmp_path / name) for name, flags in kinds.items()}
    again = {
        f"{source} to {target}": Run(tmp_path / source, kinds[target], FIRST, tmp_path / f"{source} to {target}")
        for source in kinds
        for target in kinds
        if target != "fp32"
    }
    assert launch(training_runs.train_runs, 2, {**first, **again}, "")[0][next(iter(again))] == []
    (stored,) = launch(training_runs.stored_optimizer_state, 1, {name: tmp_path / name for name in (*first, *again)})
    for name in again:
        before, after = stored[name.split(" to ")[0]], stored[name]
        assert set(before) == set(after) and len(after) > 100
        for key, tensor in before.items():
            assert torch.equal(tensor, after[key]), f"{name}: {key}"
    masters = [t for key, t in stored["bf16"].items() if key.startswith("master.")]
    assert any(not torch.equal(t, t.bfloat16().float()) for t in masters)
