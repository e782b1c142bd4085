"""Tables in Markdown and on the terminal: well formed whatever the cells hold."""

import io

from rich.console import Console

from megatron_midus.report.table import Cell, markdown_table, number_cell, terminal_table, text_cells


def test_markdown_rows_survive_bars_and_line_breaks():
    header, rule, row = markdown_table(["a", "b", "c"], [text_cells(["x|y", "two\nlines", "1"])], text_columns=2)
    assert rule == "|---|---|---:|"
    assert row == "| x\\|y | two\\nlines | 1 |"
    assert header == "| a | b | c |"


def test_a_missing_number_is_a_dash_that_sorts_last():
    assert number_cell(1234.5, "{:,.1f}") == Cell("1,234.5", 1234.5)
    assert (
        number_cell(None, "{:,.1f}") == Cell("–", None)
        and number_cell(None, "{}", missing="all zero").text == "all zero"
    )


def test_the_terminal_shows_brackets_as_they_are():
    """Quartiles in brackets would be markup to rich."""
    text = io.StringIO()
    table = terminal_table(["name", "ms"], [text_cells(["[bold]", "1.0 [0.9–1.1]"])], title="of [a]", caption="see [b]")
    Console(file=text, width=80).print(table)
    for expected in ("[bold]", "1.0 [0.9–1.1]", "of [a]", "see [b]"):
        assert expected in text.getvalue()
