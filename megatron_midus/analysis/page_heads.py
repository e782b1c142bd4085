"""Section of the report: what single heads are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_midus.analysis.heads import HeadImportance
from megatron_midus.analysis.study import Study
from megatron_midus.analysis.windows import Estimate
from megatron_midus.report.charts import Series, chart
from megatron_midus.report.heatmap import heat_map
from megatron_midus.report.page import Page
from megatron_midus.report.table import Cell

MILLI = 1000.0


def add(page: Page, study: Study, heads: HeadImportance) -> None:
    page.heading("Head importance")
    page.paragraph(
        "Rise of the loss when one head is silenced: a memory head reads nothing, an attention head of the Transformer "
        "block beside it (the one before, where there is one) hands nothing to its output projection."
    )
    every = [e for rows in (heads.memory, heads.attention) for row in rows.values() for e in row]
    limit = max((abs(e.value) for e in every), default=0.0) * MILLI
    names = {block: f"block {block}" for block in heads.memory}
    beside = {b: f"block {heads.neighbours[b]} (beside {b})" for b, row in heads.attention.items() if row}
    attention = {block: heads.attention[block] for block in beside}
    how = "mnat/token; faint numbers are within two standard errors of zero. Both maps have one colour scale; negative = the text is easier without the head."  # fmt: skip
    page.charts(
        [
            (_map(heads.memory, names, "memory head", limit, "Memory heads"), f"Memory heads, {how}"),
            (_map(attention, beside, "attention head", limit, "Attention heads"), f"Attention heads of the Transformer block beside each Memory block, {how}"),
            (_ranked(heads), "All heads of either kind, most important first, with standard errors: compare the heights, and where the curves meet zero."),
        ]
    )  # fmt: skip
    page.subheading("Whole blocks")
    page.table(("silenced", "rise of the loss, mnat/token"), whole_rows(heads))
    page.paragraph(
        "If a block's heads were independent, its rise would be the sum of theirs; less than that means that heads stand "
        "in for one another, more that they need each other.",
        is_note=True,
    )


def whole_rows(heads: HeadImportance) -> list[list[Cell]]:
    rows = []
    for block, rise in heads.blocks.items():
        together = sum(head.value for head in heads.memory[block]) * MILLI
        name = f"block {block} (sum of its heads one by one: {together:.2f})"
        rows.append([Cell(name, block), Cell(rise.text(scale=MILLI, digits=2, sign="+"), rise.value)])
    every = heads.all_memories
    rows.append([Cell("all Memory blocks", 1e9), Cell(every.text(scale=MILLI, digits=2, sign="+"), every.value)])
    return rows


def _map(
    heads: Mapping[int, Sequence[Estimate]], names: Mapping[int, str], x_label: str, limit: float, title: str
) -> str:
    rows = list(heads.values())
    columns = max(map(len, rows), default=0)
    has_texts = columns <= 12
    return heat_map(
        [[e.value * MILLI for e in row] for row in rows],
        row_labels=list(names.values()),
        column_labels=[str(h) for h in range(columns)] if columns <= 32 else None,
        x_label=f"{x_label}; rise of the loss, mnat/token",
        limit=limit,
        texts=[[f"{e.value * MILLI:.2f}" for e in row] for row in rows] if has_texts else None,
        is_faint=[[not e.is_clear for e in row] for row in rows],
        titles=[[f"head {h}: {e.text(scale=MILLI, digits=3)} mnat" for h, e in enumerate(row)] for row in rows],
        title=title,
    )


def _ranked(heads: HeadImportance) -> str:
    series = []
    # Two Memory blocks may share a neighbour; its heads count once.
    attention = {heads.neighbours[b]: row for b, row in heads.attention.items()}
    for style, (name, rows) in enumerate((("memory heads", heads.memory), ("attention heads beside", attention))):
        ordered = sorted((e for row in rows.values() for e in row), key=lambda e: -e.value)
        spread = [(e.stderr or 0.0) * MILLI for e in ordered]
        places = [float(i + 1) for i in range(len(ordered))]
        series.append(Series(name, places, [e.value * MILLI for e in ordered], style, spread))
    return chart(series, x_label="rank", y_label="rise of the loss, mnat/token", title="Heads by importance")
