"""A self-contained HTML page of text, tables and charts: no network, light and dark, tables that sort by a click."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from megatron_midus.report.table import Cell

# Series colours that stay apart for colour-blind readers (Okabe and Ito 2008, then Tol 2021), for light and for dark ground.
_LIGHT = ("#0072b2", "#d55e00", "#009e73", "#b3448c", "#a87a00", "#2a9fd6", "#444444", "#882255", "#5c7f1e", "#332288", "#aa4455", "#11776b")  # fmt: skip
_DARK = ("#56b4e9", "#ff8a3d", "#2fd0a0", "#e8a0cc", "#f0c53d", "#9bd7ff", "#c8c8c8", "#e07ba6", "#a9d15a", "#a79bf0", "#f08a9a", "#5fd3c4")  # fmt: skip

_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --text: #1c1e21; --faint: #5b6068; --line: #d9dce1; --row: #f5f6f8; --best: #0a6b3d; --other: #b9bec6; COLOURS_LIGHT }
@media (prefers-color-scheme: dark) {
  :root { --ground: #15171a; --text: #e6e7e9; --faint: #a2a8b0; --line: #363a40; --row: #1e2126; --best: #6fdc9f; --other: #565c66; COLOURS_DARK }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 76rem; background: var(--ground); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { font-size: 1.55rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
p, li { max-width: 52rem; }
.lead { font-size: 1.12rem; line-height: 1.45; font-weight: 500; margin: .9rem 0 .4rem; max-width: 58rem; }
.note, figcaption { color: var(--faint); font-size: .88rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { vertical-align: bottom; white-space: normal; color: var(--faint); font-weight: 600; }
th button { all: unset; cursor: pointer; }
th button:focus-visible { outline: 2px solid currentColor; outline-offset: 2px; }
th[aria-sort=ascending] button::after { content: " \\25B2"; }
th[aria-sort=descending] button::after { content: " \\25BC"; }
th.text, td.text { text-align: left; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--ground); }
tbody tr:hover, tbody tr:hover td { background: var(--row); }
td.faint { color: var(--faint); }
.chip { display: inline-block; width: .62rem; height: .62rem; border-radius: 50%; margin-right: .5rem; background: var(--other); }
th button[title] { text-decoration: underline dotted; text-underline-offset: .2em; }
td.best { color: var(--best); font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(32rem, 100%), 1fr)); gap: 1.2rem 1.6rem; margin: .9rem 0; }
figure { margin: 0; }
figcaption { margin-top: .2rem; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--text); font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
svg .tick { font-size: 11.5px; }
svg .faint { fill: var(--faint); }
.grid { stroke: var(--line); stroke-width: 1; }
.axis { stroke: var(--faint); stroke-width: 1; fill: none; }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.thin { stroke-width: 1.2; }
.line.strong { stroke-width: 2.6; }
.line.other { stroke: var(--other); stroke-width: 1.4; }
.dot.other { fill: var(--other); }
pre { overflow-x: auto; padding: .7rem .9rem; background: var(--row); font-size: .8rem; border-radius: 6px; }
details > summary { cursor: pointer; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
.slot { border-top: 1px solid var(--line); padding: .45rem 0; font-size: .86rem; }
.slot code { background: var(--row); border-radius: 4px; padding: 0 .3em; margin-right: .5em; white-space: pre; }
.slot .context { font-family: ui-monospace, "Liberation Mono", monospace; font-size: .8rem; overflow-wrap: anywhere; }
.slot .context .note { font-size: inherit; }
.slot mark { background: color-mix(in srgb, var(--s0) 35%, transparent); color: inherit; border-radius: 3px; white-space: pre-wrap; }
SERIES
@media print { th button::after { content: none; } }
"""

# Sorts a table by the column whose heading is clicked: numbers by value, what is missing last.
_SCRIPT = """
document.querySelectorAll("table.sortable").forEach(function (table) {
  table.querySelectorAll("th").forEach(function (head, column) {
    head.querySelector("button").addEventListener("click", function () {
      var down = head.getAttribute("aria-sort") === "ascending";
      table.querySelectorAll("th").forEach(function (other) { other.removeAttribute("aria-sort"); });
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      var body = table.tBodies[0];
      Array.from(body.rows).sort(function (a, b) {
        var x = a.cells[column].dataset.value, y = b.cells[column].dataset.value;
        if (x === "" || y === "") { return (x === "") - (y === ""); }
        var order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
        return down ? -order : order;
      }).forEach(function (row) { body.appendChild(row); });
    });
  });
});
"""


