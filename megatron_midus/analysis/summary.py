"""The analysis as a short Markdown text: for the terminal, and for where a page cannot go."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_midus.analysis import page_retrieval, page_sensitivity, page_usage
from megatron_midus.analysis.heads import HeadImportance
from megatron_midus.analysis.page_heads import MILLI
from megatron_midus.analysis.page_slots import visible
from megatron_midus.analysis.slots import BlockSlots
from megatron_midus.analysis.study import Study
from megatron_midus.analysis.study_page import loss_sentence
from megatron_midus.report.table import MISSING, Cell, markdown_table, text_cells


def to_markdown(study: Study) -> str:
    """Notes, and one table per part; what the page says in figures is not here."""
    lines = [f"# What the memory of {study.name} learnt", "", loss_sentence(study)]
    if study.notes:
        lines += ["", *(f"- {note}" for note in study.notes)]
    for title, header, rows, num_texts in _tables(study):
        lines += ["", f"## {title}", "", *markdown_table(header, rows, text_columns=num_texts)]
    return "\n".join(lines) + "\n"


def _tables(study: Study) -> list[tuple[str, Sequence[str], list[list[Cell]], int]]:
    tables: list[tuple[str, Sequence[str], list[list[Cell]], int]] = []
    if study.usage is not None:
        rows = [page_usage.usage_row(block, entry) for block, entry in study.usage.items()]
        tables.append(("Slot usage", page_usage.HEADER, rows, 0))
    if study.heads is not None:
        header = ("block", "most important memory head", "mean of its heads", "mean of the attention heads beside", "whole block")  # fmt: skip
        tables.append(
            ("Head importance: rise of the loss without a head, mnat/token", header, _head_rows(study.heads), 0)
        )
    if study.retrieval is not None:
        rows = page_retrieval.exchange_rows(study.retrieval)
        tables.append(("Fixed retrieval: what heads have of their own", page_retrieval.HEADER, rows, 2))
        rows = page_retrieval.rank_rows(study.retrieval, study.variant)
        tables.append(("Ranks", page_retrieval.RANK_HEADER, rows, 2))
    if study.slots is not None:
        header = ("block", "head", "slot", "reads", "bits", "tokens")
        tables.append(("Most selective slots", header, _slot_rows(study.slots), 0))
    if study.sensitivity is not None:
        rows = page_sensitivity.sensitivity_rows(study.sensitivity)
        tables.append(("Sensitivity, without retraining", page_sensitivity.HEADER, rows, 1))
    return tables


def _head_rows(heads: HeadImportance) -> list[list[Cell]]:
    rows = []
    for block, found in heads.memory.items():
        best = max(range(len(found)), key=lambda head: found[head].value)
        beside = heads.attention[block]
        means = [
            MISSING if not group else f"{sum(e.value for e in group) / len(group) * MILLI:+.2f}"
            for group in (found, beside)
        ]
        texts = [
            str(block),
            f"{best}: {found[best].text(scale=MILLI, digits=2, sign='+')}",
            *means,
            heads.blocks[block].text(scale=MILLI, digits=2, sign="+"),
        ]
        rows.append(text_cells(texts))
    rows.append(text_cells(["all", "", "", "", heads.all_memories.text(scale=MILLI, digits=2, sign="+")]))
    return rows


def _slot_rows(slots: dict[int, BlockSlots]) -> list[list[Cell]]:
    return [
        text_cells(
            [
                str(block),
                str(slot.head),
                str(slot.slot),
                f"{slot.reads:,}",
                f"{slot.information:.2f}",
                "  ".join(f"{visible(token)} {share:.0%}" for token, share in slot.tokens[:4]),
            ]
        )
        for block, entry in slots.items()
        for slot in entry.most_selective[:2]
    ]
