"""A benchmark as a picture: bars for the contenders of each shape, lines over the number of tokens for decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_midus.benchmark.result import BenchmarkResult, Section
from megatron_midus.errors import UserError
from megatron_midus.files import staged_file

# Colours that stay apart for colour-blind readers (Okabe and Ito 2008).
PHASE_COLOURS = {"forward": "#56B4E9", "backward": "#0072B2", "iteration": "#0072B2"}
LINE_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")


def require_matplotlib() -> Any:
    """``matplotlib.figure``; raises ``ValueError`` with what to install."""
    try:
        from matplotlib import figure
    except ImportError:
        raise UserError(
            "matplotlib is not installed; pip install 'megatron-midus[bench]', or leave --plot out"
        ) from None
    return figure


def plot_result(result: BenchmarkResult, target: str | Path) -> None:
    """Writes a PNG, one panel per shape and one more for its decoding steps."""
    bars = [section for section in result.sections if not section.title.startswith("decode")]
    decode: dict[str, list[Section]] = {}
    for section in result.sections:
        if section.title.startswith("decode"):
            decode.setdefault(section.shape["name"], []).append(section)
    panels = len(bars) + len(decode)
    heights = [1.1 + 0.42 * len(section.rows) for section in bars] + [3.2] * len(decode)
    figure = require_matplotlib().Figure(figsize=(9.5, sum(heights)), layout="constrained")
    axes = figure.subplots(panels, 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for ax, section in zip(axes, bars):
        _draw_bars(ax, section)
    for ax, (name, sections) in zip(axes[len(bars) :], decode.items()):
        _draw_decode(ax, name, sections)
    torch_version = result.machine["versions"].get("torch", "?")
    figure.supxlabel(f"{result.device_text}; torch {torch_version}. Medians; whiskers: quartiles.", fontsize=8)
    with staged_file(target) as partial:
        figure.savefig(partial, dpi=100, format="png")


def _draw_bars(ax: Any, section: Section) -> None:
    """Stacked phases, and behind each bar what it is worth against the baselines and in memory."""
    rows = section.rows[::-1]  # the first one on top
    positions = range(len(rows))
    left = [0.0] * len(rows)
    for phase in rows[0].phases:
        widths = [row.phases[phase].median for row in rows]
        ax.barh(positions, widths, left=left, height=0.62, color=PHASE_COLOURS.get(phase), label=phase)
        left = [a + b for a, b in zip(left, widths)]
    totals = [row.total for row in rows]
    whiskers = [
        [max(end - t.lower_quartile, 0) for end, t in zip(left, totals)],
        [max(t.upper_quartile - end, 0) for end, t in zip(left, totals)],
    ]
    ax.errorbar(left, positions, xerr=whiskers, fmt="none", ecolor="#333333", elinewidth=1, capsize=2.5)
    widest = max(max(end, t.upper_quartile) for end, t in zip(left, totals))
    for position, row, end in zip(positions, rows, left):
        x = max(end, row.total.upper_quartile) + 0.012 * widest
        ax.text(x, position, _label(section, row), va="center", fontsize=8)
    ax.set_xlim(0, 1.62 * widest)
    ax.set_yticks(list(positions), [row.name for row in rows])
    ax.set_xlabel("ms;  n × baseline: share of its time;  MB: peak memory", fontsize=8, loc="left")
    ax.set_title(f"{section.title}: {section.description}", fontsize=9, loc="left")
    if len(rows[0].phases) > 1:
        ax.legend(loc="upper right", bbox_to_anchor=(1.0, -0.07), ncols=2, fontsize=8, frameon=False, borderpad=0)
    _clean(ax)


def _label(section: Section, row: Any) -> str:
    parts = [f"{row.total.median:.4g} ms"]
    parts += [f"{row.ratios[name].median:.3g} × {name}" for name in section.baselines if name in row.ratios]
    if row.peak_bytes is not None:
        parts.append(f"{row.peak_bytes / 1e6:.0f} MB")
    return ",  ".join(parts)


def _draw_decode(ax: Any, name: str, sections: list[Section]) -> None:
    from matplotlib import ticker

    tokens = [section.shape["tokens"] for section in sections]
    for index, contender in enumerate(row.name for row in sections[0].rows):
        found = [next(row.total for row in section.rows if row.name == contender) for section in sections]
        medians = [summary.median for summary in found]
        spread = [
            [m - s.lower_quartile for m, s in zip(medians, found)],
            [s.upper_quartile - m for m, s in zip(medians, found)],
        ]
        colour = LINE_COLOURS[index % len(LINE_COLOURS)]
        ax.errorbar(tokens, medians, yerr=spread, color=colour, marker="o", ms=4, lw=1.5, capsize=2.5, label=contender)
    ax.set_xscale("log", base=2)
    ax.set_xticks(tokens, [str(number) for number in tokens])
    ax.set_yscale("log")  # an FFN takes twenty times as long
    ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_locator(ticker.NullLocator())
    ax.set_xlabel("tokens of a decoding step")
    ax.set_ylabel("forward, ms")
    ax.set_title(f"decode {name}", fontsize=9, loc="left")
    ax.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _clean(ax)


def _clean(ax: Any) -> None:
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.tick_params(labelsize=8)
