"""Cells and the tables made of them: Markdown, and the terminal. ``page.py`` has the one for HTML."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

MISSING = "–"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One entry of a table.

    Attributes:
        text: as shown.
        value: what it sorts by: a number or a text; ``None`` = missing, always last.
        is_best: whether it stands out.
        is_faint: whether it stands back.
        style: which series of the charts the row is; a page marks it with that colour.
    """

    text: str
    value: float | str | None = None
    is_best: bool = False
    is_faint: bool = False
    style: int | None = None


def text_cells(texts: Sequence[str]) -> list[Cell]:
    """A row that nobody sorts."""
    return [Cell(text) for text in texts]


def number_cell(value: float | None, form: str, *, missing: str = MISSING) -> Cell:
    """``value`` in a format such as ``{:,.2f}``; a dash, or ``missing``, for none."""
    return Cell(missing) if value is None else Cell(form.format(value), float(value))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Cell]], *, text_columns: int = 1) -> list[str]:
    """Lines of a table; the first ``text_columns`` are set flush left."""
    rule = "|" + "---|" * text_columns + "---:|" * (len(header) - text_columns)
    return [_line(header), rule, *(_line([cell.text for cell in row]) for row in rows)]


def _line(texts: Sequence[str]) -> str:
    # What tokens or names hold may look like the bar between two columns, or end the row.
    return "| " + " | ".join(text.replace("|", "\\|").replace("\n", "\\n") for text in texts) + " |"


def terminal_table(
    header: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    *,
    text_columns: int = 1,
    group_by: int | None = None,
    title: str | None = None,
    caption: str | None = None,
) -> Table:
    """The same as a table of rich.

    Args:
        text_columns: so many columns are set flush left.
        group_by: a column; a line is drawn where its text changes.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title and Text(title), caption=caption and Text(caption), caption_justify="left")
    for column, heading in enumerate(header):
        table.add_column(Text(heading), justify="left" if column < text_columns else "right", overflow="fold")
    for index, row in enumerate(rows):
        following = rows[index + 1] if index + 1 < len(rows) else None
        ends = group_by is not None and (following is None or row[group_by].text != following[group_by].text)
        table.add_row(
            *(Text(cell.text, "dim" if cell.is_faint else "bold" if cell.is_best else "") for cell in row),
            end_section=ends,
        )
    return table
