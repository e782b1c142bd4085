"""Telemetry of Memory blocks in real processes: figures against a brute-force count, and training left as it is."""

from __future__ import annotations

import collections
import itertools
import math
from pathlib import Path

import memory_telemetry_processes
import pytest
import torch
import training_runs
from launcher import launch
from scenarios import assemble
from training_runs import Run

TP2_DP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
OPTIMIZER = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
KEYS, TOPK, HEADS = 9, 3, 8  # of training_runs
# Half of an equal share: every head has such sub-keys, many of them in use.
REVIVE = "--memory-log-interval 2 --memory-log-steps 2 --memory-revive-interval 2 --memory-dead-threshold 0.5"
LAYOUTS = {
    "one": (1, ""),
    # The first stage has no Memory block.
    "pp3": (3, "--pipeline-model-parallel-size 3"),
    "pp2 vpp3, recompute": (
        2,
        f"--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 3 {RECOMPUTE}",
    ),
}
EVERYWHERE = ("tp2 dp2", *LAYOUTS)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("start")
    launch(training_runs.write_checkpoints, 1, root)
    return root


def runs(root: Path, place: str) -> dict[str, Run]:
    """The runs that every layout does; one sample per micro-batch, so that balance losses are of the same tokens."""
    hive, flags = root / "hive", "--micro-batch-size 1"
    revive = f"{flags} {REVIVE}"
    half_way = root / f"revived at {place}".replace(" ", "-")
    return {
        "off": Run(hive, f"{flags} --memory-log-interval 0", steps=3),
        "on": Run(hive, f"{flags} --memory-log-interval 1", steps=3),
        "balance": Run(hive, f"{flags} --memory-log-interval 1 --memory-balance-loss-coeff 2", steps=3),
        "revive": Run(hive, revive, steps=5),
        "revive, first part": Run(hive, revive, steps=2, save=half_way),
        "revive, second part": Run(half_way, revive, steps=5),
    }


@pytest.fixture(scope="module")
def two_by_two(checkpoints: Path) -> list[tuple]:
    counted = {
        # Two micro-batches on every rank.
        case: (Run(checkpoints / variant, "--memory-log-interval 1 --micro-batch-size 1", steps=1), layout)
        for case, (variant, layout) in CASES.items()
    }
    at = f"{TP2_DP2} {OPTIMIZER}"
    return launch(memory_telemetry_processes.two_by_two, 4, counted, runs(checkpoints, "tp2 dp2"), at)


@pytest.fixture(scope="module")
def outcomes(checkpoints: Path, two_by_two: list[tuple]):
    """``outcomes(layout)``: what each rank tells of the runs."""
    found = {"tp2 dp2": [outcome for _, outcome in two_by_two]}

    def at(layout: str) -> list[dict]:
        if layout not in found:
            world_size, flags = LAYOUTS[layout]
            of_layout = runs(checkpoints, layout)
            found[layout] = launch(memory_telemetry_processes.outcomes, world_size, of_layout, flags)
        return found[layout]

    return at


# -- brute force -----------------------------------------------------------------------------------------------------
def _selected(ranks: list[dict], block: int) -> tuple[list[list[tuple]], list[list[float]]]:
    """Per head: the slots of every token, from the scores of all n * n slots; and the largest weight of every token."""
    slots: list[list[tuple]] = [[] for _ in range(HEADS)]
    top1: list[list[float]] = [[] for _ in range(HEADS)]
    for rank in ranks:
        found, parameters = rank["blocks"][block], rank["blocks"][block]["parameters"]
        rows, cols = parameters["row_keys"].double(), parameters["col_keys"].double()
        for query in found["queries"]:
            for token, h in itertools.product(range(query.shape[0]), range(query.shape[1])):
                row, col = query[token, h].double().chunk(2)
                best, chosen = ((rows[h] @ row)[:, None] + (cols[h] @ col)[None, :]).flatten().topk(TOPK)
                head = rank["tensor_rank"] * query.shape[1] + h
                slots[head] += [tuple(chosen.tolist())]
                top1[head] += [float(best.softmax(0)[0])]
    return slots, top1


def _entropy(counter: collections.Counter) -> float:
    total = sum(counter.values())
    return -sum(c / total * math.log(c / total) for c in counter.values())


