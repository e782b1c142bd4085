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
from training_runs import Run

TP2_DP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
KEYS, TOPK, HEADS = 9, 3, 8  # of training_runs


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("start")
    launch(training_runs.write_checkpoints, 1, root)
    return root


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
    "block, latent, recompute": (
        "block",
        f"{TP2_DP2} --memory-value-placement latent --recompute-granularity full --recompute-method uniform "
        "--recompute-num-layers 1",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_figures_equal_a_brute_force_count(case: str, checkpoints: Path) -> None:
    variant, layout = CASES[case]
    # One sample per micro-batch, so that there are two of them on every rank.
    run = Run(checkpoints / variant, steps=1, flags="--memory-log-interval 1 --micro-batch-size 1")
    ranks = launch(memory_telemetry_processes.watched, 4, run, layout)
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
