"""Draws the figures of README: a MIDUS model, and loss against trained parameters from the committed table.

python docs/figures/draw.py          writes midus.svg and loss.svg beside this file
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
TABLE = HERE.parent / "results/2026-11-26-comparison-cpu/table.md"

# Colours of Okabe and Ito, lighter on dark grounds. The ground is drawn, so the text never depends on the page's own.
STYLE = """
svg { --ground:#ffffff; --panel:#f6f7f9; --line:#c9ced6; --text:#1c1e21; --faint:#5b6068; --base:#e3e7ee; --memory:#ffe3c9;
  --accent:#c2540a; --h0:#0072b2; --h1:#009e73; --h2:#a0307f; --h3:#a87a00; --other:#8d949e; }
@media (prefers-color-scheme: dark) { svg { --ground:#15171a; --panel:#1d2025; --line:#444a53; --text:#e6e7e9; --faint:#a2a8b0;
  --base:#2d323a; --memory:#553414; --accent:#ff9a4d; --h0:#56b4e9; --h1:#2fd0a0; --h2:#e8a0cc; --h3:#f0c53d; --other:#8d949e; } }
text { fill:var(--text); font:13px system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif; }
.small { font-size:11.5px; } .faint { fill:var(--faint); } .title { font-weight:600; font-size:14px; } .strong { font-weight:600; }
.accent { fill:var(--accent); } .mid { text-anchor:middle; } .end { text-anchor:end; }
.ground { fill:var(--ground); } .panel { fill:var(--panel); stroke:var(--line); } .base { fill:var(--base); stroke:var(--line); }
.memory { fill:var(--memory); stroke:var(--accent); stroke-width:1.5; } .cell { fill:var(--ground); stroke:var(--line); stroke-width:.7; }
.flow { fill:none; stroke:var(--faint); stroke-width:1.4; } .zoom { fill:none; stroke:var(--accent); stroke-dasharray:4 4; }
.grid { stroke:var(--line); stroke-width:.7; } .leader { fill:none; stroke:var(--line); }
.h0 { fill:var(--h0); stroke:var(--h0); } .h1 { fill:var(--h1); stroke:var(--h1); } .h2 { fill:var(--h2); stroke:var(--h2); }
.h3 { fill:var(--h3); stroke:var(--h3); } .other { fill:var(--other); stroke:var(--other); } .tip { fill:var(--faint); }
.midus { fill:var(--accent); stroke:var(--accent); } .copied { fill:var(--h0); stroke:var(--h0); }
.control { fill:var(--h1); stroke:var(--h1); } .wire { fill:none; stroke-width:1.5; }
"""


class Canvas:
    """Pieces of one picture, and the file that they make."""

    def __init__(self, top: int, bottom: int, description: str) -> None:
        width, height = 1000, bottom - top
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 {top} {width} {height}" width="{width}" height="{height}"'
            f' role="img" aria-label="{description}">',
            f"<style>{STYLE}</style>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            '<path class="tip" d="M0 0L8 4L0 8z"/></marker></defs>',
            f'<rect class="ground" y="{top}" width="{width}" height="{height}" rx="10"/>',
        ]

    def box(self, x: float, y: float, width: float, height: float, css: str, radius: float = 5) -> None:
        self.parts.append(
            f'<rect class="{css}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}"/>'
        )

    def text(self, x: float, y: float, words: str, css: str = "") -> None:
        self.parts.append(f'<text class="{css}" x="{x:g}" y="{y:g}">{words}</text>')

    def path(self, d: str, css: str, *, has_tip: bool = False) -> None:
        tip = ' marker-end="url(#tip)"' if has_tip else ""
        self.parts.append(f'<path class="{css}" d="{d}"{tip}/>')

    def dot(self, x: float, y: float, css: str, radius: float = 5) -> None:
        self.parts.append(f'<circle class="{css}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}"/>')

    def svg(self) -> str:
        return "\n".join([*self.parts, "</svg>", ""])


# -- a MIDUS model ---------------------------------------------------------------------------------------------------
LANES = (118, 170, 222, 274)
# (row, column) of the slots that each head selects in the little tables of slots, and where they lie in the bank.
CHOICES = (((1, 4), (3, 2)), ((0, 1), (4, 4)), ((2, 0), (2, 3)), ((4, 1), (1, 2)))
SLOTS = 20
READS = ((3, 9), (5, 16), (9, 12), (1, 18))


def draw_model() -> str:
    canvas = Canvas(24, 400, "A base decoder, the MIDUS model made of it, and what a Memory block computes")
    _stacks(canvas)
    canvas.box(352, 40, 636, 316, "panel", 8)
    canvas.text(368, 64, "One Memory block", "title accent")
    canvas.path("M318 96L352 44M318 122L352 352", "zoom")
    _attention(canvas)
    for head, y in enumerate(LANES):
        _head(canvas, head, y)
    _bank(canvas)
    _sum(canvas)
    note = "At step 0 all values are zero: a Memory block adds exactly 0, and the MIDUS model computes what its base computes, bit for bit."
    canvas.text(500, 384, note, "faint mid")
    return canvas.svg()


def _stacks(canvas: Canvas) -> None:
    """Base and MIDUS as stacks of blocks; the input is below."""
    canvas.text(76, 158, "Base", "title mid")
    canvas.text(254, 78, "MIDUS", "title mid")
    for index in range(4):
        canvas.box(20, 294 - 40 * index, 112, 30, "base")
        canvas.text(76, 314 - 40 * index, f"layer {index}", "mid")
    rows = ["layer 0", "layer 1", "", "layer 2", "layer 3", ""]
    for place, name in enumerate(rows):
        y = 294 - 40 * place
        canvas.box(190, y, 128, 30, "base" if name else "memory")
        canvas.text(254, y + 20, name or "Memory block", "mid" if name else "mid strong")
    canvas.path("M138 249H184", "flow", has_tip=True)
    canvas.text(76, 346, "pretrained", "mid small faint")
    canvas.parts.append(
        '<text class="mid small" x="254" y="346"><tspan class="faint">grey frozen, </tspan><tspan class="accent">orange trained</tspan></text>'
    )


def _attention(canvas: Canvas) -> None:
    canvas.text(366, 200, "x", "strong")
    canvas.path("M378 196H392", "flow", has_tip=True)
    canvas.box(394, 176, 44, 40, "base")
    canvas.text(416, 200, "norm", "mid small")
    canvas.path("M438 196H450", "flow", has_tip=True)
    canvas.box(452, 96, 74, 200, "base")
    for line, words in enumerate(("attention", "copied from", "the layer", "before, no", "output", "projection")):
        canvas.text(489, 160 + 16 * line, words, "mid strong" if line == 0 else "mid small faint")


def _head(canvas: Canvas, head: int, y: float) -> None:
    """One head: its query, its own sub-keys, what it reads, its projection."""
    css, left, size = f"h{head}", 584, 6.4
    canvas.path(f"M526 {y}H{left - 12}", f"{css} wire")
    canvas.text(549, y - 5, f"q<tspan dy='3' font-size='9'>{head}</tspan>", "mid small")
    top = y - 16
    for i in range(5):
        canvas.box(left - 9, top + size * i, 6, size - 1, css, 1)
        canvas.box(left + size * i, top - 9, size - 1, 6, css, 1)
        for j in range(5):
            canvas.box(left + size * j, top + size * i, size, size, css if (i, j) in CHOICES[head] else "cell", 0)
    for slot in READS[head]:
        canvas.path(f"M{left + 34} {y}C{left + 80} {y} 660 {_slot_y(slot)} 700 {_slot_y(slot)}", f"{css} wire")
    canvas.path(f"M766 {y}H806", f"{css} wire")
    canvas.box(808, y - 15, 40, 30, f"{css}", 4)
    canvas.parts.append(
        f'<text x="828" y="{y + 5}" class="mid" style="fill:var(--ground);font-weight:600">W{head}</text>'
    )
    canvas.path(f"M848 {y}H874", f"{css} wire")


def _slot_y(slot: int) -> float:
    return 96 + 10 * slot + 5


def _bank(canvas: Canvas) -> None:
    readers = {slot: head for head, slots in enumerate(READS) for slot in slots}
    for slot in range(SLOTS):
        shared = slot == 9
        canvas.box(700, 96 + 10 * slot, 66, 10, "cell" if slot not in readers else f"h{readers[slot]}", 0)
        if shared:  # read by two heads
            canvas.box(700, 96 + 10 * slot, 33, 10, "h0", 0)
    canvas.text(594, 316, "sub-keys per head", "mid small strong")
    canvas.text(594, 332, "2n keys name n² slots", "mid small faint")
    canvas.text(594, 347, "top-k by score", "mid small faint")
    canvas.text(733, 316, "one value bank", "mid small strong")
    canvas.text(733, 332, "n² slots, zero at first", "mid small faint")
    canvas.text(733, 347, "shared by all heads", "mid small faint")
    canvas.text(842, 316, "projections", "mid small strong")
    canvas.text(842, 332, "one per head", "mid small faint")


def _sum(canvas: Canvas) -> None:
    canvas.box(876, 96, 14, 200, "base", 3)
    canvas.parts.append('<text class="mid small faint" transform="translate(905 258) rotate(-90)">concat</text>')
    canvas.path("M890 196H926", "flow", has_tip=True)
    canvas.parts.append('<circle class="cell" cx="938" cy="196" r="10" style="stroke:var(--faint);stroke-width:1.4"/>')
    canvas.path("M932 196H944M938 190V202", "flow")
    canvas.path("M948 196H976", "flow", has_tip=True)
    canvas.path("M384 196V80H938V184", "flow", has_tip=True)
    canvas.text(660, 74, "residual", "mid small faint")


# -- loss against trained parameters ---------------------------------------------------------------------------------
class Arm(NamedTuple):
    """One row of the table: losses in nats/token, ``deviation`` over seeds."""

    name: str
    trained: int
    loss: float
    deviation: float
    forgotten: float


NAMES = {
    "base": "base, not trained further",
    "llama_pro": "LLaMA-Pro: 4 copied blocks",
    "hive": "MIDUS hive",
    "block": "MIDUS block",
    "full": "MIDUS full",
    "hive-mixer": "MIDUS hive + mixer",
    "control": "control: 4 base layers",
    "plain": "base, all layers",
    "hive-all": "MIDUS hive, all layers",
    "solar": "SOLAR",
    "stack": "stack",
    "average": "average",
    "opt_deus": "OpT-DeUS",
    "opt_deus_literal": "OpT-DeUS, literal",
    "llama_pro-all": "LLaMA-Pro, all layers",
}
# Where a name stands beside its point, and whether a line leads there.
LABELS = {
    "hive": (-4, -18, False),
    "hive-mixer": (-46, 46, True),
    "block": (11, -6, False),
    "full": (11, 12, False),
    "llama_pro": (11, -6, False),
    "control": (11, 14, False),
    "plain": (-60, 40, False),
    "hive-all": (-60, -24, False),
}
LEFT, RIGHT, TOP, BOTTOM = 66, 800, 60, 366
LOW, HIGH, MOST = 3.43, 3.64, 2.72e6


def read_arms() -> list[Arm]:
    """The first table of the committed page."""
    lines = TABLE.read_text().splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("| arm |"))
    columns = [cell.strip() for cell in lines[header].strip("|").split("|")]
    arms, base_old = [], 0.0
    for line in lines[header + 2 :]:
        if not line.startswith("|"):
            break
        row = dict(zip(columns, (cell.strip() for cell in line.strip("|").split("|"))))
        new, _, deviation = row["new ppl ↓"].partition(" ± ")
        old = math.log(float(row["old ppl ↓"].partition(" ")[0]))
        trained = int(re.sub(r"\D", "", row["trained"].partition(" ")[0]))
        base_old = base_old or old  # the base is the first row
        arms.append(Arm(row["arm"], trained, math.log(float(new)), float(deviation or 0) / float(new), old - base_old))
    return arms


def _x(trained: float) -> float:
    return LEFT + trained / MOST * (RIGHT - LEFT)


def _y(loss: float) -> float:
    return BOTTOM - (loss - LOW) / (HIGH - LOW) * (BOTTOM - TOP)


def _css(arm: Arm) -> str:
    if arm.name.split("-")[0] in ("hive", "block", "full"):
        return "midus"
    return {"llama_pro": "copied", "llama_pro-all": "copied", "control": "control"}.get(arm.name, "other")


def draw_loss() -> str:
    canvas = Canvas(0, 424, "Held-out loss of the new domain against trained parameters, all arms")
    canvas.text(24, 28, "Loss on held-out text of the new domain, nats/token (lower is better)", "title")
    canvas.text(
        24,
        46,
        "In brackets: by how much the loss rose on the base's own domain (forgetting). Bars: σ over three seeds.",
        "small faint",
    )
    for tick in (3.45, 3.5, 3.55, 3.6):
        canvas.path(f"M{LEFT} {_y(tick):.1f}H{RIGHT}", "grid")
        canvas.text(LEFT - 8, _y(tick) + 4, f"{tick:.2f}", "end small faint")
    for tick in range(6):
        canvas.path(f"M{_x(tick * 5e5):.1f} {BOTTOM}v5", "flow")
        canvas.text(_x(tick * 5e5), BOTTOM + 20, f"{tick / 2:g} M" if tick else "0", "mid small faint")
    canvas.path(f"M{LEFT} {TOP}V{BOTTOM}H{RIGHT}", "flow")
    canvas.text((LEFT + RIGHT) / 2, BOTTOM + 42, "trained parameters (the base has 1.84 M)", "mid small")
    arms = read_arms()
    for arm in arms:
        x, css = _x(arm.trained), _css(arm)
        if arm.deviation:
            canvas.path(
                f"M{x:.1f} {_y(arm.loss - arm.deviation):.1f}V{_y(arm.loss + arm.deviation):.1f}", f"{css} wire"
            )
        canvas.dot(x, _y(arm.loss), css)
    crowd = sorted((a for a in arms if a.trained > 2.5e6), key=lambda a: -a.loss)
    for arm in arms:
        if arm not in crowd:
            x, y, has_line = LABELS.get(arm.name, (11, 4, False))
            if has_line:
                canvas.path(f"M{_x(arm.trained) - 2:.1f} {_y(arm.loss) + 12:.1f}l-8 22", "leader")
            weight = " strong" if arm.name in ("hive", "llama_pro", "control") else ""
            canvas.text(_x(arm.trained) + x, _y(arm.loss) + y, _label(arm), f"small{weight}")
    canvas.text(RIGHT + 14, 226, "all layers trained, 2.62 M", "small faint")
    for place, arm in enumerate(crowd):
        y = 246 + 19 * place
        canvas.path(f"M{_x(arm.trained) + 6:.1f} {_y(arm.loss):.1f}L{RIGHT + 10} {y - 4}", "leader")
        canvas.text(RIGHT + 14, y, _label(arm), "small")
    return canvas.svg()


def _label(arm: Arm) -> str:
    forgotten = f" <tspan class='faint' font-weight='400'>({arm.forgotten:+.2f})</tspan>" if arm.trained else ""
    return NAMES.get(arm.name, arm.name) + forgotten


FIGURES = {"midus.svg": draw_model, "loss.svg": draw_loss}

if __name__ == "__main__":
    for name, draw in FIGURES.items():
        (HERE / name).write_text(draw())
