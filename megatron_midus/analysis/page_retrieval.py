"""Section of the report: what head-specific projections add while retrieval is fixed, and ranks."""

from __future__ import annotations

from megatron_midus.analysis.algebra import Rank
from megatron_midus.analysis.page_heads import MILLI
from megatron_midus.analysis.retrieval import SHARINGS, BlockStructure, Exchange, Retrieval
from megatron_midus.analysis.study import Study
from megatron_midus.report.charts import Series, chart
from megatron_midus.report.heatmap import heat_map
from megatron_midus.report.page import Page
from megatron_midus.report.table import Cell, number_cell

HEADER = ("block", "exchanged", "rise of the loss, mnat/token", "of the block's worth", "error of the output")


def add(page: Page, study: Study, retrieval: Retrieval) -> None:
    page.heading("Fixed retrieval: what heads have of their own")
    what = "projection W[h]" if study.variant == "hive" else "table V[h]"
    if retrieval.reason is None:
        page.paragraph(
            f"Slots and weights are held as the model chose them, and only each head's {what} is exchanged. What is "
            "fitted is fitted on every other window of the text; the loss is that of the windows between."
        )
        page.bullets([f"{kind}: {text}" for kind, text in SHARINGS.items()])
    else:
        page.paragraph(f"Nothing to exchange: {retrieval.reason}. Only silencing whole blocks is measured.")
    page.table(HEADER, exchange_rows(retrieval), text_columns=2)
    page.paragraph(
        "Of the block's worth: the rise over that of silencing the block. Near 0 a shared one would do; near 100 % the "
        "block's use lies in what heads have of their own; above, a wrong one is worse than none. It is left out where "
        "the block's worth is within two standard errors of zero. Error of the output: ‖m′ − m‖²/‖m‖² over tokens and "
        "heads, before gate and mixer.",
        is_note=True,
    )
    page.charts([_exchange_chart(retrieval)])
    _add_ranks(page, study, retrieval)


def exchange_rows(retrieval: Retrieval) -> list[list[Cell]]:
    """Cells that fit ``HEADER``."""
    rows = []
    for block, entry in [*retrieval.exchanges.items(), (None, retrieval.all_blocks)]:
        for kind, exchange in entry.items():
            worth = entry["off"].rise
            share = exchange.rise.value / worth.value if worth.is_clear and worth.value > 0 else None
            rows.append(
                [
                    Cell("all" if block is None else str(block), 1e9 if block is None else block),
                    Cell(kind, kind),
                    Cell(exchange.rise.text(scale=MILLI, digits=2, sign="+"), exchange.rise.value),
                    number_cell(share, "{:.0%}"),
                    number_cell(exchange.error, "{:.1%}"),
                ]
            )
    return rows


def _exchange_chart(retrieval: Retrieval) -> tuple[str, str]:
    kinds: dict[str, list[tuple[int, Exchange]]] = {}
    for block, entry in retrieval.exchanges.items():
        for kind, exchange in entry.items():
            kinds.setdefault(kind, []).append((block, exchange))
    series = [
        Series(
            kind,
            # Side by side, so that error bars do not cover each other.
            [block + 0.08 * (style - 1.5) for block, _ in found],
            [exchange.rise.value * MILLI for _, exchange in found],
            style,
            [(exchange.rise.stderr or 0.0) * MILLI for _, exchange in found],
        )
        for style, (kind, found) in enumerate(kinds.items())
    ]
    figure = chart(series, x_label="Memory block", y_label="rise of the loss, mnat/token", title="Exchanges by block")
    return figure, "The height of a point over zero is what the exchange costs; “off” is what the whole block is worth."


# -- ranks -------------------------------------------------------------------------------------------------------
RANK_HEADER = ("block", "matrix", "effective rank", "of noise", "at most", "stable rank")


def _add_ranks(page: Page, study: Study, retrieval: Retrieval) -> None:
    page.subheading("Ranks")
    page.table(RANK_HEADER, rank_rows(retrieval, study.variant), text_columns=2)
    page.paragraph(
        "Effective rank: exp of the entropy of the normalised singular values, to be read against that of Gaussian noise "
        "of the same shape; W starts as such noise. Far below noise: directions are idle, and d_l could be smaller. Near "
        "noise: nothing says that d_l is too large, nor that W has learnt much. Stable rank: ‖A‖²F/‖A‖²₂; near 1, one "
        "direction carries nearly all.",
        is_note=True,
    )
    charts = []
    if any(entry.projections for entry in retrieval.structures.values()):
        charts.append(_head_ranks(retrieval, "W" if study.variant == "hive" else "V"))
    charts.append(_spectra(retrieval, "values", "Value bank, rows that the text read"))
    if any(entry.stacked for entry in retrieval.structures.values()):
        charts.append(_spectra(retrieval, "stacked", "Projections of all heads side by side"))
    charts.append(_spectra(retrieval, "table", "Whole table: what each slot holds for all heads"))
    page.charts(charts)


def rank_rows(retrieval: Retrieval, variant: str) -> list[list[Cell]]:
    """Cells that fit ``RANK_HEADER``."""
    rows = []
    for block, structure in retrieval.structures.items():
        for name, rank in _named_ranks(structure, variant):
            rows.append(
                [
                    Cell(str(block), block),
                    Cell(name, name),
                    number_cell(rank.effective, "{:.1f}", missing="all zero"),
                    number_cell(rank.random, "{:.1f}"),
                    Cell(str(rank.full), rank.full),
                    number_cell(rank.stable, "{:.1f}", missing="all zero"),
                ]
            )
    return rows


def _named_ranks(structure: BlockStructure, variant: str) -> list[tuple[str, Rank]]:
    named = []
    if structure.stacked is not None:
        named.append(("W of all heads side by side", structure.stacked))
    named.append(("V, rows that were read", structure.values))
    named.append(("V W, the whole table" if variant == "hive" else "the whole table", structure.table))
    return named


def _head_ranks(retrieval: Retrieval, letter: str) -> tuple[str, str]:
    ranks = {f"block {block}": entry.projections for block, entry in retrieval.structures.items()}
    heads, first = len(next(iter(ranks.values()))), next(iter(ranks.values()))[0]
    values = [[rank.effective or 0.0 for rank in row] for row in ranks.values()]
    figure = heat_map(
        values,
        row_labels=list(ranks),
        column_labels=[str(h) for h in range(heads)] if heads <= 32 else None,
        x_label="memory head",
        limit=float(first.full),
        texts=[[f"{v:.1f}" for v in row] for row in values] if heads <= 12 else None,
        titles=[[f"head {h}: {v:.2f}" for h, v in enumerate(row)] for row in values],
        title=f"Effective rank of {letter}[h]",
    )
    return (
        figure,
        f"Effective rank of {letter}[h] of each head, at most {first.full}; noise of that shape has {first.random:.1f}.",
    )


def _spectra(retrieval: Retrieval, field: str, text: str) -> tuple[str, str]:
    series = []
    for style, (block, structure) in enumerate(retrieval.structures.items()):
        rank: Rank = getattr(structure, field)
        places = [float(i + 1) for i in range(len(rank.spectrum))]
        series.append(Series(f"block {block}", places, rank.spectrum, style))
    figure = chart(series, x_label="singular value", y_label="over the largest", title=text)
    return figure, f"{text}: singular values over the largest. A curve that drops at once means few directions in use; a flat one that all are."  # fmt: skip