def brute_force(ranks: list[dict], block: int, variant: str) -> dict[str, float]:
    slots, top1 = _selected(ranks, block)
    reads = collections.Counter(
        (head if variant == "full" else 0, slot) for head in range(HEADS) for chosen in slots[head] for slot in chosen
    )
    size = KEYS**2 * (HEADS if variant == "full" else 1)
    lookups = sum(reads.values())
    halves = [
        [collections.Counter(of(slot) for chosen in slots[head] for slot in chosen) for head in range(HEADS)]
        for of in (lambda slot: slot // KEYS, lambda slot: slot % KEYS)
    ]
    unused = sum(KEYS - len(counter) for half in halves for counter in half)
    first = [rank for rank in ranks if rank["tensor_rank"] == 0]
    # Under sequence parallelism every rank has its own tokens of the residual stream.
    squares = [
        sum(float(t.double().square().sum()) for rank in ranks for t in rank["blocks"][block][what])
        for what in ("outputs", "inputs")
    ]
    values = (
        torch.cat([rank["values"][block] for rank in sorted(ranks, key=lambda r: r["tensor_rank"])])
        if variant == "full"
        else first[0]["values"][block]
    )
    figures = {
        "slots-used": len(reads) / size,
        # After one report the moving average is the report itself; nothing lies between 0 and the threshold here.
        "slots-dead": 1 - len(reads) / size,
        "subkeys-dead": unused / (2 * HEADS * KEYS),
        "entropy": _entropy(reads),
        "kl-to-uniform": math.log(size) - _entropy(reads),
        "effective-share": math.exp(_entropy(reads)) / min(size, lookups),
        "row-entropy": sum(map(_entropy, halves[0])) / HEADS,
        "column-entropy": sum(map(_entropy, halves[1])) / HEADS,
        "top1-mass": sum(sum(head) / len(head) for head in top1) / HEADS,
        "output-to-input-norm": math.sqrt(squares[0] / squares[1]),
        "value-row-norm": float(values.norm(dim=-1).mean()),
        "lookups": lookups,
    }
    if variant != "full":
        sets = [{slot for chosen in head for slot in chosen} for head in slots]
        pairs = list(itertools.combinations(sets, 2))
        figures["head-overlap"] = sum(len(a & b) / len(a | b) for a, b in pairs) / len(pairs)
        figures["head-overlap-lift"] = sum(len(a & b) * size / (len(a) * len(b)) for a, b in pairs) / len(pairs)
    return figures


CASES = {
    "hive": ("hive", TP2_DP2),
    "hive, no sequence parallelism": ("hive", "--tensor-model-parallel-size 2"),
    "full": ("full", TP2_DP2),
    "block, latent, recompute": ("block", f"{TP2_DP2} --memory-value-placement latent {RECOMPUTE}"),
}


@pytest.mark.parametrize("case", CASES)
def test_figures_equal_a_brute_force_count(case: str, two_by_two: list[tuple]) -> None:
    variant, _ = CASES[case]
    ranks = [counted[case] for counted, _ in two_by_two]
    assert [len(rank["figures"]) for rank in ranks] == [0, 0, 0, 1]
    ((iteration, blocks, _),) = ranks[3]["figures"]
    assert iteration == 1 and [block.layer_index for block in blocks] == [2, 5]
    for block in blocks:
        if variant == "block" or "latent" in case:
            whole = [_with_whole_values(rank, ranks, block.layer_index) for rank in ranks]
        else:
            whole = ranks
        if "no sequence" in case:
            # Both tensor-parallel ranks see the whole residual stream: it counts once.
            for rank in whole:
                if rank["tensor_rank"]:
                    rank["blocks"][block.layer_index].update(inputs=[], outputs=[])
        expected = brute_force(whole, block.layer_index, variant)
        assert set(block.scalars) == set(expected)
        for name, value in expected.items():
            # Counts are exact; norms and weights are fp32 here.
            assert block.scalars[name] == pytest.approx(value, rel=1e-5, abs=1e-12), name
        assert sum(block.histograms["row-usage"].counts) == sum(block.histograms["column-usage"].counts) == HEADS * KEYS
        rows = KEYS**2 * (HEADS if variant == "full" else 1)
        assert sum(block.histograms["value-row-norms"].counts) == rows
        assert sum(block.histograms["top1-mass-of-heads"].counts) == HEADS


def _with_whole_values(rank: dict, ranks: list[dict], block: int) -> dict:
    """``rank`` with the columns of a latent bank of both tensor-parallel ranks."""
    parts = [r["values"][block] for r in ranks if r["data_rank"] == rank["data_rank"]]
    return {**rank, "values": {**rank["values"], block: torch.cat(parts, -1)}}


# -- training --------------------------------------------------------------------------------------------------------
def _whole(ranks: list[dict], name: str) -> dict[str, torch.Tensor]:
    """Weights of all ranks; fails where copies differ."""
    return assemble([rank[name]["weights"] for rank in ranks])


def _curve(ranks: list[dict], name: str) -> torch.Tensor:
    """``[steps, (iteration, loss, gradient norm)]`` of the last stage."""
    return torch.tensor(ranks[-1][name]["curve"], dtype=torch.float64)


def _figures(ranks: list[dict], name: str) -> list[tuple[int, dict, dict]]:
    """``(iteration, scalars of all blocks, update ratios)`` of every report; only the last rank has any."""
    assert not any(rank[name]["figures"] for rank in ranks[:-1])
    return [
        (iteration, {(b.layer_index, key): value for b in blocks for key, value in b.scalars.items()}, ratios)
        for iteration, blocks, ratios in ranks[-1][name]["figures"]
    ]


@pytest.mark.parametrize("layout", EVERYWHERE)
def test_training_is_the_same_bit_by_bit(layout: str, outcomes) -> None:
    ranks = outcomes(layout)
    assert [len(rank["on"]["figures"]) for rank in ranks] == [0] * (len(ranks) - 1) + [3]
    for rank in ranks:
        on, off = rank["on"], rank["off"]
        assert on["curve"] == off["curve"] and torch.equal(on["random"], off["random"])
        for (key, *_, values), (_, *_, expected) in zip(on["weights"], off["weights"], strict=True):
            assert torch.equal(values, expected), key


@pytest.mark.parametrize("name", ["on", "balance", "revive"])
@pytest.mark.parametrize("layout", [layout for layout in EVERYWHERE if layout != "one"])
def test_every_layout_tells_and_does_the_same(layout: str, name: str, outcomes) -> None:
    found, expected = outcomes(layout), outcomes("one")
    # fp32 sums over other numbers of ranks.
    torch.testing.assert_close(_curve(found, name), _curve(expected, name), rtol=1e-5, atol=0)
    whole = _whole(expected, name)
    for key, values in _whole(found, name).items():
        torch.testing.assert_close(values, whole[key], rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
    for (iteration, scalars, ratios), (same, wanted, wanted_ratios) in zip(
        _figures(found, name), _figures(expected, name), strict=True
    ):
        assert iteration == same
        assert scalars == pytest.approx(wanted, rel=1e-4)
        assert ratios == pytest.approx(wanted_ratios, rel=1e-4)
    assert found[-1][name]["revived"] == expected[-1][name]["revived"]


def test_balance_loss_spreads_the_look_ups(outcomes) -> None:
    """And is in the backward pass once: in ``test_every_layout_tells_and_does_the_same``, recompute does it as well."""
    *_, (_, with_loss, _) = _figures(outcomes("one"), "balance")
    *_, (_, without, _) = _figures(outcomes("one"), "on")
    blocks = (2, 5)
    assert all(with_loss[block, "row-entropy"] > without[block, "row-entropy"] for block in blocks)
    assert all(1 < with_loss[block, "balance-loss"] < KEYS for block in blocks)


@pytest.mark.parametrize("layout", EVERYWHERE)
def test_revival_goes_on_from_a_checkpoint_bit_by_bit(layout: str, outcomes) -> None:
    for rank in outcomes(layout):
        whole, second = rank["revive"], rank["revive, second part"]
        assert second["curve"] == whole["curve"][2:]
        for (key, *_, values), (_, *_, expected) in zip(second["weights"], whole["weights"], strict=True):
            assert torch.equal(values, expected), key
    assert [iteration for iteration, _ in outcomes(layout)[-1]["revive"]["revived"]] == [2, 4]


@pytest.mark.parametrize("layout", ["one", "tp2 dp2"])
def test_revived_subkeys_have_no_moments(layout: str, outcomes, checkpoints: Path) -> None:
    """All others have some: the two steps before the revival read every sub-key that lives."""
    ((_, moved),) = outcomes(layout)[-1]["revive, first part"]["revived"]
    root = runs(checkpoints, layout)["revive, first part"].save
    (stored,) = launch(training_runs.stored_optimizer_state, 1, {"half way": root})
    for block, number in moved.items():
        assert 0 < number < HEADS * 2 * KEYS / 2
        for moment in ("exp_avg", "exp_avg_sq"):
            keys = [
                stored["half way"][f"optimizer.state.{moment}.decoder.layers.{block}.self_attention.linear_proj.{half}"]
                for half in ("row_keys", "col_keys")
            ]
            assert sum(int((half == 0).all(-1).sum()) for half in keys) == number
