"""The HTML page of a comparison: the result in a sentence, the table, the charts, and how it was made."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from typing import Any

from megatron_midus.comparison.columns import (
    COLUMNS,
    RESULT_COLUMNS,
    SETTING_COLUMNS,
    failures,
    rates_tried,
    reading_note,
    rows,
    seeds_text,
    used,
)
from megatron_midus.comparison.curves import Point, thin
from megatron_midus.comparison.headline import headline
from megatron_midus.comparison.results import ArmResult, Results
from megatron_midus.comparison.roles import base_arm, strong_styles
from megatron_midus.report.charts import Level, Series, chart
from megatron_midus.report.machine import device_name, versions_text
from megatron_midus.report.page import Page, standalone_svg
from megatron_midus.report.table import Cell

_LOWER_IS_BETTER = (
    "new ppl ↓",
    "Δ loss ↓",
    "old ppl ↓",
    "third ppl ↓",
    "loss at equal time ↓",
    "s/iteration",
    "peak MB",
    "decode ms",
)
_HIGHER_IS_BETTER = ("recall % ↑", "answer nats ↑", "tokens/s")
_OTHERS = "other arms"
_LOSS = "held-out loss, nats/token"


def to_html(results: Results) -> str:
    """One document that needs nothing else."""
    page = Page(results.description or "Comparison")
    page.lead(headline(results))
    page.paragraph(
        f"{len(results.arms)} arms, {seeds_text(results)}; reference: {results.reference}. Lower loss and perplexity are better.",
        is_note=True,
    )
    if failed := failures(results):
        page.heading("Failed")
        page.bullets(failed)
    page.heading("Results")
    _add_table(page, results, RESULT_COLUMNS)
    grey = "" if len(results.seeds) == 1 else " A grey Δ is within two of its standard errors: no evidence either way."
    page.paragraph(
        f"{reading_note(results)}{grey} Green: the best of its column. A click on a heading sorts.", is_note=True
    )
    page.heading("Held-out loss")
    page.charts(_charts(results))
    page.heading("Settings and cost")
    _add_table(page, results, SETTING_COLUMNS)
    page.bullets(results.notes)
    columns = used(results, COLUMNS)
    page.details("What the columns are", [f"{name}: {text}" for name, text in COLUMNS.items() if name in columns])
    page.details(
        "Learning rates tried on the first seed, with the loss on the validation batches", rates_tried(results)
    )
    page.details("Where it ran", _machines(results.machines))
    page.code("The experiment as it was run", json.dumps(results.settings, indent=1, ensure_ascii=False))
    return page.html()


def loss_svg(results: Results) -> str:
    """The loss against the trained parameters, all arms, as a file of its own: for a page that shows pictures alone."""
    return standalone_svg(_against_parameters(results, strong_styles(results)))


def _add_table(page: Page, results: Results, wanted: Sequence[str]) -> None:
    columns, table = used(results, wanted), rows(results)
    best: dict[str, float] = {}
    for name in columns:
        # What is no evidence is no best either.
        found = [cell.value for row in table if isinstance((cell := row[name]).value, float) and not cell.is_faint]
        if found and name in (*_LOWER_IS_BETTER, *_HIGHER_IS_BETTER):
            best[name] = (max if name in _HIGHER_IS_BETTER else min)(found)

    if best.get("Δ loss ↓", 0.0) >= 0:
        best.pop("Δ loss ↓", None)  # nobody is better than the reference

    def shown(name: str, cell: Cell) -> Cell:
        return dataclasses.replace(cell, is_best=name in best and cell.value == best[name])

    page.table(columns, [[shown(n, row[n]) for n in columns] for row in table], text_columns=2, hints=COLUMNS)


def _charts(results: Results) -> list[tuple[str, str]]:
    """Charts and captions."""
    styles = strong_styles(results)
    trained = [arm for arm in results.arms if arm.curves]
    mean = "" if len(results.seeds) == 1 else ", mean over seeds"
    bars = "" if len(results.seeds) == 1 else "; bars: standard deviation over seeds"
    drawn = [(_against_parameters(results, styles), f"Whole held-out text of the new domain at the end{bars}.")]
    if not trained:
        return drawn
    validation = [(arm, mean_curve([c.validation for c in arm.curves])) for arm in trained]
    by_tokens = [_line(arm, curve, styles) for arm, curve in validation]
    by_time = [_line(arm, curve, styles, by_time=True) for arm, curve in validation]
    training = [_line(arm, thin(mean_curve([c.training for c in arm.curves]), 60), styles) for arm in trained]
    lines: dict[str, Any] = {"other_name": _OTHERS}
    drawn += [
        (
            chart(by_tokens, x_label="training tokens", y_label=_LOSS, title="Held-out loss against tokens", **lines),
            f"Validation batches of the new domain{mean}.",
        ),
        (
            chart(
                by_time, x_label="seconds of training steps", y_label=_LOSS, title="Held-out loss against time", **lines
            ),
            "The same curves against time, without evaluations and saves.",
        ),
        (
            chart(
                training, x_label="training tokens", y_label="training loss, nats/token", title="Training loss", **lines
            ),
            f"Training loss, means over stretches of steps{mean}; all arms of a seed see the same batches.",
        ),
    ]
    return drawn


def _line(arm: ArmResult, curve: list[Point], styles: dict[str, int], *, by_time: bool = False) -> Series:
    x = [point.seconds if by_time else float(point.tokens) for point in curve]
    style = styles.get(arm.name)
    return Series(arm.name, x, [point.loss for point in curve], style, is_strong=style is not None)


def _against_parameters(results: Results, styles: dict[str, int]) -> str:
    series = []
    for arm in results.arms:
        loss = arm.loss("new")
        if loss is not None and arm.trainable:
            spread = None if loss.deviation is None else [loss.deviation]
            series.append(
                Series(arm.name, [float(arm.trainable)], [loss.mean], styles.get(arm.name), spread, is_line=False)
            )
    base = base_arm(results)
    loss = None if base is None else base.loss("new")
    levels = [] if base is None or loss is None else [Level(f"{base.name}, not trained", loss.mean, styles[base.name])]
    return chart(
        series,
        x_label="trained parameters",
        y_label=_LOSS,
        log_x=True,
        title="Held-out loss against trained parameters",
        label_points=True,
        levels=levels,
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


def _machines(machines: Sequence[dict[str, Any]]) -> list[str]:
    """What each of the machines is that the runs recorded."""
    lines = []
    for facts in machines:
        if not facts:
            lines.append("Some runs are of a version that did not record its machine.")
            continue
        threads = f"{facts.get('cores')} cores, OMP_NUM_THREADS={facts.get('OMP_NUM_THREADS')}"
        lines.append(f"{device_name(facts)}, {threads}; {versions_text(facts)}")
    return lines
