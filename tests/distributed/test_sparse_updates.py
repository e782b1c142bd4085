"""Sparse updates of memory values in real processes: choice, counts and steps against loops of plain Python."""

from __future__ import annotations

import collections
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import sparse_updates_processes
import torch
import training_runs
from launcher import launch
from scenarios import assemble
from training_runs import Run

from megatron_midus.checkpoint.background import BackgroundHeader, SlotBackground, write_background

TP2 = "--tensor-model-parallel-size 2"
OPTIMIZER = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
KEYS, TOPK, HEADS, BLOCKS = 9, 3, 8, (2, 5)  # of training_runs
EMA = "--ema-decay 0.15"  # from the second step on less than the warm-up
SLOTS, COUNT, NUM_BATCHES, STEPS = KEYS**2, 7, 4, 2
SPARSE = f"--memory-log-interval 2 --micro-batch-size 1 --memory-update-slots {COUNT}"
CASES = {
    # variant, flags, layout of four processes
    "hive": ("hive", SPARSE, f"{TP2} --sequence-parallel {OPTIMIZER}"),
    "hive, latent, kl": (
        "hive",
        f"{SPARSE} --memory-update-score kl --value-clip-grad 0.01",
        f"{TP2} --memory-value-placement latent {RECOMPUTE}",
    ),
    "full": ("full", f"{SPARSE} --value-weight-decay 0.1", f"{TP2} {OPTIMIZER}"),
    "block, by sgd": ("block", f"{SPARSE} --value-optimizer sgd --value-lr-mult 30", f"{TP2} --sequence-parallel"),
}
SINGLE = {"dense": ("hive", "--memory-log-interval 0 --micro-batch-size 1 --clip-grad 0"),
          "not clipped": ("hive", f"{SPARSE} --clip-grad 0")}  # fmt: skip
Background = dict[int, tuple[torch.Tensor, torch.Tensor]]


def background(variant: str) -> Background:
    generator = torch.Generator().manual_seed(5)
    shape = (HEADS, SLOTS) if variant == "full" else (SLOTS,)
    return {
        index: (
            torch.randint(0, NUM_BATCHES + 1, shape, generator=generator, dtype=torch.int32),
            torch.randint(0, 50, shape, generator=generator),
        )
        for index in BLOCKS
    }


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """By number of processes: what each rank tells."""
    root = tmp_path_factory.mktemp("start")
    launch(training_runs.write_checkpoints, 1, root)
    header = BackgroundHeader(NUM_BATCHES, training_runs.GLOBAL_BATCH, training_runs.SEQUENCE, 0)
    for variant in training_runs.VARIANTS:
        counts = {index: SlotBackground(*block) for index, block in background(variant).items()}
        write_background(root / variant / "iter_0000000", header, counts)

    def runs(four: bool) -> dict[str, tuple[Run, str]]:
        made = {
            name: (Run(root / v, flags, STEPS), layout if four else "") for name, (v, flags, layout) in CASES.items()
        }
        return made if four else {**made, **{name: (Run(root / v, f, STEPS), "") for name, (v, f) in SINGLE.items()}}

    def switched(place: Path) -> dict[str, Run]:
        hive, sparse, dense = root / "hive", f"{SPARSE} {EMA}", f"--memory-log-interval 0 --micro-batch-size 1 {EMA}"
        return {
            "whole": Run(hive, sparse, 3, updated_apart=range(1, 2)),
            "watched": Run(hive, sparse, 3, updated_apart=range(1, 2)),
            "off": Run(hive, dense, 1, place / "off"),
            "on": Run(place / "off", sparse, 2, place / "on"),
            "off again": Run(place / "on", dense, 3),
        }

    counted = (
        f"--load {root / 'full'} --distributed-backend gloo --mock-data --num-workers 0 --memory-backend torch "
        f"--seq-length {training_runs.SEQUENCE} --micro-batch-size 1 --global-batch-size 4 --num-batches 3 "
    )
    return {
        1: launch(sparse_updates_processes.outcomes, 1, runs(False), switched(root / "one"), "", counted),
        4: launch(
            sparse_updates_processes.outcomes,
            4,
            runs(True),
            switched(root / "four"),
            f"{TP2} --sequence-parallel {OPTIMIZER}",
            counted + TP2,
        ),
    }


# -- brute force -----------------------------------------------------------------------------------------------------
def reads_of(ranks: list[dict], case: str, step: int, block: int) -> dict[tuple[int, int], int]:
    """``{(bank, slot): reads}`` of all ranks, one after the other; bank 0 where all heads share one."""
    found: collections.Counter = collections.Counter()
    for rank in (rank[case] for rank in ranks):
        for chosen in rank["steps"][step][block]["reads"].tolist():
            for head, slots in enumerate(chosen):
                bank = rank["tensor_rank"] * len(chosen) + head if case == "full" else 0
                found.update((bank, slot) for slot in slots)
    return found


