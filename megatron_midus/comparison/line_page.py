"""The line between learning and forgetting as a page, as Markdown, as a chart and as tables for programs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence

from megatron_midus.comparison.columns import mean_cell, seeds_text
from megatron_midus.comparison.hull import hull
from megatron_midus.comparison.line import (
    Line,
    LinePoint,
    MethodLine,
    groups,
    line_points,
    mean_points,
    reference_method,
    to_values,
)
from megatron_midus.comparison.results import Mean, Results
from megatron_midus.comparison.roles import MIDUS_STYLES, REFERENCE_STYLE
from megatron_midus.report.charts import Series, chart
from megatron_midus.report.page import Page, standalone_svg
from megatron_midus.report.table import MISSING, Cell, markdown_table, number_cell

_HOW = (
    "Gained: held-out loss on the new domain below the base's. Forgotten: held-out loss on the base's own domain above the base's. "
    "Nats per token. The line of a method joins the runs that forget least for what they gain, from the base at (0, 0) on; "
    "every seed has its own. ± is the standard deviation over seeds."
)
_COLUMNS = {
    "method": "arm of the experiment file, all of its strengths together",
    "reach": "the largest gain of any strength",
    "mean forgotten ↓": "mean height of the line over the gains that all methods of the table reach",
    "below reference": "share of all gains at which the method forgets less than the reference",
    "below all": "share of all gains at which it forgets less than every other method of the table",
    "trained": "least and most parameters that learn",
    "s": "median seconds of training steps of a run",
}


_THIRD = "third domain ↓"
_OF_RUNS = {_THIRD: "what is forgotten of a text that no method trained on, replayed or fitted its domain gate on"}


def write_line(results: Results) -> dict[str, str]:
    """``{file name: content}`` of the report; nothing where there is no base, no old domain or no run."""
    points = line_points(results)
    if not points:
        return {}
    reference = reference_method(results)
    lines = groups(points, reference)
    return {
        "line.html": _html(results, points, lines),
        "line.md": _markdown(results, points, lines),
        "line.svg": standalone_svg(line_chart(results, points)),
        "line.json": json.dumps(to_values(points, lines, reference), indent=1) + "\n",
        "line.csv": _csv(points),
    }


# -- chart -----------------------------------------------------------------------------------------------------------
def line_chart(results: Results, points: Sequence[LinePoint]) -> str:
    """Gain to the right, what was kept of the old domain upwards: a line further up and to the right is better."""
    styles = _styles(results, points)
    series = []
    for method in dict.fromkeys(point.method for point in points):
        means = [(gained.mean, forgotten) for _, gained, forgotten in mean_points(points, method)]
        style, strong = styles.get(method), method in styles
        vertices = hull([(x, f.mean) for x, f in means]).vertices
        x, y = [g for g, _ in vertices], [-f for _, f in vertices]
        series.append(Series(method, x, y, style, is_strong=strong))
        spread = [f.deviation or 0.0 for _, f in means]
        series.append(Series(method, [x for x, _ in means], [-f.mean for _, f in means], style, spread, is_line=False))
    return chart(
        series,
        x_label="gained on the new domain, nats/token",
        y_label="kept of the old domain (−0.1 = 0.1 nats/token forgotten)",
        title="What every method gains and forgets",
        label_ends=True,
    )


def _styles(results: Results, points: Sequence[LinePoint]) -> dict[str, int]:
    """Strong colours: the reference, and methods with Memory blocks."""
    memory = {arm.name.partition("@")[0] for arm in results.arms if arm.memory is not None}
    midus = [name for name in dict.fromkeys(point.method for point in points) if name in memory]
    return {reference_method(results): REFERENCE_STYLE, **dict(zip(midus, MIDUS_STYLES))}


# -- tables ----------------------------------------------------------------------------------------------------------
def _rows(line: Line, styles: dict[str, int]) -> tuple[list[str], list[list[Cell]]]:
    gains = [gain for gain in (line.methods[0].at if line.methods else ()) if any(m.at[gain] for m in line.methods)]
    first, *rest = _COLUMNS
    header = [first, "reach", *(f"at {gain:g} ↓" for gain in gains), *rest[1:]]
    return header, [_row(method, gains, styles) for method in line.methods]


def _row(method: MethodLine, gains: Sequence[float], styles: dict[str, int]) -> list[Cell]:
    low, high = method.trained
    trained = f"{low:,}" if low == high else f"{low:,} – {high:,}"
    return [
        Cell(method.name, method.name, style=styles.get(method.name)),
        mean_cell(method.reach, 3),
        *(_at_cell(method.at[gain], len(method.hulls)) for gain in gains),
        mean_cell(method.mean_forgotten, 3),
        _share_cell(method.below_reference),
        _share_cell(method.below_all),
        Cell(trained, float(high)),
        number_cell(method.seconds, "{:,.0f}"),
    ]


def _at_cell(mean: Mean | None, seeds: int) -> Cell:
    cell = mean_cell(mean, 3)
    if mean is None or mean.count == seeds:
        return cell
    return Cell(f"{cell.text} ({mean.count} of {seeds} seeds)", cell.value)


def _share_cell(share: Mean | None) -> Cell:
    return Cell(MISSING) if share is None else Cell(f"{100 * share.mean:.0f} %", share.mean)


def _runs(points: Sequence[LinePoint], styles: dict[str, int]) -> tuple[list[str], list[list[Cell]]]:
    """Header and a row for every strength, over its seeds."""
    has_third = any(point.third is not None for point in points)
    header = ["method", "strength", "gained ↑", "forgotten ↓", *([_THIRD] if has_third else []), "trained", "tokens"]
    rows = []
    for method in dict.fromkeys(point.method for point in points):
        for name, gained, forgotten in mean_points(points, method):
            run = next(p for p in points if (p.method, p.point) == (method, name))
            cells = [Cell(method, method, style=styles.get(method)), Cell(name, name)]
            cells += [mean_cell(gained, 3), mean_cell(forgotten, 3)]
            if has_third:
                third = [p.third for p in points if (p.method, p.point) == (method, name) and p.third is not None]
                cells.append(mean_cell(Mean.of(third), 3))
            rows.append([*cells, number_cell(run.trained, "{:,.0f}"), number_cell(run.tokens, "{:,.0f}")])
    return header, rows


def _notes(line: Line) -> str:
    text = f"Common gains: 0 to {line.common:.3f}."
    return text + (f" No run of {', '.join(line.rest)}." if line.rest else "")


def _markdown(results: Results, points: Sequence[LinePoint], lines: dict[str, Line]) -> str:
    text = [f"# {results.description or 'Learning and forgetting'}", ""]
    text += [f"{seeds_text(results)}; reference: {reference_method(results)}. {_HOW}", ""]
    for title, line in lines.items():
        header, rows = _rows(line, {})
        text += [f"## {title[0].upper()}{title[1:]}", "", _notes(line), "", *markdown_table(header, rows), ""]
    text += ["## Runs", "", *markdown_table(*_runs(points, {}), text_columns=2)]
    return "\n".join(text) + "\n"


def _html(results: Results, points: Sequence[LinePoint], lines: dict[str, Line]) -> str:
    styles = _styles(results, points)
    page = Page(results.description or "Learning and forgetting")
    page.paragraph(f"{seeds_text(results)}; reference: {reference_method(results)}. {_HOW}", is_note=True)
    page.charts([(line_chart(results, points), "Means over seeds. Further up and to the right is better.")])
    for title, line in lines.items():
        header, rows = _rows(line, styles)
        page.heading(f"{title[0].upper()}{title[1:]}")
        page.table(header, rows, hints=_COLUMNS)
        page.paragraph(_notes(line), is_note=True)
    page.heading("Runs")
    page.table(*_runs(points, styles), text_columns=2)
    page.details("What the columns are", [f"{name}: {text}" for name, text in (_COLUMNS | _OF_RUNS).items()])
    page.bullets(results.notes)
    return page.html()


def _csv(points: Sequence[LinePoint]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(("method", "strength", "seed", "gained", "forgotten", "trained", "tokens", "seconds", "third"))
    for p in points:
        seconds = "" if p.seconds is None else f"{p.seconds:.1f}"
        losses = (f"{p.gained:.5f}", f"{p.forgotten:.5f}")
        third = "" if p.third is None else f"{p.third:.5f}"
        writer.writerow((p.method, p.point, p.seed, *losses, p.trained, p.tokens, seconds, third))
    return stream.getvalue()
