"""Results, their table and their page: means, paired differences, and nothing lost on the way through JSON."""

import dataclasses
import json
import math
import platform
import re
import statistics
from xml.etree import ElementTree

import pytest

from megatron_midus.comparison.columns import (
    COLUMNS,
    RESULT_COLUMNS,
    SETTING_COLUMNS,
    rates_tried,
    rows,
    to_markdown,
    used,
)
from megatron_midus.comparison.curves import Curves, Point
from megatron_midus.comparison.headline import headline
from megatron_midus.comparison.results import ArmResult, Mean, Results, RunResult, read_results
from megatron_midus.comparison.results_page import loss_svg, mean_curve, to_html


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
        arm("midus", {1: 2.9, 2: 3.15, 3: 3.0}, seconds=20.0, trainable=400, policy="interleave", memory={"memory_num_keys": 8}, rate_losses={"0.001": 3.0, "0.01": math.inf}),
        arm("base <&>", {1: 4.0}, trainable=0, policy="none"),
        arm("broken", {}, failures={"broken, seed 1": "train ended with 1"}),
    ]  # fmt: skip
    return Results("A & B", "pro", [1, 2, 3], arms, {"lr": [1e-3]}, [{"processor": "x", "cores": 2}], ["a note"])


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


def test_recall_of_facts(results):
    assert not {"recall % ↑", "answer nats ↑"} & set(used(results, COLUMNS))
    for run, recall in zip(results.arms[1].runs, (0.5, 0.25, 0.75)):
        run.recall, run.answer_log_likelihood = recall, -2 * recall
    pro, midus = (next(row for row in rows(results) if row["arm"].text == name) for name in ("pro", "midus"))
    assert (midus["recall % ↑"].text, midus["answer nats ↑"].text) == ("50.0 ± 25.0", "-1.00 ± 0.50")
    assert pro["recall % ↑"].text == "–" and "recall % ↑" in used(results, RESULT_COLUMNS)
    assert "<th" in to_html(results) and read_results(results.to_json()).arms[1].runs == results.arms[1].runs
    assert json.loads(results.to_json())["arms"][1]["summary"]["recall"] == {"mean": 0.5, "deviation": 0.25, "count": 3}


def test_table(results):
    table = {row["arm"].text: row for row in rows(results)}
    assert all(set(row) == set(COLUMNS) == {*RESULT_COLUMNS, *SETTING_COLUMNS} for row in table.values())
    base, broken = table["base <&>"], table["broken"]
    # The standard error of the paired differences.
    assert (table["pro"]["Δ loss ↓"].text, table["midus"]["Δ loss ↓"].text) == ("reference", "−0.0833 ± 0.0167")
    assert (table["pro"]["trained"].text, table["midus"]["trained"].text) == ("1,000 (100 %)", "400 (40 %)")
    assert base["s/iteration"].text == base["lr"].text == broken["new ppl ↓"].text == "–"
    assert "decode ms" not in used(results, COLUMNS)
    results.arms[0].latency = {"decode_seconds": 0.00125}
    assert "decode ms" in used(results, COLUMNS) and rows(results)[1]["decode ms"].text == "1.25"
    text = to_markdown(results)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 * 6 and len({line.count("|") for line in lines[:6]}) == 1
    for expected in ("broken, seed 1: train ended with 1", "- a note", "0.001 → 3.0000, 0.01 → failed"):
        assert expected in text
    assert text.splitlines()[2] == f"**{headline(results)}**"


def test_the_speed_stands_in_the_table_of_results():
    assert {"tokens/s", "s/iteration", "peak MB", "decode ms"} <= set(RESULT_COLUMNS)
    # Only comparisons with facts, or with a third domain, have these.
    assert len(set(RESULT_COLUMNS) - {"recall % ↑", "answer nats ↑", "third ppl ↓"}) <= 10