def expected_slots(reads: dict[tuple[int, int], int], counted: Background, block: int, case: str) -> set:
    batches, background_reads = (t.view(-1, SLOTS).tolist() for t in counted[block])
    chosen: set = set()
    for bank in {bank for bank, _ in reads}:
        own = {slot: n for (b, slot), n in reads.items() if b == bank}
        scores = {}
        for slot, number in own.items():
            if "kl" in case:
                p = number / sum(own.values())
                q = (background_reads[bank][slot] + 1) / sum(n + 1 for n in background_reads[bank])
                scores[slot] = p * math.log(p / q)
            else:
                scores[slot] = number * math.log((NUM_BATCHES + 1) / (batches[bank][slot] + 1))
        best = sorted((-score, slot) for slot, score in scores.items())[:COUNT]
        chosen |= {(bank, slot) for _, slot in best}
    return chosen


def rows(chosen: set, rank: dict, block: int, case: str) -> torch.Tensor:
    """Whether a row of this rank's bank is chosen, bool ``[R]``."""
    banks = len(rank["start"][block]) if case == "full" else 1
    first = rank["tensor_rank"] * banks if case == "full" else 0
    found = torch.zeros(banks, SLOTS, dtype=torch.bool)
    for bank, slot in chosen:
        if first <= bank < first + banks:
            found[bank - first, slot] = True
    return found.flatten()


@pytest.mark.parametrize("processes", [1, 4])
@pytest.mark.parametrize("case", CASES)
def test_the_chosen_slots_move_and_the_others_are_bit_equal(case: str, processes: int, outcomes) -> None:
    ranks = outcomes[processes]
    counted = background(CASES[case][0])
    for block, step in itertools.product(BLOCKS, range(STEPS)):
        chosen = expected_slots(reads_of(ranks, case, step, block), counted, block, case)
        assert len(chosen) == COUNT * (HEADS if case == "full" else 1)
        for rank in (rank[case] for rank in ranks):
            after = rank["steps"][step][block]
            before = rank["steps"][step - 1][block] if step else {"bank": rank["start"][block], "state": {}}
            mask = rows(chosen, rank, block, case)
            width = after["bank"].shape[-1]
            changed = (after["bank"] != before["bank"]).view(-1, width).any(-1)
            assert torch.equal(changed, mask)
            assert not after["gradient"].view(-1, width)[~mask].any()
            elements = mask.repeat_interleave(width)
            for name, value in after["state"].items():
                part = elements[after["begin"] :][: value.numel()]
                old = before["state"].get(name, torch.zeros_like(value) if name != "master" else None)
                if old is not None:
                    assert torch.equal(value.flatten()[~part], old.flatten()[~part]), name
                if name.startswith("exp_avg") and "sgd" not in case:
                    assert (value.flatten() != old.flatten())[part].any() or not part.any()


@pytest.mark.parametrize("case", CASES)
def test_four_processes_learn_as_one(case: str, outcomes) -> None:
    one, four = (torch.tensor(outcomes[n][-1][case]["curve"], dtype=torch.float64) for n in (1, 4))
    # fp32 sums over other numbers of ranks.
    torch.testing.assert_close(four, one, rtol=1e-5, atol=0)


def test_chosen_rows_are_those_of_an_independent_step(outcomes) -> None:
    """AdamW in fp64 on the rows alone, from the gradients of the run; weight decay 0.1 of the values; and SGD."""
    (rank,) = outcomes[1]
    beta1, beta2, eps, rate = 0.9, 0.999, 1e-3, 3e-3
    for case, block in itertools.product(("hive", "full", "block, by sgd"), BLOCKS):
        run = rank[case]
        values = run["start"][block].double().view(-1, run["start"][block].shape[-1])
        mean, square = torch.zeros_like(values), torch.zeros_like(values)
        before = run["start"][block].view_as(values)
        lr, decay = rate * (30 if "sgd" in case else 3), 0.1 if case == "full" else 0.0
        for number, step in enumerate(run["steps"], 1):
            gradient = step[block]["gradient"].double().view_as(values)
            found = step[block]["bank"].view_as(values)
            # Those that the test above expects; a chosen one whose reads count in no loss has no gradient.
            for row in (found != before).any(-1).nonzero().flatten().tolist():
                if "sgd" in case:
                    values[row] -= lr * gradient[row]
                    continue
                values[row] *= 1 - lr * decay
                mean[row] += (1 - beta1) * (gradient[row] - mean[row])
                square[row] += (1 - beta2) * (gradient[row] ** 2 - square[row])
                root = (square[row] / (1 - beta2**number)).sqrt() + eps
                values[row] -= lr * mean[row] / (1 - beta1**number) / root
            torch.testing.assert_close(found.double(), values, rtol=1e-5, atol=1e-6)
            before = found


