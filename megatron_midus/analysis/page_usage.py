"""Section of the report: which slots the text reads."""

from __future__ import annotations

from megatron_midus.analysis.study import Study
from megatron_midus.analysis.usage import BlockUsage
from megatron_midus.report.charts import Series, chart
from megatron_midus.report.heatmap import binned, heat_map
from megatron_midus.report.page import Page
from megatron_midus.report.table import Cell, number_cell

_MOST_COLUMNS = 64  # a heat map with more is a blur, and a large file


def add(page: Page, study: Study, usage: dict[int, BlockUsage]) -> None:
    page.heading("Slot usage")
    page.table(HEADER, [usage_row(block, entry) for block, entry in usage.items()])
    page.bullets(
        [
            "used: slots that the text read at least once; by chance: what as many reads would touch if every slot were "
            "equally likely. Far below that, the memory concentrates on few slots; the rest are dead on this text.",
            "entropy and KL to uniform (nats) of the reads; effective slots = exp(entropy): so many equally popular slots "
            "would have that entropy.",
            "top-1: mean share of a look-up's weight on its best slot; 1/k means that all k weigh the same, 1 that one "
            "slot decides.",
            "‖HML(x)‖/‖x‖: what the block writes against what it writes to, mean over tokens (5th to 95th percentile). "
            "Near 0 the block hardly speaks.",
        ]
    )
    page.charts([_concentration(usage), _effective(usage)])
    page.subheading("Sub-keys")
    page.paragraph(
        "Each line is one head, each column one sub-key (or the mean of neighbours); strong = chosen more often than "
        "others. A few strong columns in a pale line: that head's queries all look alike to its keys.",
        is_note=True,
    )
    page.charts([_marginals(block, entry) for block, entry in usage.items()])
    page.subheading("Do heads read the same slots?")
    if any(entry.overlap is not None for entry in usage.values()):
        page.paragraph(
            "Common share of two heads' reads: 1 = the same slots equally often, 0 = no slot in common; low values mean "
            "that heads share the bank out.",
            is_note=True,
        )
        page.charts([_overlap(block, entry) for block, entry in usage.items() if entry.overlap is not None])
    else:
        page.paragraph("Does not apply: with variant full every head has a bank of its own.")


HEADER = (
    "block", "slots", "used", "by chance", "dead", "entropy", "KL to uniform", "effective slots", "top-1",
    "‖HML(x)‖/‖x‖", "mean ‖v‖", "max ‖v‖",
)  # fmt: skip


def usage_row(block: int, entry: BlockUsage) -> list[Cell]:
    """Cells that fit ``HEADER``."""
    bank = entry.bank
    return [
        Cell(str(block), block),
        Cell(f"{bank.num_slots:,}", bank.num_slots),
        Cell(f"{bank.share_used:.1%}", bank.share_used),
        Cell(f"{bank.share_used_if_uniform:.1%}", bank.share_used_if_uniform),
        Cell(f"{bank.num_dead:,}", bank.num_dead),
        number_cell(bank.entropy, "{:.2f}"),
        number_cell(bank.kl_to_uniform, "{:.2f}"),
        number_cell(bank.effective_slots, "{:,.0f}"),
        number_cell(entry.top1_mass, "{:.3f}"),
        Cell(
            f"{entry.relative_norm:.4f} ({entry.relative_norm_5:.4f}–{entry.relative_norm_95:.4f})", entry.relative_norm
        ),
        Cell(f"{entry.value_norm:.3g}", entry.value_norm),
        Cell(f"{entry.max_value_norm:.3g}", entry.max_value_norm),
    ]


def _concentration(usage: dict[int, BlockUsage]) -> tuple[str, str]:
    series = [
        Series(f"block {block}", [x for x, _ in entry.concentration], [y for _, y in entry.concentration], style)
        for style, (block, entry) in enumerate(usage.items())
    ]
    figure = chart(series, x_label="share of the slots, most popular first", y_label="share of the reads", log_x=True, title="Concentration of reads")  # fmt: skip
    return figure, "How few slots do most of the work: a curve that is high on the left means that a small share of the slots gets most of the reads."  # fmt: skip


def _effective(usage: dict[int, BlockUsage]) -> tuple[str, str]:
    values = [[(head.effective_slots or 0) / head.num_slots for head in entry.heads] for entry in usage.values()]
    heads = len(values[0])
    figure = heat_map(
        values,
        row_labels=[f"block {block}" for block in usage],
        column_labels=[str(h) for h in range(heads)] if heads <= 32 else None,
        x_label="memory head; share of all slots, in %",
        texts=[[f"{v:.1%}" for v in row] for row in values] if heads <= 12 else None,
        titles=[[f"head {h}: {v:.2%}" for h, v in enumerate(row)] for row in values],
        title="Effective slots of each head",
    )
    return figure, "Effective slots of each head over all slots: a pale head has collapsed onto few slots."


def _marginals(block: int, entry: BlockUsage) -> tuple[str, str]:
    num_keys = len(entry.row_shares[0])
    lines = [(f"h{h} row", row) for h, row in enumerate(entry.row_shares)]
    lines += [(f"h{h} col", row) for h, row in enumerate(entry.col_shares)]
    values = [[share * num_keys for share in binned(row, _MOST_COLUMNS)] for _, row in lines]
    strongest = max(map(max, values))
    figure = heat_map(values, row_labels=[name for name, _ in lines], x_label="sub-key", title=f"Block {block}: sub-keys")  # fmt: skip
    return figure, f"Block {block}. The strongest is chosen {strongest:.1f} times as often as a sub-key on average."


def _overlap(block: int, entry: BlockUsage) -> tuple[str, str]:
    assert entry.overlap is not None
    heads = len(entry.overlap)
    figure = heat_map(
        entry.overlap,
        row_labels=[f"head {h}" for h in range(heads)],
        column_labels=[str(h) for h in range(heads)] if heads <= 32 else None,
        x_label="head",
        limit=1.0,
        texts=[[f"{v:.2f}" for v in row] for row in entry.overlap] if heads <= 12 else None,
        title=f"Block {block}: overlap of heads",
    )
    return figure, f"Block {block}."
