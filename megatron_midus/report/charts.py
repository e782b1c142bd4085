"""Charts as inline SVG: lines and points with axes, legend and error bars. Colours come from the page's style sheet.

Shapes have the classes ``s0 … s11`` (a series each), ``axis``, ``grid`` and ``note``; ``report/page.py`` gives them
colours for light and for dark.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from html import escape

NUM_SERIES = 12
_WIDTH, _HEIGHT = 680, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 14, 46
_CHARACTER = 6.6


@dataclasses.dataclass(frozen=True)
class Series:
    """One line, or points alone.

    Attributes:
        name: in the legend.
        x, y: of equal length.
        spread: half length of each error bar.
        style: which colour, counted from 0; arms keep theirs over several charts. ``None`` = grey, behind the others.
        is_strong: a thicker line.
        is_line: whether the points are joined.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: int | None
    spread: Sequence[float] | None = None
    is_line: bool = True
    is_strong: bool = False

    @property
    def css(self) -> str:
        return "other" if self.style is None else f"s{self.style % NUM_SERIES}"


@dataclasses.dataclass(frozen=True)
class Level:
    """A value without a place on the horizontal axis: a dashed line across the chart with its name on it."""

    name: str
    y: float
    style: int


@dataclasses.dataclass(frozen=True)
class _Axis:
    """A map from values to pixels."""

    low: float
    high: float
    start: float
    stop: float
    is_log: bool
    at: Sequence[float] | None = None

    def place(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.is_log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.stop - self.start)

    def ticks(self) -> Sequence[float]:
        if self.at is not None:
            return self.at
        if self.is_log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [m * 10.0**p for p in powers for m in (1, 2, 5) if self.low <= m * 10.0**p <= self.high]
            return found if len(found) >= 2 else nice_ticks(self.low, self.high, 4)
        return nice_ticks(self.low, self.high)


