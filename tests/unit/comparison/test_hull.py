"""Hull, area, forgetting at a gain and shares against brute force in float64: all mixtures of two runs, and a fine grid of gains."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from megatron_midus.comparison.hull import hull, share_below

SEEDS = range(8)


def draw(seed: int, count: int = 7) -> list[tuple[float, float]]:
    """Gains and forgetting, some of them negative, some gains equal."""
    drawn = random.Random(seed)
    points = [(round(drawn.uniform(-0.1, 0.5), 2), drawn.uniform(-0.05, 0.4)) for _ in range(count)]
    return [*points, (points[0][0], drawn.uniform(0, 0.4))]


def least(points: list[tuple[float, float]], gain: float) -> float:
    """The best mixture of two runs, or of a run and the base, that gains at least so much: a linear program by its corners."""
    runs = [(0.0, 0.0), *((g, f) for g, f in points if g > 0)]
    best = min((f for g, f in runs if g >= gain), default=math.inf)
    for (g, f), (h, e) in itertools.permutations(runs, 2):
        if g < gain < h:
            best = min(best, f + (e - f) * (gain - g) / (h - g))
    return best


def grid(stop: float, count: int) -> list[float]:
    """Middles of equal parts of ``[0, stop]``."""
    return [stop * (i + 0.5) / count for i in range(count)]


@pytest.mark.parametrize("seed", SEEDS)
def test_forgetting_at_a_gain(seed):
    points = draw(seed)
    line, reach = hull(points), max(g for g, _ in points)
    assert line.reach == reach
    for gain in (0.0, 0.1, 0.2, 0.3, 0.4, reach, *grid(reach, 57)):
        assert line.at(gain) == pytest.approx(least(points, gain), abs=1e-12) or gain > reach
    assert line.at(reach + 1e-9) == math.inf


@pytest.mark.parametrize("seed", SEEDS)
def test_area(seed):
    points, count = draw(seed), 4000
    line = hull(points)
    for stop in (line.reach, line.reach / 3):
        summed = sum(least(points, gain) for gain in grid(stop, count)) * stop / count
        # Middles are exact but in the parts that hold a corner: at most 8 corners of slope below 40.
        assert line.area(stop) == pytest.approx(summed, abs=8 * 40 * (stop / count) ** 2)
        assert line.mean(stop) == pytest.approx(line.area(stop) / stop)


@pytest.mark.parametrize("seed", SEEDS)
def test_share_of_gains(seed):
    mine, others, count = draw(seed), [draw(seed + 100), draw(seed + 200)], 4000
    stop = max(g for points in (mine, *others) for g, _ in points)
    below = [least(mine, g) < min(least(points, g) for points in others) for g in grid(stop, count)]
    found = share_below(hull(mine), [hull(points) for points in others])
    assert found == pytest.approx(sum(below) / count, abs=4 / count)


def test_by_hand():
    line = hull([(0.2, 0.1), (0.4, 0.4), (0.3, 0.3), (0.1, 0.2), (-0.3, -1.0)])
    assert line.vertices == ((0.0, 0.0), (0.2, 0.1), (0.4, 0.4))
    assert line.at(0.3) == pytest.approx(0.25) and line.area(0.3) == pytest.approx(0.01 + 0.0175)
    # Replay that betters the old domain: whoever wants less gain takes that run as well.
    assert hull([(0.2, -0.1), (0.4, 0.1)]).vertices == ((0.0, -0.1), (0.2, -0.1), (0.4, 0.1))
    assert hull([(-0.1, 0.3)]).vertices == ((0.0, 0.0),)
    # Equal up to 0.2, better up to 0.3, then alone up to 0.4; against it from 0.4 to 0.5.
    mine, other = hull([(0.2, 0.1), (0.4, 0.2)]), hull([(0.2, 0.1), (0.3, 0.3)])
    assert share_below(mine, [other]) == pytest.approx(0.5)
    assert share_below(other, [mine]) == 0.0
    assert share_below(mine, [other, hull([(0.5, 1.0)])]) == pytest.approx(0.4)
