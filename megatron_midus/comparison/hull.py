"""The line between learning and forgetting of one method: the hull of its runs, forgetting at a gain, the area under it.

A run is a point ``(gain, forgotten)``, both in nats per token against the base: lower loss on the new domain, higher loss on
the base's own. The base itself is ``(0, 0)``.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence

Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Hull:
    """The least forgetting at every gain from 0 to the largest, ``f(g)``: convex, piecewise linear, never falling.

    Attributes:
        vertices: its corners by gain, the first at gain 0.
    """

    vertices: tuple[Point, ...]

    @property
    def reach(self) -> float:
        """The largest gain."""
        return self.vertices[-1][0]

    def at(self, gain: float) -> float:
        """Least forgetting of a gain of at least ``gain``; infinite beyond ``reach``."""
        if gain > self.reach:
            return math.inf
        for (a, low), (b, high) in itertools.pairwise(self.vertices):
            if gain <= b:
                return high if a == b else low + (high - low) * (gain - a) / (b - a)
        return self.vertices[-1][1]

    def area(self, stop: float) -> float:
        """Of the region below ``f`` from gain 0 to ``stop``, which must not be beyond ``reach``, nats²."""
        assert stop <= self.reach, (stop, self.reach)
        corners = [*(g for g, _ in self.vertices if g < stop), stop]
        return sum((b - a) * (self.at(a) + self.at(b)) / 2 for a, b in itertools.pairwise(corners))

    def mean(self, stop: float) -> float:
        """Mean forgetting from gain 0 to ``stop``."""
        return self.area(stop) / stop if stop else self.at(0.0)


def hull(points: Iterable[Point]) -> Hull:
    """Of the runs of a method and the base.

    Between two runs lies the straight line, as for a mixture of them; a run that gains more and forgets less than another
    takes its place. Runs that gain nothing are no part of it.
    """
    chain: list[Point] = []
    for point in sorted({(0.0, 0.0), *((g, f) for g, f in points if g > 0)}):
        if chain and chain[-1][0] == point[0]:
            continue  # sorted: the one before forgets less
        while len(chain) > 1 and _turn(chain[-2], chain[-1], point) <= 0:
            chain.pop()
        chain.append(point)
    least = min(range(len(chain)), key=lambda i: chain[i][1])
    if least:
        chain = [(0.0, chain[least][1]), *chain[least:]]
    return Hull(tuple(chain))


def _turn(a: Point, b: Point, c: Point) -> float:
    """Above 0 where the way from ``a`` over ``b`` to ``c`` turns upwards."""
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def share_below(mine: Hull, others: Sequence[Hull]) -> float:
    """Share of the gains, from 0 to the largest of all, at which ``mine`` forgets less than every one of ``others``.

    Gains that only ``mine`` reaches count for it, gains that it does not reach against it.
    """
    stop = max(line.reach for line in (mine, *others))
    if not stop:
        return 0.0
    corners = {0.0, stop, *(g for line in (mine, *others) for g, _ in line.vertices)}
    for other in others:
        corners |= _crossings(mine, other)
    length = 0.0
    for a, b in itertools.pairwise(sorted(corners)):
        middle = (a + b) / 2
        if mine.at(middle) < min((other.at(middle) for other in others), default=math.inf):
            length += b - a
    return length / stop


def _crossings(one: Hull, two: Hull) -> set[float]:
    """Gains at which two lines cross between their corners."""
    stop = min(one.reach, two.reach)
    corners = sorted({stop, *(g for line in (one, two) for g, _ in line.vertices if g <= stop)})
    found = set()
    for a, b in itertools.pairwise(corners):
        left, right = one.at(a) - two.at(a), one.at(b) - two.at(b)
        if left * right < 0:
            found.add(a + (b - a) * left / (left - right))
    return found