def nice_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """About ``count`` round numbers between ``low`` and ``high``."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def short_number(value: float) -> str:
    """``1.5M``, ``20k``, ``0.25``."""
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.4g}{letter}"
    return f"{value:.4g}"


def chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    x_ticks: Sequence[float] | None = None,
    title: str = "",
    label_points: bool = False,
    label_ends: bool = False,
    levels: Sequence[Level] = (),
    other_name: str = "others",
) -> str:
    """One chart.

    Args:
        series: at least one point in all; values that are not finite (or not positive on a log axis) are left out.
        x_label, y_label: with units.
        log_x: logarithmic horizontal axis.
        x_ticks: where the horizontal axis has ticks, within the values; round numbers when absent.
        title: said to screen readers.
        label_points: write names beside points instead of a legend.
        label_ends: write names beside the last point of lines instead of a legend.
        levels: horizontal lines.
        other_name: of all grey series together, in the legend.
    """
    series = [_finite(entry, log_x) for entry in series]
    series = [entry for entry in series if entry.x]
    if not series:
        return '<p class="note">No data.</p>'
    series = sorted(series, key=lambda entry: entry.style is not None)  # grey below the others
    entries = [] if label_points or label_ends else _legend_entries(series, other_name)
    rows = _legend_rows(entries)
    height = _HEIGHT + 18 * len(rows)
    x = _axis([v for s in series for v in s.x], _LEFT, _WIDTH - _RIGHT, is_log=log_x)
    x = dataclasses.replace(x, at=x_ticks)
    bounds = [v + sign * e for s in series for v, e in zip(s.y, s.spread or [0.0] * len(s.y)) for sign in (-1, 1)]
    y = _axis([*bounds, *(level.y for level in levels)], _HEIGHT - _BOTTOM, _TOP, is_log=False)
    parts = [f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title or y_label)}">']
    parts += _frame(x, y, x_label, y_label)
    parts += [_draw_level(level, y) for level in levels]
    for entry in series:
        parts += _draw(entry, x, y)
    if label_points:
        parts += _point_labels(series, series, x, y)
    if label_ends:
        ends = [dataclasses.replace(s, x=s.x[-1:], y=s.y[-1:]) for s in series if s.is_line]
        parts += _point_labels(ends, series, x, y)
    for index, row in enumerate(rows):
        parts += _legend(row, _HEIGHT + 12 + 18 * index)
    return "\n".join([*parts, "</svg>"])


def _finite(entry: Series, log_x: bool) -> Series:
    keep = [
        i for i, (a, b) in enumerate(zip(entry.x, entry.y))
        if math.isfinite(a) and math.isfinite(b) and (a > 0 or not log_x)
    ]  # fmt: skip
    spread = None if entry.spread is None else [entry.spread[i] for i in keep]
    return dataclasses.replace(entry, x=[entry.x[i] for i in keep], y=[entry.y[i] for i in keep], spread=spread)


def _axis(values: Sequence[float], start: float, stop: float, *, is_log: bool) -> _Axis:
    low, high = min(values), max(values)
    if is_log:
        factor = max((high / low) ** 0.05, 1.1)
        return _Axis(low / factor, high * factor, start, stop, True)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return _Axis(low - margin, high + margin, start, stop, False)


def _frame(x: _Axis, y: _Axis, x_label: str, y_label: str) -> list[str]:
    bottom, left, right = _HEIGHT - _BOTTOM, _LEFT, _WIDTH - _RIGHT
    parts = []
    for tick in y.ticks():
        at = y.place(tick)
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{short_number(tick)}</text>'
        )
    for tick in x.ticks():
        at = x.place(tick)
        parts.append(f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(
            f'<text class="tick" x="{at:.1f}" y="{bottom + 17}" text-anchor="middle">{short_number(tick)}</text>'
        )
    parts.append(f'<path class="axis" d="M{left} {_TOP}V{bottom}H{right}"/>')
    parts.append(
        f'<text class="label" x="{(left + right) / 2}" y="{bottom + 37}" text-anchor="middle">{escape(x_label)}</text>'
    )
    middle = (_TOP + bottom) / 2
    parts.append(
        f'<text class="label" transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    return parts


def _dash(entry: Series) -> str:
    """A thirteenth series has the colour of the first and another stroke."""
    return ' stroke-dasharray="5 3"' if (entry.style or 0) // NUM_SERIES % 2 else ""


def _draw_level(level: Level, y: _Axis) -> str:
    at = y.place(level.y)
    name = f'<text class="tick" x="{_LEFT + 6}" y="{at - 6:.1f}">{escape(level.name)}</text>'
    css = f"line s{level.style % NUM_SERIES}"
    return f'<path class="{css}" d="M{_LEFT} {at:.1f}H{_WIDTH - _RIGHT}" stroke-dasharray="6 4"/>{name}'


def _draw(entry: Series, x: _Axis, y: _Axis) -> list[str]:
    places = [(x.place(a), y.place(b)) for a, b in zip(entry.x, entry.y)]
    css, dash = entry.css, _dash(entry)
    weight = " strong" if entry.is_strong else ""
    parts = []
    if entry.is_line and len(places) > 1:
        path = " ".join(f"{'M' if i == 0 else 'L'}{a:.1f} {b:.1f}" for i, (a, b) in enumerate(places))
        parts.append(f'<path class="line {css}{weight}" d="{path}"{dash}/>')
    for (a, _), value, half in zip(places, entry.y, entry.spread or [0.0] * len(places)):
        if half:
            top, bottom = y.place(value + half), y.place(value - half)
            parts.append(f'<path class="line thin {css}" d="M{a:.1f} {top:.1f}V{bottom:.1f}"/>')
    if len(places) <= 40:
        radius = 2.6 if entry.is_line else 5
        for (a, b), given, loss in zip(places, entry.x, entry.y):
            told = f"{entry.name}: {short_number(given)}, {loss:.4f}"
            parts.append(
                f'<circle class="dot {css}" cx="{a:.1f}" cy="{b:.1f}" r="{radius}"><title>{escape(told)}</title></circle>'
            )
    return parts


def _point_labels(series: Sequence[Series], drawn: Sequence[Series], x: _Axis, y: _Axis) -> list[str]:
    """Names beside the points of ``series``, each at the nearest height where it covers no name and no point of ``drawn``; a
    thin line leads to one that moved. Coloured series choose their places first."""
    points = sorted(
        (entry.style is None, x.place(a), y.place(b), entry.name) for entry in series for a, b in zip(entry.x, entry.y)
    )
    dots = ((x.place(a), y.place(b)) for entry in drawn for a, b in zip(entry.x, entry.y))
    taken = [(a - 6, a + 6, b + 4) for a, b in dots]  # left, right, baseline
    parts = []
    for is_grey, a, b, name in points:
        width = _CHARACTER * len(name)
        is_right = a + 14 + width <= _WIDTH - _RIGHT
        left = a + 14 if is_right else a - 14 - width
        baseline = _free_baseline(taken, left, left + width, b + 4)
        taken.append((left, left + width, baseline))
        anchor, at, edge = ("start", left, left - 2) if is_right else ("end", left + width, left + width + 2)
        if abs(baseline - 4 - b) > 3:
            parts.append(f'<path class="grid" d="M{a:.1f} {b:.1f}L{edge:.1f} {baseline - 4:.1f}"/>')
        css = "tick faint" if is_grey else "tick"
        parts.append(
            f'<text class="{css}" x="{at:.1f}" y="{baseline:.1f}" text-anchor="{anchor}">{escape(name)}</text>'
        )
    return parts


def _free_baseline(taken: Sequence[tuple[float, float, float]], left: float, right: float, wanted: float) -> float:
    """The height nearest to ``wanted`` inside the frame where a text covers none of ``taken``."""

    def is_free(baseline: float) -> bool:
        return not any(left < end and start < right and abs(baseline - other) < 13 for start, end, other in taken)

    places = range(_TOP + 10, _HEIGHT - _BOTTOM - 3)
    free = [float(place) for place in places if is_free(place)]
    return min([wanted, *free] if is_free(wanted) else free, key=lambda at: abs(at - wanted), default=wanted)


def _legend_entries(series: Sequence[Series], other_name: str) -> list[Series]:
    """Every coloured series, and all grey ones as one."""
    coloured = [entry for entry in series if entry.style is not None]
    grey = next((entry for entry in series if entry.style is None), None)
    return coloured + ([dataclasses.replace(grey, name=other_name)] if grey is not None else [])


def _legend_rows(entries: Sequence[Series]) -> list[list[Series]]:
    rows: list[list[Series]] = [[]] if entries else []
    used = 0.0
    for entry in entries:
        width = 36 + _CHARACTER * len(entry.name)
        if rows[-1] and used + width > _WIDTH - _LEFT - _RIGHT:
            rows.append([])
            used = 0.0
        rows[-1].append(entry)
        used += width
    return rows


def _legend(entries: Sequence[Series], baseline: float) -> list[str]:
    at, parts = float(_LEFT), []
    for entry in entries:
        weight = " strong" if entry.is_strong else ""
        parts.append(f'<path class="line {entry.css}{weight}" d="M{at:.1f} {baseline - 4:.1f}h18"{_dash(entry)}/>')
        parts.append(f'<text class="tick" x="{at + 22:.1f}" y="{baseline:.1f}">{escape(entry.name)}</text>')
        at += 36 + _CHARACTER * len(entry.name)
    return parts
