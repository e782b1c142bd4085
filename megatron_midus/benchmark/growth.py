"""Sub-command growth: how time and peak memory of a look-up grow with each of its sizes, and of an iteration with blocks.

One size is varied at a time. An exponent is the slope of the line through the logarithms, by least squares: 1 = twice
the size takes twice as much. The ideal one is that of the necessary work (``work.py``) at the same sizes on the same
machine: what the roofline of this run allows, and the bytes that cannot be given back before a pass has ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_midus.benchmark.ceilings import Ceilings, measure_ceilings
from megatron_midus.benchmark.contenders import Contender, find_contenders, make_operands
from megatron_midus.benchmark.hml import peak_of, phases_of
from megatron_midus.benchmark.parity import Check, require_parity
from megatron_midus.benchmark.peak import own_process
from megatron_midus.benchmark.result import BenchmarkResult, Section, make_rows
from megatron_midus.benchmark.settings import GrowthSettings, TrainSettings
from megatron_midus.benchmark.shapes import Shape, find_shapes
from megatron_midus.benchmark.timing import interleave
from megatron_midus.benchmark.work import bytes_held, work_of
from megatron_midus.report.machine import machine_facts

BLOCKS = "num_blocks"  # the axis of whole iterations


@dataclasses.dataclass(frozen=True)
class Growth:
    """One contender along one axis.

    Attributes:
        values: of the axis at which it was measured, rising.
        milliseconds, peak_bytes: at each of them.
        time_exponent, peak_exponent: slopes; ``None`` with fewer than three points.
        ideal_time_exponent, ideal_peak_exponent: of the necessary work; ``None`` likewise, or where it is not known.
    """

    shape: str
    axis: str
    contender: str
    values: list[int]
    milliseconds: list[float]
    peak_bytes: list[int | None]
    time_exponent: float | None
    ideal_time_exponent: float | None
    peak_exponent: float | None
    ideal_peak_exponent: float | None


def run_growth(settings: GrowthSettings) -> BenchmarkResult:
    """Measures every axis; raises ``ParityError`` before anything is timed when a contender is wrong."""
    device = settings.resolved_device()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    sections = []
    for shape in find_shapes(settings.shape, dtype=settings.dtype):
        checks = require_parity(_contenders(shape, settings, device)[0], shape, device=device, seed=settings.seed)
        ceilings = measure_ceilings(device, shape.torch_dtype)
        for axis in settings.axes:
            measure = _measure_blocks if axis == BLOCKS else _measure_axis
            sections += measure(shape, axis, settings, device, ceilings, checks)
    return BenchmarkResult("growth", dataclasses.asdict(settings), device, machine_facts(), sections)


def fit_growth(sections: Sequence[Section]) -> list[Growth]:
    """A line through what was measured, for every contender and axis, in the order of the sections."""
    points: dict[tuple[str, str, str], list[tuple[int, float, int | None, float | None, float | None]]] = {}
    for section in sections:
        axis, shape = section.extra["axis"], section.extra["base_shape"]
        for row in section.rows:
            least = None if row.roofline_share is None else row.roofline_share * row.total.median
            held = section.extra["bytes_held"].get(row.name)
            point = (section.extra["value"], row.total.median, row.peak_bytes, least, held)
            points.setdefault((shape, axis, row.name), []).append(point)
    found = []
    for (shape, axis, name), measured in points.items():
        values, times, peaks, least, held = (list(column) for column in zip(*measured))
        slopes = [_slope(values, column) for column in (times, least, peaks, held)]
        found.append(Growth(shape, axis, name, values, times, peaks, *slopes))
    return found


def _slope(values: Sequence[int], measured: Sequence[float | None]) -> float | None:
    """Least squares through the logarithms; ``None`` with fewer than three points or one that is not known."""
    if len(values) < 3 or any(y is None or y <= 0 for y in measured):
        return None
    x, y = ([math.log(each) for each in column] for column in (values, measured))  # type: ignore[arg-type]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum((a - mean_x) ** 2 for a in x)


def shape_at(shape: Shape, axis: str, value: int) -> Shape:
    """The shape with another size; all others stay. Fewer heads than groups have as many groups."""
    changes = {axis: value}
    if axis == "num_heads":
        changes["num_groups"] = math.gcd(shape.num_groups, value)
    return dataclasses.replace(shape, name=f"{shape.name} {axis}={value}", **changes)


def _contenders(shape: Shape, settings: GrowthSettings, device: str) -> tuple[list[Contender], list[str]]:
    backends = settings.backends or [find_contenders(shape, backends=None, baselines=[], device=device)[0][0].name]
    return find_contenders(shape, backends=backends, baselines=settings.baselines, device=device)


def _measure_axis(
    shape: Shape, axis: str, settings: GrowthSettings, device: str, ceilings: Ceilings, checks: list[Check]
) -> list[Section]:
    """A section for each size, smallest first; who would take too long or too much at the next one is left out there."""
    with contextlib.ExitStack() as stack:
        processes = {c.name: stack.enter_context(own_process()) for c in _contenders(shape, settings, device)[0]}
        return _measure_sizes(shape, axis, settings, device, ceilings, checks, processes)


def _measure_sizes(
    shape: Shape,
    axis: str,
    settings: GrowthSettings,
    device: str,
    ceilings: Ceilings,
    checks: list[Check],
    processes: dict[str, Callable[..., Any]],
) -> list[Section]:
    """``processes``: by contender, what measures its memory."""
    sections: list[Section] = []
    left_out: dict[str, str] = {}
    for value in settings.sizes(axis, shape):
        at = shape_at(shape, axis, value)
        everyone, notes = _contenders(at, settings, device)
        contenders = []
        for contender in everyone:
            reason = left_out.get(contender.name) or _too_much(contender, at, axis, sections, settings)
            if reason is None:
                contenders.append(contender)
            else:
                left_out[contender.name] = reason
        if not contenders:
            break
        work = {c.name: work_of(c.function, at, at.tokens) for c in contenders}
        peaks = {}
        if settings.measure_memory:
            peaks = {
                c.name: processes[c.name](peak_of, at, c.name, device, settings.seed, threads=settings.threads)
                for c in contenders
            }
        rows = make_rows(
            _time(at, contenders, settings, device),
            ["forward", "backward"],
            {},
            work=work,
            ceilings=ceilings,
            peaks=peaks,
        )
        held = {c.name: bytes_held(c.function, at, at.tokens) for c in contenders}
        extra = {"axis": axis, "value": value, "base_shape": shape.name, "bytes_held": held}
        notes += [f"{name}: {reason}" for name, reason in left_out.items()]
        title = f"growth {at.name}"
        sections.append(
            Section(title, at.describe(), dataclasses.asdict(at), rows, [], ceilings, checks, notes, extra=extra)
        )
    return sections


def _time(
    shape: Shape, contenders: list[Contender], settings: GrowthSettings, device: str
) -> dict[str, list[list[float]]]:
    """One contender's operands at a time: those of all together would not fit where one's do."""
    times = {}
    for contender in contenders:
        operands = make_operands(shape, contender.function, tokens=shape.tokens, device=device, seed=settings.seed)
        times |= interleave(
            {contender.name: phases_of(contender, operands)},
            refresh=operands.refresh,
            rounds=settings.rounds,
            warmup=settings.warmup,
            device=device,
        )
    return times


def _too_much(
    contender: Contender, shape: Shape, axis: str, sections: list[Section], settings: GrowthSettings
) -> str | None:
    """Why a contender is not measured at a shape: by what it took at the size before, times what its work grows by."""
    if not sections:
        return None
    before = sections[-1]
    row = next((r for r in before.rows if r.name == contender.name), None)
    if row is None:
        return f"not measured at {before.extra['value']}"
    last = Shape(**before.shape)
    grows = bytes_held(contender.function, shape, shape.tokens) / bytes_held(contender.function, last, last.tokens)
    seconds = row.total.median / 1e3 * _flops(contender, shape) / _flops(contender, last)
    if seconds > settings.limit_seconds:
        return f"from {axis}={getattr(shape, axis)} on about {seconds:.2g} s a pass (--limit-seconds)"
    gigabytes = (row.peak_bytes or bytes_held(contender.function, last, last.tokens)) * grows / 1e9
    if gigabytes > settings.limit_gigabytes:
        return f"from {axis}={getattr(shape, axis)} on about {gigabytes:.2g} GB (--limit-gigabytes)"
    return None


def _flops(contender: Contender, shape: Shape) -> float:
    return sum(phase.flops for phase in work_of(contender.function, shape, shape.tokens))


def _measure_blocks(
    shape: Shape, axis: str, settings: GrowthSettings, device: str, ceilings: Ceilings, checks: list[Check]
) -> list[Section]:
    """Whole iterations with 1, 2, 4 … inserted blocks, by sub-command train."""
    from megatron_midus.benchmark.train import measure_training, start

    sections = []
    shared = {field.name for field in dataclasses.fields(TrainSettings)} & set(vars(settings))
    told = TrainSettings(
        **{**{name: getattr(settings, name) for name in shared}, "variants": ["copied", "memory", "token"]}
    )
    start(device, told)
    for value in settings.sizes(axis, shape):
        section = measure_training(dataclasses.replace(shape, num_blocks=value), told, device)
        extra = {"axis": axis, "value": value, "base_shape": shape.name, "bytes_held": {}}
        rows = [dataclasses.replace(row, ratios={}) for row in section.rows]
        title = f"growth {shape.name} {axis}={value}"
        sections.append(dataclasses.replace(section, title=title, rows=rows, baselines=[], checks=checks, extra=extra))
    return sections
