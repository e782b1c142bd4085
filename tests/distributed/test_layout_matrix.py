"""One checkpoint, many layouts: steps of the driver give the same losses and gradient norms everywhere.

Ten steps of the variant hive at some layouts, three otherwise. Every variant of the memory starts from one checkpoint whose weights are all random, value banks too.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import training_runs
from launcher import launch
from training_runs import Run

# Processes and flags of each layout. Six blocks, of which 2 and 5 are Memory blocks; four samples a step.
LAYOUTS = {
    "tp2": (2, "--tensor-model-parallel-size 2"),
    "tp2 sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "tp2 sp, full recompute": (
        2,
        "--tensor-model-parallel-size 2 --sequence-parallel --recompute-granularity full --recompute-method uniform "
        "--recompute-num-layers 1",
    ),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "pp2, by cost": (2, "--pipeline-model-parallel-size 2 --pipeline-layout auto"),
    "pp2, loss alone": (2, "--pipeline-model-parallel-size 2 --pipeline-layout Et*6|L"),
    # More micro-batches than stages: forward and backward passes alternate, and messages are on their way meanwhile.
    "pp2 vpp3": (
        2,
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --micro-batch-size 1",
    ),
    "pp2 vpp2, uneven": (2, "--pipeline-model-parallel-size 2 --pipeline-layout Et|tt|t|ttL"),
    "dp2": (2, "--micro-batch-size 1"),
    "dp2, distributed optimizer": (2, "--use-distributed-optimizer"),
    "dp2, overlapped": (
        2,
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 2000",
    ),
    "pp3, first 1": (3, "--pipeline-model-parallel-size 3 --decoder-first-pipeline-num-layers 2"),
    "tp4": (4, "--tensor-model-parallel-size 4 --micro-batch-size 4"),
    "tp4 sp": (4, "--tensor-model-parallel-size 4 --sequence-parallel --micro-batch-size 4"),
    "tp2 sp pp2": (4, "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2"),
    "tp2 dp2, overlapped": (
        4,
        "--tensor-model-parallel-size 2 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    ),
    "pp2 vpp3 dp2, overlapped": (
        4,
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 3 --use-distributed-optimizer "
        "--overlap-grad-reduce --overlap-param-gather --micro-batch-size 1",
    ),
    "tp8": (8, "--tensor-model-parallel-size 8 --micro-batch-size 4"),
    "tp4 sp pp2, selective recompute": (
        8,
        "--tensor-model-parallel-size 4 --sequence-parallel --pipeline-model-parallel-size 2 "
        "--recompute-granularity selective",
    ),
    "tp2 sp pp2 dp2, distributed optimizer": (
        8,
        "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2 "
        "--use-distributed-optimizer --micro-batch-size 1",
    ),
}
# Name of a run -> (checkpoint, flags, steps).
RUNS = {
    "hive": ("hive", "", 10),
    "full": ("full", "", 3),
    "block": ("block", "", 3),
    "hive, latent": ("hive", "--memory-value-placement latent", 3),
    "block, latent": ("block", "--memory-value-placement latent", 3),
    "clipped apart": ("hive", "--value-clip-grad 0.05 --clip-grad 0.5", 3),
    "clipped apart, latent": ("hive", "--value-clip-grad 0.05 --clip-grad 0.5 --memory-value-placement latent", 3),
    "frozen base": ("hive", "--train inserted", 3),
}
# How their norms are added up depends on ranks and buffers: at each of these differently, elsewhere as at one of them.
NORMS = ("clipped apart", "clipped apart, latent", "frozen base")
NORMS_AT = ("tp2 sp", "pp2 vpp2, uneven", "tp2 dp2, overlapped", "pp2 vpp3 dp2, overlapped")
# What the driver does with latent at one tensor-parallel rank is what it does with replicated.
REFERENCE = {"hive, latent": "hive", "block, latent": "block", "clipped apart, latent": "clipped apart"}
FAST = ("tp2 sp", "pp2 vpp2, uneven", "dp2, overlapped")  # ten steps of hive at these


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    launch(training_runs.write_checkpoints, 1, root)
    return root


# Variants and placements differ in what tensor-parallel ranks share: all of them at these, elsewhere one, or one of each placement.
VARIANTS_AT = ("one", "tp2", "tp2 sp", "tp4 sp")
OTHERS = {"tp8": ("full", "block, latent"), "tp2 sp pp2": ("block",), "tp4": ("full",)}


def runs_of(checkpoints: Path, layout: str) -> dict[str, Run]:
    def is_run(name: str) -> bool:
        if "tp" not in layout and name in REFERENCE:
            return False
        if name in NORMS:
            return layout in ("one", *NORMS_AT)
        return layout in VARIANTS_AT or name in ("hive", "hive, latent", *OTHERS.get(layout, ()))

    return {
        name: Run(checkpoints / variant, flags, steps if layout in ("one", *FAST) else 3)
        for name, (variant, flags, steps) in RUNS.items()
        if is_run(name)
    }


@pytest.fixture(scope="module")
def expected(checkpoints: Path) -> dict[str, torch.Tensor]:
    """``[steps, (loss, gradient norm)]`` of one process."""
    (curves,) = launch(training_runs.train_runs, 1, runs_of(checkpoints, "one"), "--micro-batch-size 4")
    return {name: values(curve) for name, curve in curves.items()}


def values(curve: list[tuple]) -> torch.Tensor:
    return torch.tensor([(loss, norm) for _, loss, norm in curve], dtype=torch.float64)


@pytest.mark.parametrize("layout", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in LAYOUTS])
def test_every_layout_trains_alike(layout: str, checkpoints: Path, expected: dict[str, torch.Tensor]) -> None:
    world_size, flags = LAYOUTS[layout]
    ranks = launch(training_runs.train_runs, world_size, runs_of(checkpoints, layout), flags)
    for name in ranks[0]:
        # Ranks of the last stage know the loss; every rank of a replica knows the norm.
        seen = [values(rank[name]) for rank in ranks if rank[name][0][1] is not None]
        assert seen
        for found in seen:
            # 1e-5 is what is promised over 10 steps.
            wanted = expected[REFERENCE.get(name, name)][: len(found)]
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0, msg=lambda m, name=name: f"{name}: {m}")
        norms = {tuple(norm for _, _, norm in rank[name]) for rank in ranks}
        assert len(norms) == 1, f"{name}: ranks report {len(norms)} norms"


def test_the_runs_differ_from_each_other(expected: dict[str, torch.Tensor]) -> None:
    """The comparison would pass with a memory, a clipping or a freezing that does nothing."""
    names = [name for name in expected if name not in REFERENCE]
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            # The third step's loss: one step later than what the first step of an optimizer does.
            assert abs(expected[first][2, 0] - expected[second][2, 0]) > 1e-4, (first, second)


# -- mixtures of experts ---------------------------------------------------------------------------------------------
EXPERT_LAYOUTS = {
    "ep2": (2, "--expert-model-parallel-size 2"),
    "ep2, alltoall, distributed optimizer": (
        2,
        "--expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall --use-distributed-optimizer",
    ),
    "tp2 sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "tp2 sp ep2": (
        2,
        "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2 --expert-tensor-parallel-size 1",
    ),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "tp2 sp ep2 dp2": (
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2 --use-distributed-optimizer",
    ),
    "pp2 ep2": (4, "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2"),
}
# The load-balancing loss is of a micro-batch, so batches must be cut alike; it is left out of runs where they are not.
EXPERT_RUNS = {
    "all": ("experts", "--moe-aux-loss-coeff 0", 10),
    "balanced": ("experts", "--micro-batch-size 2 --no-calculate-per-token-loss", 4),
    "frozen base": ("experts", "--train inserted --micro-batch-size 2", 4),
    "copied blocks": ("experts_copied", "--train inserted --moe-aux-loss-coeff 0", 4),
    "clipped apart": ("experts", "--moe-aux-loss-coeff 0 --value-clip-grad 0.05 --clip-grad 0.5", 3),
}
EXPERT_FAST = ("ep2, alltoall, distributed optimizer", "tp2 sp ep2", "pp2")
# From one layout to another after three of six steps, with the state of the optimizer.
EXPERT_CHANGES = [("ep2", "pp2"), ("pp2", "tp2 sp ep2")]


def expert_runs(checkpoints: Path) -> dict[str, Run]:
    return {name: Run(checkpoints / variant, flags, steps) for name, (variant, flags, steps) in EXPERT_RUNS.items()}


@pytest.fixture(scope="module")
def expected_of_experts(checkpoints: Path) -> dict[str, torch.Tensor]:
    """``[steps, (loss, gradient norm)]`` of one process; of the frozen base without a load-balancing loss."""
    runs = expert_runs(checkpoints)
    runs["frozen base"] = Run(checkpoints / "experts", f"{runs['frozen base'].flags} --moe-aux-loss-coeff 0", 4)
    (curves,) = launch(training_runs.train_runs, 1, runs, "--micro-batch-size 4")
    return {name: values(curve) for name, curve in curves.items()}


def marked(names, fast):
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("layout", marked(EXPERT_LAYOUTS, EXPERT_FAST))
def test_experts_train_alike_at_every_layout(layout, checkpoints, expected_of_experts):
    """A load-balancing loss moves the routers that learn and, where the base is frozen, nothing at all."""
    world_size, flags = EXPERT_LAYOUTS[layout]
    ranks = launch(training_runs.train_runs, world_size, expert_runs(checkpoints), f"--micro-batch-size 1 {flags}")
    for name in ranks[0]:
        for found in [values(rank[name]) for rank in ranks if rank[name][0][1] is not None]:
            torch.testing.assert_close(
                found, expected_of_experts[name], rtol=1e-5, atol=0, msg=lambda m, name=name: f"{name}: {m}"
            )
    assert abs(expected_of_experts["balanced"][2, 0] - expected_of_experts["all"][2, 0]) > 1e-4


@pytest.mark.parametrize("before, after", EXPERT_CHANGES)
def test_experts_go_on_at_another_layout(before, after, checkpoints, expected_of_experts, tmp_path):
    flags = EXPERT_RUNS["all"][1]
    for (world_size, layout), run in (
        (EXPERT_LAYOUTS[before], Run(checkpoints / "experts", flags, 3, save=tmp_path / "saved")),
        (EXPERT_LAYOUTS[after], Run(tmp_path / "saved", flags, 6)),
    ):
        ranks = launch(training_runs.train_runs, world_size, {"run": run}, f"--micro-batch-size 1 {layout}")
    (found, *_) = [values(rank["run"]) for rank in ranks if rank["run"][0][1] is not None]
    torch.testing.assert_close(found, expected_of_experts["all"][3:6], rtol=1e-5, atol=0)
