"""Charts of many series stay readable: names cover no other, a series above the twelfth has a stroke of its own."""

import itertools
import re

from megatron_midus.report.charts import Series, chart


def test_names_of_many_points_do_not_overlap():
    series = [Series(f"variant-{i}", [1000.0 + i % 3], [3.0 - 0.001 * i], i, is_line=False) for i in range(14)]
    # Far away, so that the others lie close together.
    series.append(Series("variant-14", [2000.0], [2.0], 14, is_line=False))
    drawn = chart(series, x_label="x", y_label="y", label_points=True)
    labels = re.findall(r'<text class="tick" x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">(variant-\d+)<', drawn)
    assert len(labels) == 15
    boxes = []
    for x, y, anchor, name in labels:
        left = float(x) - (6.6 * len(name) if anchor == "end" else 0)
        boxes.append((left, left + 6.6 * len(name), float(y)))
        assert 10 <= float(y) <= 380 - 46
    for (a, b, y), (c, d, z) in itertools.combinations(boxes, 2):
        assert b <= c or d <= a or abs(y - z) >= 12.9, (y, z)


def test_a_thirteenth_series_is_dashed_in_plot_and_legend():
    series = [Series(f"s-{i}", [0.0, 1.0], [float(i), i + 1.0], i) for i in range(15)]
    drawn = chart(series, x_label="x", y_label="y")
    assert drawn.count("stroke-dasharray") == 2 * 3


def test_a_short_log_axis_has_round_ticks():
    drawn = chart([Series("a", [295e3, 787e3], [1.0, 2.0], 0)], x_label="x", y_label="y", log_x=True)
    ticks = re.findall(r'text-anchor="middle">([\d.]+k)<', drawn)
    assert len(ticks) >= 2 and all(tick.endswith("00k") for tick in ticks), ticks


def test_ticks_where_they_are_asked_for():
    series = [Series("k", [1.0, 2.0, 4.0, 8.0], [1.0, 2.0, 3.0, 4.0], 0)]
    drawn = chart(series, x_label="x", y_label="y", log_x=True, x_ticks=[1.0, 4.0, 8.0])
    shown = re.findall(r'x="([\d.]+)" y="351" text-anchor="middle">(\w+)<', drawn)
    assert [name for _, name in shown] == ["1", "4", "8"]
    (first, _), (middle, _), (last, _) = shown
    assert float(middle) - float(first) == 2 * (float(last) - float(middle))
