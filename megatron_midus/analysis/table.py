"""The analysis as a short text for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_midus.analysis import page_retrieval, page_sensitivity, page_usage
from megatron_midus.analysis.heads import HeadImportance
from megatron_midus.analysis.page import loss_sentence
from megatron_midus.analysis.page_heads import MILLI
from megatron_midus.analysis.page_slots import visible
from megatron_midus.analysis.report import Cell
from megatron_midus.analysis.slots import BlockSlots
from megatron_midus.analysis.study import Study


def print_study(study: Study) -> None:
    """Notes, and one table per part."""
    from rich.console import Console

    # No narrower than the tables, when the output is a file.
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    for note in study.notes:
        console.print(f"note: {note}", markup=False, highlight=False)
    console.print(f"{study.name}: {loss_sentence(study)}", markup=False, highlight=False)
    for title, header, rows, num_texts in _tables(study):
        console.print(_table(title, header, rows, num_texts))


def _tables(study: Study) -> list[tuple[str, Sequence[str], list[list[Cell]], int]]:
    tables: list[tuple[str, Sequence[str], list[list[Cell]], int]] = []
    if study.usage is not None:
        rows = [page_usage.usage_row(block, entry) for block, entry in study.usage.items()]
        tables.append(("slot usage", page_usage.HEADER, rows, 0))
    if study.heads is not None:
        header = ("block", "most important memory head", "mean of its heads", "mean of the attention heads beside", "whole block")  # fmt: skip
        tables.append(("rise of the loss without a head, mnat/token", header, _head_rows(study.heads), 0))
    if study.retrieval is not None:
        rows = page_retrieval.exchange_rows(study.retrieval)
        tables.append(("fixed retrieval", page_retrieval.HEADER, rows, 2))
        whole = [r for r in page_retrieval.rank_rows(study.retrieval, study.variant) if not r[1].text.endswith("]")]
        tables.append(("ranks", page_retrieval.RANK_HEADER, whole, 2))
    if study.slots is not None:
        header = ("block", "head", "slot", "reads", "bits", "tokens")
        tables.append(("most selective slots", header, _slot_rows(study.slots), 0))
    if study.sensitivity is not None:
        rows = page_sensitivity.sensitivity_rows(study.sensitivity)
        tables.append(("without retraining", page_sensitivity.HEADER, rows, 1))
    return tables


def _head_rows(heads: HeadImportance) -> list[list[Cell]]:
    rows = []
    for block, found in heads.memory.items():
        best = max(range(len(found)), key=lambda head: found[head].value)
        beside = heads.attention[block]
        means = [
            "–" if not group else f"{sum(e.value for e in group) / len(group) * MILLI:+.2f}"
            for group in (found, beside)
        ]
        texts = [
            str(block),
            f"{best}: {found[best].text(scale=MILLI, digits=2, sign='+')}",
            *means,
            heads.blocks[block].text(scale=MILLI, digits=2, sign="+"),
        ]
        rows.append([Cell(text) for text in texts])
    rows.append([Cell(t) for t in ("all", "", "", "", heads.all_memories.text(scale=MILLI, digits=2, sign="+"))])
    return rows


def _slot_rows(slots: dict[int, BlockSlots]) -> list[list[Cell]]:
    return [
        [
            Cell(text)
            for text in (
                str(block),
                str(slot.head),
                str(slot.slot),
                f"{slot.reads:,}",
                f"{slot.information:.2f}",
                "  ".join(f"{visible(token)} {share:.0%}" for token, share in slot.tokens[:4]),
            )
        ]
        for block, entry in slots.items()
        for slot in entry.most_selective[:2]
    ]


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[Cell]], num_texts: int) -> object:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index < num_texts or name == "tokens" else "right", overflow="fold")
    for row, following in zip(rows, [*rows[1:], None]):
        ends = following is None or (num_texts > 0 and row[0].text != following[0].text)
        # Text: what tokens hold may look like rich's markup.
        table.add_row(*(Text(cell.text) for cell in row), end_section=ends)
    return table
