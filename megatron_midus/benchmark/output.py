"""A benchmark as tables, for the terminal and in Markdown."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from megatron_midus.benchmark.result import BenchmarkResult, Row, Section
from megatron_midus.benchmark.timing import Summary
from megatron_midus.report.machine import versions_text
from megatron_midus.report.table import MISSING, Cell, markdown_table, terminal_table, text_cells

_RATIO = "time / "
_MAX_WIDTH = 10_000


def print_result(result: BenchmarkResult, console: Console | None = None) -> None:
    """Machine, one table per section (ratios below it where there is no room beside), and what was left out."""
    # Wide enough for all columns when the output is a file.
    console = console or Console(width=None if Console().is_terminal else 170, highlight=False)
    console.print(f"{result.device_text}; {versions_text(result.machine)}")
    for section in result.sections:
        for table in section_tables(section, console):
            console.print()
            console.print(table)
        for note in section.notes:
            console.print(f"  not timed: {note}", style="dim")


def result_to_markdown(result: BenchmarkResult) -> str:
    """Machine, one table per section, and what was left out."""
    lines = [f"# Benchmark {result.kind}", "", f"{result.device_text}; {versions_text(result.machine)}"]
    for section in result.sections:
        lines += ["", f"## {section.title}: {section.description}", "", *markdown_table(*section_rows(section))]
        lines += [text for caption in section_captions(section) for text in ("", f"{caption}.")]
        lines += [text for note in section.notes for text in ("", f"not timed: {note}")]
    return "\n".join(lines) + "\n"


def section_tables(section: Section, console: Console) -> list[Table]:
    """Medians with quartiles; a ratio under 1 is faster than the baseline. Two tables where one is too wide for the console."""
    header, rows = section_rows(section)
    caption = "\n".join(section_captions(section)) or None
    title = f"{section.title}: {section.description}"
    whole = terminal_table(header, rows, title=title, caption=caption)
    # Measured for a console as it is, a table is never wider than that.
    if console.measure(whole, options=console.options.update(max_width=_MAX_WIDTH)).maximum <= console.width:
        return [whole]
    is_ratio = [name.startswith(_RATIO) for name in header]
    others, ratios = ([i for i, ratio in enumerate(is_ratio) if ratio == wanted or not i] for wanted in (False, True))
    parts = ((others, title, None), (ratios, f"{section.title}: ratios", caption))
    return [
        terminal_table([header[i] for i in part], [[row[i] for i in part] for row in rows], title=text, caption=below)
        for part, text, below in parts
    ]


def section_captions(section: Section) -> list[str]:
    """Ceilings of the machine, and how near parity came to its bounds."""
    captions = []
    if section.ceilings:
        captions.append(
            f"ceilings of this run: copy {section.ceilings.gigabytes_per_second:.1f} GB/s, "
            f"matrix product {section.ceilings.teraflops:.3g} TFLOP/s"
        )
    if section.checks:
        worst = max(section.checks, key=lambda check: check.error / check.allowed)
        captions.append(f"parity: {len(section.checks)} tensors within bounds, the nearest {worst}")
    return captions


def section_rows(section: Section) -> tuple[list[str], list[list[Cell]]]:
    """Header and a row per contender, with the columns that were measured."""
    baselines = [b for b in section.baselines if any(b in row.ratios for row in section.rows)]
    phases = list(section.rows[0].phases)
    has_memory = any(row.peak_bytes is not None for row in section.rows)
    has_rates = any(row.roofline_share is not None for row in section.rows)
    header = ["contender", *(f"{phase}, ms" for phase in phases)] + (["total, ms"] if len(phases) > 1 else [])
    speeds = list(section.rows[0].tokens_per_second)
    header += [f"{phase}, tokens/s" for phase in speeds]
    header += [f"{_RATIO}{baseline}" for baseline in baselines]
    header += ["peak, MB"] * has_memory + ["GB/s", "TFLOP/s", "roofline"] * has_rates
    rows = []
    for row in section.rows:
        texts = [row.name, *(_time(row.phases[phase]) for phase in phases)]
        texts += [_time(row.total)] if len(phases) > 1 else []
        texts += [f"{row.tokens_per_second[phase]:.1f}" for phase in speeds]
        texts += [_ratio(row.ratios.get(baseline)) for baseline in baselines]
        texts += ([_megabytes(row)] * has_memory) + (_rates(row) if has_rates else [])
        rows.append(text_cells(texts))
    return header, rows


def _time(summary: Summary) -> str:
    digits = 1 if summary.median >= 10 else 3
    spread = f"{summary.lower_quartile:.{digits}f}–{summary.upper_quartile:.{digits}f}"
    return f"{summary.median:.{digits}f} [{spread}]"


def _ratio(summary: Summary | None) -> str:
    if summary is None:
        return MISSING
    return f"{summary.median:.3f} [{summary.lower_quartile:.3f}–{summary.upper_quartile:.3f}]"


def _megabytes(row: Row) -> str:
    return MISSING if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.1f}"


def _rates(row: Row) -> list[str]:
    if row.roofline_share is None:
        return [MISSING] * 3
    return [f"{row.gigabytes_per_second:.1f}", f"{row.teraflops:.3g}", f"{100 * row.roofline_share:.1f} %"]