class Page:
    """Collects sections; ``html()`` is the whole document.

    Args:
        title: heading and name of the window.
        subtitle: a line below it.
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title = title
        self._parts = [f"<h1>{escape(title)}</h1>"]
        if subtitle:
            self._parts.append(f'<p class="note">{escape(subtitle)}</p>')

    def heading(self, text: str) -> None:
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def subheading(self, text: str) -> None:
        self._parts.append(f"<h3>{escape(text)}</h3>")

    def fragment(self, html: str) -> None:
        """Markup as it is; whoever made it has escaped its texts."""
        self._parts.append(html)

    def paragraph(self, text: str, *, is_note: bool = False) -> None:
        self._parts.append(f'<p class="note">{escape(text)}</p>' if is_note else f"<p>{escape(text)}</p>")

    def lead(self, text: str) -> None:
        """The sentence that the page is about."""
        self._parts.append(f'<p class="lead">{escape(text)}</p>')

    def bullets(self, texts: Sequence[str]) -> None:
        if texts:
            self._parts.append("<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>")

    def table(
        self,
        header: Sequence[str],
        rows: Sequence[Sequence[Cell]],
        *,
        text_columns: int = 1,
        hints: Mapping[str, str] | None = None,
    ) -> None:
        """A sortable table; the first ``text_columns`` are set flush left.

        Args:
            hints: by heading, what the column holds; shown when the pointer rests on it.
        """
        head = "".join(
            f'<th scope="col"{_css(["text"] * (i < text_columns))}>{_heading(title, (hints or {}).get(title))}</th>'
            for i, title in enumerate(header)
        )
        marks = any(cell.style is not None for row in rows for cell in row)
        body = []
        for row in rows:
            cells = (_data(cell, i < text_columns, mark=marks and i == 0) for i, cell in enumerate(row))
            body.append(f"<tr>{''.join(cells)}</tr>")
        self._parts.append(
            f'<div class="scroll"><table class="sortable"><thead><tr>{head}</tr></thead>\n'
            f"<tbody>{chr(10).join(body)}</tbody></table></div>"
        )

    def charts(self, charts: Sequence[tuple[str, str]]) -> None:
        """Charts of ``report/charts.py`` side by side, each with its caption."""
        figures = (f"<figure>{svg}<figcaption>{escape(text)}</figcaption></figure>" for svg, text in charts)
        self._parts.append(f'<div class="charts">{"".join(figures)}</div>')

    def details(self, summary: str, texts: Sequence[str]) -> None:
        """A list that opens by a click."""
        if texts:
            items = "".join(f"<li>{escape(text)}</li>" for text in texts)
            self._parts.append(f"<details><summary>{escape(summary)}</summary><ul>{items}</ul></details>")

    def code(self, summary: str, text: str) -> None:
        """Text that opens by a click, set as it is."""
        self._parts.append(f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>")

    def html(self) -> str:
        parts = "\n".join(self._parts)
        return (
            f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<meta name="color-scheme" content="light dark">\n<title>{escape(self.title)}</title>\n'
            f"<style>{_style()}</style>\n</head>\n<body>\n<main>\n{parts}\n</main>\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
        )


def _css(names: Sequence[str]) -> str:
    return f' class="{" ".join(names)}"' if names else ""


def _heading(title: str, hint: str | None) -> str:
    told = f' title="{escape(hint)}"' if hint else ""
    return f'<button type="button"{told}>{escape(title)}</button>'


def _data(cell: Cell, is_text: bool, *, mark: bool) -> str:
    """One ``td``; with ``mark`` a dot in the colour of its series, grey for one without."""
    names = ["text"] * is_text + ["best"] * cell.is_best + ["faint"] * cell.is_faint
    colour = "" if cell.style is None else f' style="background: var(--s{cell.style % len(_LIGHT)})"'
    chip = f'<span class="chip"{colour}></span>' if mark else ""
    return f'<td{_css(names)} data-value="{_sort_value(cell)}">{chip}{escape(cell.text)}</td>'


def _sort_value(cell: Cell) -> str:
    if cell.value is None:
        return ""
    return escape(repr(cell.value) if isinstance(cell.value, float) else str(cell.value))


def standalone_svg(svg: str) -> str:
    """A chart of ``report/charts.py`` as a file of its own, with its colours for light and for dark."""
    return (
        svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(
            ">", f"><style>{_style()}</style>", 1
        )
        + "\n"
    )


def _style() -> str:
    def variables(colours: Sequence[str]) -> str:
        return " ".join(f"--s{i}: {colour};" for i, colour in enumerate(colours))

    series = "\n".join(
        f".line.s{i} {{ stroke: var(--s{i}); }} .dot.s{i} {{ fill: var(--s{i}); }}" for i in range(len(_LIGHT))
    )
    style = _STYLE.replace("COLOURS_LIGHT", variables(_LIGHT)).replace("COLOURS_DARK", variables(_DARK))
    return style.replace("SERIES", series)
