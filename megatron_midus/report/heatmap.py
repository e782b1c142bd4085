"""Heat maps as inline SVG. Cells are a series' colour over the page's ground, so they suit light and dark alike."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_WIDTH = 680
_CHARACTER = 6.6
_STRONGEST = 0.62  # opacity of the largest value; more would hide the numbers on it
_POSITIVE, _NEGATIVE = 0, 1  # styles of report/page.py


def heat_map(
    values: Sequence[Sequence[float | None]],
    *,
    row_labels: Sequence[str],
    column_labels: Sequence[str] | None = None,
    x_label: str,
    limit: float | None = None,
    texts: Sequence[Sequence[str]] | None = None,
    is_faint: Sequence[Sequence[bool]] | None = None,
    titles: Sequence[Sequence[str]] | None = None,
    title: str = "",
) -> str:
    """One heat map.

    Args:
        values: by row; ``None`` leaves a cell empty. Negative ones have another colour.
        row_labels: one per row.
        column_labels: one per column; ``None`` = none.
        x_label: what the columns are.
        limit: value of the strongest colour; the largest magnitude when absent. Maps with one limit compare.
        texts: written into the cells.
        is_faint: texts that stand back.
        titles: shown when the pointer rests on a cell.
        title: said to screen readers.
    """
    if not values or not values[0]:
        return '<p class="note">No data.</p>'
    columns = max(map(len, values))
    limit = limit or max((abs(v) for row in values for v in row if v is not None), default=0.0) or 1.0
    left = 12 + _CHARACTER * max(map(len, row_labels))
    width = min((_WIDTH - left - 10) / columns, 74.0)
    height = 26.0 if texts else max(7.0, min(22.0, 220.0 / len(values)))
    parts = []
    for y, row in enumerate(values):
        top = 6 + y * height
        if height >= 10 or y % 4 == 0:
            parts.append(_text(left - 6, top + height / 2 + 4, row_labels[y], "end"))
        for x, value in enumerate(row):
            cell = (left + x * width, top, width, height)
            note = titles[y][x] if titles else ""
            parts.append(_cell(cell, value, limit, note))
            if texts and value is not None:
                css = " faint" if is_faint and is_faint[y][x] else ""
                parts.append(_text(cell[0] + width / 2, top + height / 2 + 4, texts[y][x], "middle", css))
    bottom = 6 + len(values) * height
    for x, name in enumerate(column_labels or ()):
        parts.append(_text(left + (x + 0.5) * width, bottom + 15, name, "middle"))
    bottom += 18 if column_labels else 2
    parts.append(_text(left, bottom + 16, x_label, "start"))
    head = f'<svg viewBox="0 0 {_WIDTH} {bottom + 24:.0f}" role="img" aria-label="{escape(title or x_label)}">'
    return "\n".join([head, *filter(None, parts), "</svg>"])


def _cell(cell: tuple[float, float, float, float], value: float | None, limit: float, note: str) -> str:
    opacity = 0.0 if value is None else min(1.0, abs(value) / limit) * _STRONGEST
    if opacity < 0.01 and not note:
        return ""
    x, y, width, height = cell
    css = _NEGATIVE if value is not None and value < 0 else _POSITIVE
    gap = 1.0 if width > 8 else 0.0
    shape = f'x="{x:.1f}" y="{y:.1f}" width="{width - gap:.2f}" height="{height - gap:.1f}"'
    inner = f"<title>{escape(note)}</title>" if note else ""
    return f'<rect class="dot s{css}" {shape} fill-opacity="{opacity:.3f}">{inner}</rect>'


def _text(x: float, y: float, text: str, anchor: str, css: str = "") -> str:
    return f'<text class="tick{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def binned(row: Sequence[float], columns: int) -> list[float]:
    """Means over at most ``columns`` stretches of a row."""
    if len(row) <= columns:
        return list(row)
    edges = [round(i * len(row) / columns) for i in range(columns + 1)]
    return [sum(row[start:stop]) / (stop - start) for start, stop in zip(edges, edges[1:])]
