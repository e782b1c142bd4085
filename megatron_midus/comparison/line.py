"""What every method gains on the new domain and forgets of the old one, over its strengths: points, hulls, figures at equal gain."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from megatron_midus.comparison.hull import Hull, hull, share_below
from megatron_midus.comparison.results import Mean, Results
from megatron_midus.comparison.roles import base_arm

GAINS = (0.1, 0.2, 0.3, 0.4)
# Of the reference's trained parameters: what a method of few parameters is allowed.
FEW = 0.4
# Seconds of the same steps differ by a few percent from run to run.
_TIME_TOLERANCE = 1.05


@dataclasses.dataclass(frozen=True)
class LinePoint:
    """One run: nats per token against the base.

    Attributes:
        point: the strength, ``KEY=VALUE,…``.
        gained: on the new domain; forgotten: on the old one; third: forgotten of a third domain, where one was given.
        trained: parameters.
        seconds: of training steps; ``None`` where they were not recorded.
    """

    method: str
    point: str
    seed: int
    gained: float
    forgotten: float
    trained: int
    tokens: int
    seconds: float | None
    third: float | None = None


@dataclasses.dataclass(frozen=True)
class MethodLine:
    """One method, over its seeds.

    Attributes:
        hulls: by seed.
        trained: least and most parameters of its strengths.
        seconds: median of its runs.
        reach: largest gain.
        mean_forgotten: over the gains that all methods reach with all seeds.
        at: by gain, over the seeds that reach it.
        below_reference: share of the gains at which it forgets less than the reference; ``None`` for the reference.
        below_all: than every other method.
    """

    name: str
    hulls: dict[int, Hull]
    trained: tuple[int, int]
    seconds: float | None
    reach: Mean
    mean_forgotten: Mean
    at: dict[float, Mean | None]
    below_reference: Mean | None
    below_all: Mean | None


@dataclasses.dataclass(frozen=True)
class Line:
    """A group of methods that are compared.

    Attributes:
        common: the gain up to which ``mean_forgotten`` goes.
        rest: methods without a run in this group.
    """

    methods: list[MethodLine]
    common: float
    rest: list[str]


def line_points(results: Results) -> list[LinePoint]:
    """All runs that trained; none without the base, or without held-out text of the old domain."""
    base = base_arm(results)
    new, old = (None, None) if base is None else (base.loss("new"), base.loss("old"))
    if new is None or old is None:
        return []
    third = base.loss("third") if base is not None else None
    found = []
    for arm in results.arms:
        method, _, point = arm.name.partition("@")
        for run in arm.runs if arm.trainable else []:
            assert run.old_loss is not None
            seconds = run.curves.validation[-1].seconds if run.curves and run.curves.validation else None
            gained, forgotten = new.mean - run.new_loss, run.old_loss - old.mean
            of_third = None if third is None or run.third_loss is None else run.third_loss - third.mean
            entry = LinePoint(method, point, run.seed, gained, forgotten, arm.trainable, arm.tokens, seconds, of_third)
            found.append(entry)
    return found


def reference_method(results: Results) -> str:
    return results.reference.partition("@")[0]


def make_line(points: Sequence[LinePoint], reference: str, *, all_methods: Sequence[str] = ()) -> Line:
    """Hulls and figures of the methods that have ``points``."""
    names = list(dict.fromkeys(point.method for point in points))
    hulls = {
        name: {
            seed: hull([(p.gained, p.forgotten) for p in points if (p.method, p.seed) == (name, seed)])
            for seed in sorted({p.seed for p in points if p.method == name})
        }
        for name in names
    }
    common = min((line.reach for lines in hulls.values() for line in lines.values()), default=0.0)
    methods = [_method(name, hulls, points, common, reference) for name in names]
    return Line(methods, common, [name for name in all_methods if name not in names])


def _method(
    name: str, hulls: dict[str, dict[int, Hull]], points: Sequence[LinePoint], common: float, reference: str
) -> MethodLine:
    lines, mine = hulls[name], [point for point in points if point.method == name]
    seconds = [point.seconds for point in mine if point.seconds is not None]
    against = hulls.get(reference, {})
    reference_shares = [share_below(line, [against[seed]]) for seed, line in lines.items() if seed in against]
    all_shares = [share_below(line, others) for seed, line in lines.items() if (others := _others(hulls, name, seed))]
    at = {gain: Mean.of([line.at(gain) for line in lines.values() if line.reach >= gain]) for gain in GAINS}
    reach, mean = (Mean.of(v) for v in zip(*((line.reach, line.mean(common)) for line in lines.values())))
    assert reach is not None and mean is not None
    trained = min(point.trained for point in mine), max(point.trained for point in mine)
    return MethodLine(
        name=name,
        hulls=lines,
        trained=trained,
        seconds=statistics.median(seconds) if seconds else None,
        reach=reach,
        mean_forgotten=mean,
        at=at,
        below_reference=None if name == reference else Mean.of(reference_shares),
        below_all=Mean.of(all_shares),
    )


def _others(hulls: dict[str, dict[int, Hull]], name: str, seed: int) -> list[Hull]:
    return [lines[seed] for other, lines in hulls.items() if other != name and seed in lines]


def groups(points: Sequence[LinePoint], reference: str) -> dict[str, Line]:
    """``{what is equal: line}``: all runs; those no longer than the reference's; those of no more trained parameters than the
    reference's largest, and than a share of it."""
    names = list(dict.fromkeys(point.method for point in points))
    found = {"all runs": make_line(points, reference)}
    of_reference = [point for point in points if point.method == reference]
    if not of_reference:
        return found
    times = [point.seconds for point in of_reference if point.seconds is not None]
    if times:
        limit = max(times) * _TIME_TOLERANCE
        short = [point for point in points if point.seconds is not None and point.seconds <= limit]
        found[f"at most {limit:.0f} s of training, as {reference}"] = make_line(short, reference, all_methods=names)
    most = max(point.trained for point in of_reference)
    for share in (1.0, FEW):
        few = [point for point in points if point.trained <= share * most]
        title = f"at most {share * most:,.0f} trained parameters, {share * 100:.0f} % of {reference}"
        found[title] = make_line(few, reference, all_methods=names)
    return found


def mean_points(points: Sequence[LinePoint], method: str) -> list[tuple[str, Mean, Mean]]:
    """Of a method: strength, gained, forgotten, over seeds, by gain."""
    found = []
    for name in dict.fromkeys(p.point for p in points if p.method == method):
        mine = [p for p in points if (p.method, p.point) == (method, name)]
        gained, forgotten = Mean.of([p.gained for p in mine]), Mean.of([p.forgotten for p in mine])
        assert gained is not None and forgotten is not None
        found.append((name, gained, forgotten))
    return sorted(found, key=lambda entry: entry[1].mean)


def to_values(points: Sequence[LinePoint], lines: dict[str, Line], reference: str) -> dict[str, Any]:
    """For JSON: every run, and every group of methods with its figures."""
    return {
        "reference": reference,
        "unit": "nats per token against the base",
        "runs": [dataclasses.asdict(point) for point in points],
        "groups": [
            {"runs": title, "common_gain": line.common, "methods": [_values(m) for m in line.methods]}
            for title, line in lines.items()
        ],
    }


def _values(method: MethodLine) -> dict[str, Any]:
    values = dataclasses.asdict(method)
    values["hulls"] = {str(seed): line.vertices for seed, line in method.hulls.items()}
    values["at"] = {f"{gain:g}": values["at"][gain] for gain in method.at}
    return values
