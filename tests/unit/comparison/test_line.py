"""The line of made-up runs: what counts as gained and forgotten, figures by seed, groups of equal time and size, the report."""

from __future__ import annotations

import csv
import json
import math
from xml.etree import ElementTree

import pytest

from megatron_midus.comparison.curves import Curves, Point
from megatron_midus.comparison.hull import share_below
from megatron_midus.comparison.line import groups, line_points, make_line, mean_points
from megatron_midus.comparison.line_page import write_line
from megatron_midus.comparison.results import ArmResult, Mean, Results, RunResult

NEW, OLD = 4.0, 2.5
# method@strength: (gained, forgotten) of seeds 1 and 2, trained parameters, seconds.
RUNS = {
    "pro@lr=1": ([(0.2, 0.1), (0.22, 0.12)], 1000, 10.0),
    "pro@lr=2": ([(0.4, 0.3), (0.42, 0.28)], 1000, 10.2),
    "midus@lr=1": ([(0.2, 0.05), (0.18, 0.06)], 390, 10.5),
    "midus@lr=2": ([(0.35, 0.2), (0.31, 0.2)], 390, 10.6),
    "full@lr=1": ([(0.5, 0.2), (0.5, 0.1)], 9000, 30.0),
}


def make(runs=RUNS, **changes) -> Results:
    arms = [arm("base", [(0.0, 0.0)], 0, 0.0, seeds=[1])]
    arms += [arm(name, *found) for name, found in runs.items()]
    return Results(**{"description": "A & B", "reference": "pro@lr=1", "seeds": [1, 2], "arms": arms, "settings": {},
                      "machines": [{}], "notes": ["a note"], **changes})  # fmt: skip


def arm(name, points, trainable, seconds, seeds=(1, 2)) -> ArmResult:
    curves = Curves([], [Point(64, seconds, 3.0)], 1.0, None) if trainable else None
    found = [RunResult(seed, NEW - g, OLD + f, curves) for seed, (g, f) in zip(seeds, points)]
    memory = {"memory_num_keys": 8} if name.startswith("midus") else None
    policy, train = ("llama_pro", "inserted") if trainable else ("none", "none")
    return ArmResult(name, policy, train, 2, memory, {}, 9000, 0, trainable, 1.0, 4, 64, 1e-3, {}, found)


def test_what_a_run_gained_and_forgot():
    points = line_points(make())
    assert len(points) == 10 and {p.method for p in points} == {"pro", "midus", "full"}
    first = points[0]
    assert (first.method, first.point, first.seed, first.trained, first.seconds) == ("pro", "lr=1", 1, 1000, 10.0)
    assert (first.gained, first.forgotten) == (pytest.approx(0.2), pytest.approx(0.1))
    without_base = make()
    del without_base.arms[0]
    assert line_points(without_base) == [] and write_line(without_base) == {}


def test_a_third_domain_is_a_column_of_the_runs():
    results = make()
    assert "third domain" not in write_line(results)["line.md"]
    for found in results.arms:
        for run in found.runs:
            run.third_loss = 4.0 if found.name == "base" else 4.0 + 0.01 * run.seed
    written = write_line(results)
    assert "| pro | lr=1 | 0.210 ± 0.014 | 0.110 ± 0.014 | 0.015 ± 0.007 | 1,000 |" in written["line.md"]
    assert written["line.csv"].splitlines()[2].endswith(",10.0,0.02000")


def test_figures_are_means_over_seeds():
    line = make_line(line_points(make()), "pro")
    pro, midus, full = line.methods
    assert pro.reach == Mean(pytest.approx(0.41), pytest.approx(0.02 / math.sqrt(2)), 2)
    # Half the way to the first run; between the two runs of each seed.
    assert pro.at[0.1].mean == pytest.approx((0.1 * 0.1 / 0.2 + 0.1 * 0.12 / 0.22) / 2)
    assert pro.at[0.3].mean == pytest.approx((0.2 + (0.12 + 0.16 * 0.08 / 0.2)) / 2)
    assert midus.at[0.3].count == 2 and midus.at[0.4] is None
    assert line.common == pytest.approx(0.31), "the shortest line of any method and seed"
    by_seed = [midus.hulls[seed].mean(line.common) for seed in (1, 2)]
    assert midus.mean_forgotten.mean == pytest.approx(sum(by_seed) / 2)
    shares = [share_below(midus.hulls[seed], [pro.hulls[seed]]) for seed in (1, 2)]
    assert midus.below_reference.mean == pytest.approx(sum(shares) / 2) and pro.below_reference is None
    assert full.below_all.mean > 0.5 and full.seconds == 30.0 and full.trained == (9000, 9000)


def test_groups_of_equal_time_and_size():
    found = groups(line_points(make()), "pro")
    names = {title: ([m.name for m in line.methods], line.rest) for title, line in found.items()}
    assert names == {
        "all runs": (["pro", "midus", "full"], []),
        "at most 11 s of training, as pro": (["pro", "midus"], ["full"]),
        "at most 1,000 trained parameters, 100 % of pro": (["pro", "midus"], ["full"]),
        "at most 400 trained parameters, 40 % of pro": (["midus"], ["pro", "full"]),
    }
    assert list(groups(line_points(make(reference="nobody")), "nobody")) == ["all runs"]


def test_the_report():
    files = write_line(make())
    assert set(files) == {"line.html", "line.md", "line.svg", "line.json", "line.csv"}
    rows = list(csv.DictReader(files["line.csv"].splitlines()))
    assert len(rows) == 10 and rows[0]["strength"] == "lr=1" and float(rows[0]["gained"]) == pytest.approx(0.2)
    values = json.loads(files["line.json"])
    assert values["reference"] == "pro" and len(values["groups"]) == 4
    assert values["groups"][0]["methods"][0]["at"]["0.1"]["mean"] > 0
    assert "| pro | lr=1 | 0.210 ± 0.014 | 0.110 ± 0.014 | 1,000 | 64 |" in files["line.md"]
    assert "A &amp; B" in files["line.html"]
    ElementTree.fromstring(files["line.svg"])
    assert files["line.svg"].count(">midus</text>") == 1, "one name a line"


def test_points_go_by_gain():
    (low, _, _), (high, gained, _) = mean_points(line_points(make()), "pro")
    assert (low, high) == ("lr=1", "lr=2") and gained.mean == pytest.approx(0.41)