def test_base_reference_and_midus_come_first_and_alone_have_colours(results):
    results.arms.insert(0, arm("stack", {1: 3.5, 2: 3.5, 3: 3.5}))
    assert [(row["arm"].text, row["arm"].style) for row in rows(results)] == [
        ("base <&>", 6), ("pro", 1), ("midus", 0), ("stack", None), ("broken", None),
    ]  # fmt: skip
    page = to_html(results)
    lines = re.findall(r'<path class="line ([^"]+)" d="M[^"]* L', page)
    assert sorted(lines) == sorted(["other", "s1 strong", "s0 strong"] * 3)
    # A level across the chart, because nothing was trained.
    assert page.count("stroke-dasharray") == 1 and "base &lt;&amp;&gt;, not trained" in page


def test_no_more_than_five_midus_arms_have_colours(results):
    results.arms += [arm(f"m{i}", {1: 3 + i / 10}, policy="interleave", memory={}) for i in range(6)]
    coloured = [row["arm"].text for row in rows(results) if row["arm"].style is not None]
    assert coloured == ["base <&>", "pro", "midus", "m0", "m1", "m2", "m3"]


def test_the_headline_is_the_best_midus_arm_against_reference_and_base(results):
    assert headline(results) == (
        "MIDUS (midus) is 0.083 nats/token better than pro on the new domain with 40 % of its trained parameters and "
        "0.983 nats/token better than the base; on the base's own domain it is 0.083 nats/token better than pro."
    )
    results.arms.append(arm("all", {1: 1.0}, policy="interleave", memory={}, train="all"))
    assert headline(results).startswith("MIDUS (midus) ")  # trains what the reference trains
    results.arms.append(arm("worse", {1: 3.9, 2: 3.9, 3: 3.9}, policy="interleave", memory={}))
    assert headline(results).startswith("MIDUS (midus, the best of 2) ")


def test_the_headline_tells_doubt(results):
    results.arms[1].runs[2] = dataclasses.replace(results.arms[1].runs[2], new_loss=3.3)
    assert "MIDUS (midus) is level with pro (+0.017 nats/token, within two standard errors) on" in headline(results)
    (row,) = [row for row in rows(results) if row["arm"].text == "midus"]
    assert row["Δ loss ↓"].is_faint
    assert "nothing to compare" in headline(dataclasses.replace(results, reference="broken")).lower()


def test_one_seed_has_no_spread_anywhere(results):
    for entry in results.arms:
        entry.runs = entry.runs[:1]
    results.seeds = [1]
    for text in (to_html(results), to_markdown(results)):
        shown = text.partition("<details>")[0]
        assert "±" not in shown and "over seeds" not in shown and "standard" not in shown
        assert "(one seed)" in text


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


def test_nothing_of_the_table_is_said_again_in_sentences(results):
    page = to_html(results)
    assert page.index('class="lead"') < page.index("<table")
    assert (
        "<li>" not in page[page.index("<table") : page.index("<svg")]
        and "with 40 %" not in page[page.index("<table") :]
    )


def test_the_page_names_the_machines_of_the_runs(results):
    results.machines = [{"processor": "earlier", "cores": 3, "versions": {"torch": "1.0"}}, {}]
    page = to_html(results)
    assert "earlier, 3 cores" in page and "torch 1.0" in page and "did not record its machine" in page
    assert platform.python_version() not in page


def test_the_chart_of_all_arms_is_a_picture_of_its_own(results):
    drawn = ElementTree.fromstring(loss_svg(results))
    texts = [node.text for node in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {"pro", "midus", "base <&>, not trained"} <= set(texts)
    assert "prefers-color-scheme" in drawn.find("{http://www.w3.org/2000/svg}style").text


def test_mean_curve_is_over_common_tokens():
    one, two = [Point(1, 1.0, 4.0), Point(2, 2.0, 2.0)], [Point(2, 4.0, 3.0), Point(3, 5.0, 1.0)]
    assert mean_curve([one, two]) == [Point(2, 3.0, 2.5)]
