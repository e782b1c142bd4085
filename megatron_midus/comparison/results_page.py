"""The HTML report of a comparison."""

from __future__ import annotations

import dataclasses
import json
import statistics
from typing import Any

from megatron_midus.comparison.columns import (
    COLUMNS,
    failures,
    findings,
    rates_tried,
    rows,
    seeds_text,
    used_columns,
)
from megatron_midus.comparison.curves import Point, thin
from megatron_midus.comparison.results import ArmResult, Results
from megatron_midus.report.charts import Series, chart
from megatron_midus.report.machine import device_name, versions_text
from megatron_midus.report.page import Page

_LOWER_IS_BETTER = ("new ppl ↓", "Δ loss ↓", "old ppl ↓", "loss at equal time ↓", "s/iteration", "peak MB", "decode ms")
_HIGHER_IS_BETTER = ("tokens/s",)


def to_html(results: Results) -> str:
    """One document that needs nothing else."""
    page = Page(
        results.description or "Comparison",
        f"{len(results.arms)} arms, {seeds_text(results)}, reference: {results.reference}",
    )
    failed = failures(results)
    if failed:
        page.heading("Failed")
        page.bullets(failed)
    page.heading("Results")
    _add_table(page, results)
    page.paragraph("Mean ± standard deviation over seeds. A click on a heading sorts; the best of a column is green.", is_note=True)  # fmt: skip
    page.bullets(findings(results))
    _add_charts(page, results)
    if tried := rates_tried(results):
        page.heading("Learning rates tried on the first seed")
        page.paragraph("Loss on the validation batches at the end (nats/token); the lowest was used for all seeds.")
        page.bullets(tried)
    page.heading("How to read it")
    columns = used_columns(results)
    page.bullets([f"{name}: {text}" for name, text in COLUMNS.items() if name in columns])
    page.bullets(results.notes)
    page.heading("Machine and settings")
    page.bullets(_machine(results.machine))
    page.code("The experiment as it was run", json.dumps(results.settings, indent=1, ensure_ascii=False))
    return page.html()


def _add_table(page: Page, results: Results) -> None:
    columns, table = used_columns(results), rows(results)
    best: dict[str, float] = {}
    for name in columns:
        found = [row[name].value for row in table if isinstance(row[name].value, float)]
        if found and name in _LOWER_IS_BETTER:
            best[name] = min(found)
        elif found and name in _HIGHER_IS_BETTER:
            best[name] = max(found)
    page.table(
        columns,
        [
            [dataclasses.replace(row[n], is_best=n in best and row[n].value == best[n]) for n in columns]
            for row in table
        ],
        text_columns=2,
    )


def _add_charts(page: Page, results: Results) -> None:
    trained = [(index, arm) for index, arm in enumerate(results.arms) if arm.curves]
    page.heading("Held-out loss")
    label = "held-out loss, nats/token"
    charts = []
    if trained:
        validation = [(index, arm, mean_curve([c.validation for c in arm.curves])) for index, arm in trained]
        by_tokens = [_line(index, arm, curve, by_time=False) for index, arm, curve in validation]
        by_time = [_line(index, arm, curve, by_time=True) for index, arm, curve in validation]
        charts += [
            (
                chart(by_tokens, x_label="training tokens", y_label=label, title="Held-out loss against tokens"),
                "Validation batches of the new domain, mean over seeds.",
            ),
            (
                chart(by_time, x_label="seconds of training steps", y_label=label, title="Held-out loss against time"),
                "The same curves against time, without evaluations and saves.",
            ),
        ]
    charts.append((_against_parameters(results), "Whole held-out text of the new domain at the end; bars: standard deviation over seeds."))  # fmt: skip
    if trained:
        training = [
            _line(index, arm, thin(mean_curve([c.training for c in arm.curves]), 60), by_time=False)
            for index, arm in trained
        ]
        charts.append(
            (
                chart(training, x_label="training tokens", y_label="training loss, nats/token", title="Training loss"),
                "Training loss, means over stretches of steps and over seeds; all arms of a seed see the same batches.",
            )
        )
    page.charts(charts)


def _line(index: int, arm: ArmResult, curve: list[Point], *, by_time: bool) -> Series:
    x = [point.seconds if by_time else float(point.tokens) for point in curve]
    return Series(arm.name, x, [point.loss for point in curve], style=index)


def _against_parameters(results: Results) -> str:
    series = []
    for index, arm in enumerate(results.arms):
        loss = arm.loss("new")
        if loss is not None and arm.trainable:
            spread = [loss.deviation or 0.0]
            series.append(Series(arm.name, [float(arm.trainable)], [loss.mean], index, spread, is_line=False))
    return chart(
        series,
        x_label="trained parameters",
        y_label="held-out loss, nats/token",
        log_x=True,
        title="Held-out loss against trained parameters",
        label_points=True,
    )


def mean_curve(curves: list[list[Point]]) -> list[Point]:
    """Mean loss and mean time over seeds, at the tokens that all of them have."""
    by_tokens = [{point.tokens: point for point in curve} for curve in curves]
    common = sorted(set.intersection(*(set(entry) for entry in by_tokens)))
    return [
        Point(
            tokens,
            statistics.fmean(entry[tokens].seconds for entry in by_tokens),
            statistics.fmean(entry[tokens].loss for entry in by_tokens),
        )
        for tokens in common
    ]


def _machine(machine: dict[str, Any]) -> list[str]:
    threads = f"{machine.get('cores')} cores, OMP_NUM_THREADS={machine.get('OMP_NUM_THREADS')}"
    return [f"{device_name(machine)}, {threads}", versions_text(machine)]
