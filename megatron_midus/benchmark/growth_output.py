"""What sub-command growth found, as tables with exponents and as a picture with logarithmic axes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_midus.benchmark.growth import Growth, fit_growth
from megatron_midus.benchmark.output import section_captions
from megatron_midus.benchmark.plot import LINE_COLOURS, require_matplotlib
from megatron_midus.benchmark.result import BenchmarkResult
from megatron_midus.files import staged_file
from megatron_midus.report.machine import versions_text
from megatron_midus.report.table import MISSING, Cell, markdown_table, terminal_table, text_cells

AXIS_NAMES = {
    "tokens": "T, tokens",
    "num_keys": "n, sub-keys per half",
    "topk": "k, slots per look-up",
    "num_heads": "H, heads",
    "latent_size": "d_l, channels of a slot",
    "num_blocks": "blocks inserted",
}


def print_result(result: BenchmarkResult, console: Console | None = None) -> None:
    """A table of times and one of memory for each axis, exponents last."""
    console = console or Console(width=None if Console().is_terminal else 200, highlight=False)
    console.print(f"{result.device_text}; {versions_text(result.machine)}")
    for title, header, rows, notes in _tables(result):
        console.print()
        console.print(terminal_table(header, rows, title=title))
        for note in notes:
            console.print(f"  {note}", style="dim")


def result_to_markdown(result: BenchmarkResult) -> str:
    lines = ["# Benchmark growth", "", f"{result.device_text}; {versions_text(result.machine)}"]
    for title, header, rows, notes in _tables(result):
        lines += ["", f"## {title}", "", *markdown_table(header, rows)]
        lines += [text for note in notes for text in ("", note)]
    return "\n".join(lines) + "\n"


def _tables(result: BenchmarkResult) -> list[tuple[str, list[str], list[list[Cell]], list[str]]]:
    """Title, header, rows and notes."""
    found = []
    for (shape, axis), growths in _by_axis(result).items():
        sections = [s for s in result.sections if (s.extra["base_shape"], s.extra["axis"]) == (shape, axis)]
        values = [section.extra["value"] for section in sections]
        pass_name = "an iteration" if axis == "num_blocks" else "forward and backward"
        header = ["contender", *map(str, values), "exponent", "ideal"]
        first, last = sections[0], sections[-1]
        notes = [f"not timed: {note}" for note in last.notes] + section_captions(first)
        title = f"{AXIS_NAMES[axis]}, from {first.title.removeprefix('growth ')} ({first.description})"
        times = [_row(g, values, g.milliseconds, g.time_exponent, g.ideal_time_exponent) for g in growths]
        found.append((f"{title}: {pass_name}, ms", header, times, notes))
        if any(peak is not None for g in growths for peak in g.peak_bytes):
            megabytes = [[None if p is None else p / 1e6 for p in g.peak_bytes] for g in growths]
            peaks = [
                _row(g, values, column, g.peak_exponent, g.ideal_peak_exponent) for g, column in zip(growths, megabytes)
            ]
            found.append((f"{title}: peak memory, MB", header, peaks, []))
    return found


def _row(
    growth: Growth, values: Sequence[int], measured: Sequence[float | None], exponent: float | None, ideal: float | None
) -> list[Cell]:
    by_value = dict(zip(growth.values, measured))
    texts = [MISSING if by_value.get(value) is None else f"{by_value[value]:.4g}" for value in values]
    slopes = [MISSING if slope is None else f"{slope:.2f}" for slope in (exponent, ideal)]
    return text_cells([growth.contender, *texts, *slopes])


def _by_axis(result: BenchmarkResult) -> dict[tuple[str, str], list[Growth]]:
    found: dict[tuple[str, str], list[Growth]] = {}
    for growth in fit_growth(result.sections):
        found.setdefault((growth.shape, growth.axis), []).append(growth)
    return found


def plot_result(result: BenchmarkResult, target: str | Path) -> None:
    """Writes a PNG: a row of two panels for each axis, time and peak memory, both axes logarithmic."""
    axes = _by_axis(result)
    has_memory = any(peak is not None for each in axes.values() for g in each for peak in g.peak_bytes)
    columns = 1 + has_memory
    figure = require_matplotlib().Figure(figsize=(5.2 * columns + 0.4, 2.9 * len(axes) + 0.5), layout="constrained")
    panels = figure.subplots(len(axes), columns, squeeze=False)
    names = list(dict.fromkeys(g.contender for each in axes.values() for g in each))
    colours = {name: LINE_COLOURS[index % len(LINE_COLOURS)] for index, name in enumerate(names)}
    for row, ((_, axis), growths) in zip(panels, axes.items()):
        values = sorted({value for g in growths for value in g.values})
        unit = "iteration, ms" if axis == "num_blocks" else "forward + backward, ms"
        _draw(row[0], axis, values, unit, [(g, g.milliseconds, g.time_exponent) for g in growths], colours)
        if has_memory:
            peaks = [(g, [None if p is None else p / 1e6 for p in g.peak_bytes], g.peak_exponent) for g in growths]
            _draw(row[1], axis, values, "peak memory, MB", peaks, colours)
    torch_version = result.machine["versions"].get("torch", "?")
    figure.supxlabel(f"{result.device_text}; torch {torch_version}. Medians. In the legends: exponents.", fontsize=8)
    with staged_file(target) as partial:
        figure.savefig(partial, dpi=100, format="png")


def _draw(
    ax: Any,
    axis: str,
    values: Sequence[int],
    unit: str,
    lines: Sequence[tuple[Growth, Sequence[float | None], float | None]],
    colours: dict[str, str],
) -> None:
    from matplotlib import ticker

    for growth, measured, exponent in lines:
        points = [(x, y) for x, y in zip(growth.values, measured) if y]
        if not points:
            continue
        label = growth.contender + ("" if exponent is None else f"  {exponent:.2f}")
        ax.plot(*zip(*points), color=colours[growth.contender], marker="o", ms=3.5, lw=1.5, label=label)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(values, [f"{value // 1024}k" if value >= 4096 else str(value) for value in values])
    ax.xaxis.set_minor_locator(ticker.NullLocator())
    ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_locator(ticker.NullLocator())
    ax.set_xlabel(AXIS_NAMES[axis], fontsize=9)
    ax.set_ylabel(unit, fontsize=9)
    ax.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    ax.tick_params(labelsize=8)
    ax.grid(True, color="#dddddd", lw=0.5)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