def test_gradients_of_chosen_slots_are_those_of_a_dense_step(outcomes) -> None:
    (rank,) = outcomes[1]
    for block in BLOCKS:
        dense, sparse = (rank[case]["steps"][0][block]["gradient"] for case in ("dense", "not clipped"))
        chosen = sparse.any(-1)
        assert 0 < int(chosen.sum()) <= COUNT < int(dense.any(-1).sum())
        assert torch.equal(sparse[chosen], dense[chosen])
    dense, sparse = (rank[case]["curve"][0] for case in ("dense", "not clipped"))
    assert sparse[1] == dense[1] and sparse[2] < dense[2]  # the norm is that of what is left


@pytest.mark.parametrize("processes", [1, 4])
def test_on_and_off_at_a_resume_is_exact(processes: int, outcomes) -> None:
    for rank in outcomes[processes]:
        whole = rank["whole"]
        assert [line for name in ("off", "on", "off again") for line in rank[name]["curve"]] == whole["curve"]
        for kind in ("weights", "average"):
            for (key, *_, values), (_, *_, expected) in zip(rank["off again"][kind], whole[kind], strict=True):
                assert torch.equal(values, expected), (kind, key)


@pytest.mark.parametrize("processes", [1, 4])
def test_the_average_of_weights_is_that_of_every_step(processes: int, outcomes) -> None:
    """In fp64, over the weights of all steps, gathered after each of them; the average itself is of a run without such gathers."""
    ranks = outcomes[processes]
    steps = [assemble([rank["watched"]["steps"][step] for rank in ranks]) for step in range(4)]
    for name in ("whole", "watched"):
        found = assemble([rank[name]["average"] for rank in ranks])
        assert found.keys() == steps[0].keys()
        for key, average in found.items():
            expected = steps[0][key].double()
            for number, step in enumerate(steps[1:], 1):
                kept = min(0.15, number / (number + 9))
                expected = kept * expected + (1 - kept) * step[key].double()
            # Three updates, each rounded to fp32.
            torch.testing.assert_close(
                average.double(), expected, rtol=4e-7, atol=1e-8, msg=lambda m, key=key: f"{key}: {m}"
            )
            assert not torch.equal(average, steps[-1][key]), key


def test_four_processes_average_as_one(outcomes) -> None:
    one, four = (assemble([rank["whole"]["average"] for rank in outcomes[n]]) for n in (1, 4))
    for key, average in one.items():
        # Adam's first steps amplify what fp32 sums over other numbers of ranks.
        torch.testing.assert_close(four[key], average, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("processes", [1, 4])
def test_background_counts_equal_brute_force(processes: int, outcomes) -> None:
    """The best of all n * n slots of every token, one after the other; all ranks see the same batches."""
    ranks = [rank["count"] for rank in outcomes[processes]]
    per_rank = 3 * 4 // (processes // 2 or 1)  # micro-batches of one sample
    for block in BLOCKS:
        batches = torch.zeros(HEADS, SLOTS, dtype=torch.int32)
        reads = torch.zeros(HEADS, SLOTS, dtype=torch.int64)
        for batch in range(3):
            read = torch.zeros(HEADS, SLOTS, dtype=torch.int64)
            for rank in ranks:
                queries = rank["seen"][block]["queries"]
                assert len(queries) == per_rank
                for query in queries[batch * per_rank // 3 : (batch + 1) * per_rank // 3]:
                    _add_reads(read, query, rank["seen"][block]["keys"], rank["tensor_rank"])
            batches += (read > 0).int()
            reads += read
        assert torch.equal(ranks[0]["found"][block][0], batches)
        assert torch.equal(ranks[0]["found"][block][1], reads)


def _add_reads(read: torch.Tensor, query: torch.Tensor, keys: list[torch.Tensor], tensor_rank: int) -> None:
    rows, cols = (half.double() for half in keys)
    for token, head in itertools.product(range(query.shape[0]), range(query.shape[1])):
        row, col = query[token, head].double().chunk(2)
        best = ((rows[head] @ row)[:, None] + (cols[head] @ col)[None, :]).flatten().topk(TOPK).indices
        for slot in best.tolist():
            read[tensor_rank * query.shape[1] + head, slot] += 1
