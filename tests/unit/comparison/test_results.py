"""Results, their table and their page: means, paired differences, and nothing lost on the way through JSON."""

import dataclasses
import json
import math
import re
import statistics

import pytest

from megatron_midus.comparison.columns import COLUMNS, findings, rates_tried, rows, to_markdown, used_columns
from megatron_midus.comparison.curves import Curves, Point
from megatron_midus.comparison.results import ArmResult, Mean, Results, RunResult, read_results
from megatron_midus.comparison.results_page import mean_curve, to_html


def curves(scale: float, seconds: float) -> Curves:
    validation = [Point(0, 0.0, 5.0), Point(100, seconds / 2, 4.0 * scale), Point(200, seconds, 3.0 * scale)]
    return Curves(validation[1:], validation, seconds / 10, int(1e9 * scale))


def arm(name: str, losses: dict[int, float], *, seconds: float = 10.0, trainable: int = 1000, **changes) -> ArmResult:
    found = [
        RunResult(seed, loss, loss + 1, curves(loss / 3, seconds) if trainable else None)
        for seed, loss in losses.items()
    ]
    values = {
        "name": name, "policy": "llama_pro", "train": "inserted" if trainable else "none", "num_blocks": 2,
        "memory": None, "driver": {}, "parameters": 9000, "added": trainable, "trainable": trainable,
        "flops_per_token": 2e6, "iterations": 10 if trainable else 0, "tokens": 200 if trainable else 0,
        "lr": 1e-3 if trainable else None, "rate_losses": {}, "runs": found,
    }  # fmt: skip
    return ArmResult(**{**values, **changes})


@pytest.fixture
def results():
    arms = [
        arm("pro", {1: 3.0, 2: 3.2, 3: 3.1}),
        arm("midus", {1: 2.9, 2: 3.15, 3: 3.0}, seconds=20.0, trainable=400, rate_losses={"0.001": 3.0, "0.01": math.inf}),
        arm("base <&>", {1: 4.0}, trainable=0),
        arm("broken", {}, failures={"broken, seed 1": "train ended with 1"}),
    ]  # fmt: skip
    return Results("A & B", "pro", [1, 2, 3], arms, {"lr": [1e-3]}, {"processor": "x", "cores": 2}, ["a note"])


def test_means_and_paired_differences(results):
    pro, midus, base, broken = results.arms
    assert pro.loss("new") == Mean(pytest.approx(3.1), pytest.approx(0.1), 3)
    perplexities = [math.exp(loss) for loss in (2.9, 3.15, 3.0)]
    expected = Mean(statistics.fmean(perplexities), statistics.stdev(perplexities), 3)
    assert midus.perplexity("new") == expected
    differences = [-0.1, -0.05, -0.1]
    found = midus.difference(pro)
    assert found.mean == pytest.approx(statistics.fmean(differences)) and found.count == 3
    # The spread of the differences, far below that of the losses.
    assert found.deviation == pytest.approx(statistics.stdev(differences))
    assert base.difference(pro).mean == pytest.approx(0.9) and pro.difference(base).mean == pytest.approx(-0.9)
    assert base.difference(pro).count == 3
    assert broken.loss("new") is None and broken.difference(pro) is None
    assert Mean.of([2.0]) == Mean(2.0, None, 1)


def test_only_seeds_that_both_have_are_paired(results):
    pro = results.arms[0]
    assert arm("late", {3: 3.3, 4: 9.0}).difference(pro) == Mean(pytest.approx(0.2), None, 1)


def test_equal_time_is_that_of_the_quickest(results):
    pro, midus = results.arms[:2]
    assert results.equal_seconds == 10.0
    assert midus.validation_at(10.0).mean == pytest.approx(4.0 * (2.9 + 3.15 + 3.0) / 9)
    assert pro.validation_at(10.0).mean == pytest.approx(3.1)
    assert pro.tokens_per_second == 20.0 and pro.seconds_per_iteration == 1.0


def test_json_round_trip(results):
    text = results.to_json()
    back = read_results(text)
    assert back.arms[1].rate_losses == {"0.001": 3.0, "0.01": None}
    back.arms[1].rate_losses["0.01"] = math.inf
    assert back == results
    summary = json.loads(text)["arms"][0]["summary"]
    assert summary["new_loss"]["mean"] == pytest.approx(3.1) and "Infinity" not in text


def test_table(results):
    assert set(rows(results)[0]) == set(COLUMNS)
    pro, midus, base, broken = rows(results)
    assert (pro["Δ loss ↓"].text, midus["Δ loss ↓"].text) == ("reference", "-0.0833 ± 0.0289")
    assert base["s/iteration"].text == base["lr"].text == broken["new ppl ↓"].text == "–"
    assert "decode ms" not in used_columns(results)
    results.arms[0].latency = {"decode_seconds": 0.00125}
    assert "decode ms" in used_columns(results) and rows(results)[0]["decode ms"].text == "1.25"
    text = to_markdown(results)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 6 and len({line.count("|") for line in table}) == 1
    for expected in ("broken, seed 1: train ended with 1", "- a note", "0.001 → 3.0000, 0.01 → failed"):
        assert expected in text


def test_findings_tell_doubt(results):
    lines = findings(results)
    assert lines[0].startswith("midus: 0.0833 nats/token lower (standard error 0.0167 over 3 pairs) than pro with 40%")
    results.arms[1].runs[2] = dataclasses.replace(results.arms[1].runs[2], new_loss=3.3)
    assert "within two standard errors" in findings(results)[0]
    assert findings(dataclasses.replace(results, reference="broken")) == []


def test_rates_at_the_edge_are_told(results):
    assert rates_tried(results) == ["midus: 0.001 → 3.0000, 0.01 → failed; the best is at the edge of what was tried"]
    results.arms[1].rate_losses = {"0.0001": 3.1, "0.001": 3.0, "0.01": 3.2}
    assert "edge" not in rates_tried(results)[0]


def test_the_page_needs_nothing_else(results):
    page = to_html(results)
    assert not re.search(r"(?:src|href|url)\s*[=(]|@import|https?://", page)
    assert page.count("<svg") == 4 and page.count("<figcaption>") == 4
    assert "base &lt;&amp;&gt;" in page and "base <&>" not in page
    assert "broken, seed 1: train ended with 1" in page and "prefers-color-scheme: dark" in page
    # Lower is better: the best perplexity stands out.
    assert f'class="best" data-value="{results.arms[1].perplexity("new").mean!r}"' in page


def test_mean_curve_is_over_common_tokens():
    one, two = [Point(1, 1.0, 4.0), Point(2, 2.0, 2.0)], [Point(2, 4.0, 3.0), Point(3, 5.0, 1.0)]
    assert mean_curve([one, two]) == [Point(2, 3.0, 2.5)]
