"""A self-contained HTML page of text, tables and charts: no network, light and dark, tables that sort by a click."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from megatron_midus.report.table import Cell

# Series colours that stay apart for colour-blind readers (Okabe and Ito 2008, then Tol 2021), for light and for dark ground.
_LIGHT = ("#0072b2", "#d55e00", "#009e73", "#b3448c", "#a87a00", "#2a9fd6", "#444444", "#882255", "#5c7f1e", "#332288", "#aa4455", "#11776b")  # fmt: skip
_DARK = ("#56b4e9", "#ff8a3d", "#2fd0a0", "#e8a0cc", "#f0c53d", "#9bd7ff", "#c8c8c8", "#e07ba6", "#a9d15a", "#a79bf0", "#f08a9a", "#5fd3c4")  # fmt: skip

_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --text: #1c1e21; --faint: #5b6068; --line: #d9dce1; --row: #f5f6f8; --best: #0a6b3d; COLOURS_LIGHT }
@media (prefers-color-scheme: dark) {
  :root { --ground: #15171a; --text: #e6e7e9; --faint: #a2a8b0; --line: #363a40; --row: #1e2126; --best: #6fdc9f; COLOURS_DARK }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 76rem; background: var(--ground); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { font-size: 1.55rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
p, li { max-width: 52rem; }
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

    def bullets(self, texts: Sequence[str]) -> None:
        if texts:
            self._parts.append("<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[Cell]], *, text_columns: int = 1) -> None:
        """A sortable table; the first ``text_columns`` are set flush left."""

        def css(column: int, *more: str) -> str:
            names = [*(["text"] if column < text_columns else []), *more]
            return f' class="{" ".join(names)}"' if names else ""

        head = "".join(
            f'<th scope="col"{css(i)}><button type="button">{escape(title)}</button></th>'
            for i, title in enumerate(header)
        )
        body = []
        for row in rows:
            cells = (
                f'<td{css(i, *(["best"] if cell.is_best else []))} data-value="{_sort_value(cell)}">{escape(cell.text)}</td>'
                for i, cell in enumerate(row)
            )
            body.append(f"<tr>{''.join(cells)}</tr>")
        self._parts.append(
            f'<div class="scroll"><table class="sortable"><thead><tr>{head}</tr></thead>\n'
            f"<tbody>{chr(10).join(body)}</tbody></table></div>"
        )

    def charts(self, charts: Sequence[tuple[str, str]]) -> None:
        """Charts of ``report/charts.py`` side by side, each with its caption."""
        figures = (f"<figure>{svg}<figcaption>{escape(text)}</figcaption></figure>" for svg, text in charts)
        self._parts.append(f'<div class="charts">{"".join(figures)}</div>')

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


def _sort_value(cell: Cell) -> str:
    if cell.value is None:
        return ""
    return escape(repr(cell.value) if isinstance(cell.value, float) else str(cell.value))


def _style() -> str:
    def variables(colours: Sequence[str]) -> str:
        return " ".join(f"--s{i}: {colour};" for i, colour in enumerate(colours))

    series = "\n".join(
        f".line.s{i} {{ stroke: var(--s{i}); }} .dot.s{i} {{ fill: var(--s{i}); }}" for i in range(len(_LIGHT))
    )
    style = _STYLE.replace("COLOURS_LIGHT", variables(_LIGHT)).replace("COLOURS_DARK", variables(_DARK))
    return style.replace("SERIES", series)
