"""Section of the report: the loss with a smaller k, n, number of slots or d_l, without retraining."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_midus.analysis.page_heads import MILLI
from megatron_midus.analysis.sensitivity import Sensitivity
from megatron_midus.analysis.study import Study
from megatron_midus.analysis.windows import Estimate
from megatron_midus.report.charts import Series, chart
from megatron_midus.report.page import Page
from megatron_midus.report.table import Cell, number_cell

HEADER = ("changed in all Memory blocks", "to", "rise of the loss, mnat/token", "of the memories' worth")


def add(page: Page, study: Study, sensitivity: Sensitivity) -> None:
    page.heading("Sensitivity to k, n and d_l, without retraining")
    page.paragraph(
        "What is dropped was chosen on every other window of the text, the loss is that of the windows between. A model "
        "that is trained with the smaller number should do better than the curve says."
    )
    off = sensitivity.off.text(scale=MILLI, digits=2, sign="+")
    page.paragraph(f"For scale: with all memories off the loss rises by {off} mnat/token.")
    rank_name = "latent size d_l" if study.variant == "hive" else "rank of the bank"
    page.charts(
        [
            (_curve({"top-k": sensitivity.topk}, "slots that a look-up reads, k"), "Fewer slots a look-up, and twice as many: flat down to some k means that the slots after it hardly matter."),
            (_curve({"sub-keys": sensitivity.num_keys}, "sub-keys per half, n"), "Only the most read sub-keys kept, so that n² slots are left: rises where the dropped ones mattered."),
            (_curve({"slots": sensitivity.share_of_slots}, "share of the slots kept"), "Only the most read slots keep their values, the others read as zeros: how far a bank can be pruned."),
            (
                _curve({"all slots alike": sensitivity.rank, "slots weighted by use": sensitivity.rank_by_use}, rank_name),
                "The table of each block cut to its strongest directions: the smallest number without a rise is the width that the values really need."
                + ("" if study.variant == "hive" else " This variant has no latent bank; the curve says how wide one would have to be."),
            ),
        ]
    )  # fmt: skip
    page.table(HEADER, sensitivity_rows(sensitivity, rank_name))


def sensitivity_rows(sensitivity: Sensitivity, rank_name: str = "rank") -> list[list[Cell]]:
    """Cells that fit ``HEADER``."""
    curves: dict[str, Mapping[float, Estimate]] = {
        "top-k": dict(sensitivity.topk),
        "sub-keys n": dict(sensitivity.num_keys),
        "share of slots": sensitivity.share_of_slots,
        rank_name: dict(sensitivity.rank),
        f"{rank_name}, by use": dict(sensitivity.rank_by_use),
    }
    worth = sensitivity.off
    rows = []
    for name, curve in curves.items():
        for number, rise in curve.items():
            share = rise.value / worth.value if worth.is_clear and worth.value > 0 else None
            shown = f"{number * 100:g}%" if name == "share of slots" else f"{number:,}"
            rows.append(
                [
                    Cell(name, name),
                    Cell(shown, number),
                    Cell(rise.text(scale=MILLI, digits=2, sign="+"), rise.value),
                    number_cell(share, "{:.0%}"),
                ]
            )
    return rows


def _curve(curves: Mapping[str, Mapping[float, Estimate]] | Mapping[str, dict], x_label: str) -> str:
    series = [
        Series(
            name,
            [float(number) for number in curve],
            [rise.value * MILLI for rise in curve.values()],
            style,
            [(rise.stderr or 0.0) * MILLI for rise in curve.values()],
        )
        for style, (name, curve) in enumerate(curves.items())
    ]
    return chart(
        series, x_label=x_label, y_label="rise of the loss, mnat/token", log_x=True, x_ticks=series[0].x, title=x_label
    )
