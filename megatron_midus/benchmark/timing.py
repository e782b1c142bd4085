"""Timing of contenders in turn: each round gives every one of them the same fresh data, in a random order."""

from __future__ import annotations

import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch

Phases = Sequence[Callable[[], None]]
"""What one contender does in a round, e.g. forward, then backward; each phase is timed by itself."""

_SLEEP_CYCLES = 2_000_000  # about a millisecond of a GPU: kernels queue up behind it, so launches cost nothing


@dataclasses.dataclass(frozen=True)
class Summary:
    """Times of one phase, milliseconds."""

    median: float
    lower_quartile: float
    upper_quartile: float
    minimum: float
    rounds: int

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Summary:
        times = sorted(milliseconds)
        if len(times) == 1:
            return cls(times[0], times[0], times[0], times[0], 1)
        lower, median, upper = statistics.quantiles(times, n=4, method="inclusive")
        return cls(median, lower, upper, times[0], len(times))


def _time_on_cpu(phases: Phases) -> list[float]:
    marks = [time.perf_counter()]
    for phase in phases:
        phase()
        marks.append(time.perf_counter())
    return [1e3 * (after - before) for before, after in zip(marks, marks[1:])]


def _time_on_cuda(phases: Phases, hide_launches: bool) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(phases) + 1)]
    torch.cuda.synchronize()
    if hide_launches:
        torch.cuda._sleep(_SLEEP_CYCLES)
    events[0].record()
    for phase, event in zip(phases, events[1:]):
        phase()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in zip(events, events[1:])]


def time_phases(phases: Phases, *, device: str, hide_launches: bool = True) -> list[float]:
    """Milliseconds of each phase. On a GPU between events in its queue, after everything before has ended."""
    return _time_on_cuda(phases, hide_launches) if device == "cuda" else _time_on_cpu(phases)


def interleave(
    contenders: dict[str, Phases],
    *,
    refresh: Callable[[], None],
    rounds: int,
    warmup: int,
    device: str,
    hide_launches: bool = True,
) -> dict[str, list[list[float]]]:
    """Times every contender once a round, in an order drawn for each round.

    A machine that slows down, and what a predecessor leaves in the caches, then meets all of them alike: behind another
    look-up a decoding step finds its sub-keys in the cache, behind an FFN it does not.

    Args:
        contenders: by name.
        refresh: makes fresh data; it is not timed.
        rounds, warmup: rounds that count, and rounds before them that do not.
        device: ``cpu`` or ``cuda``.
        hide_launches: on a GPU, leave out the time in which it waits for the CPU to launch.

    Returns:
        Per contender one list of milliseconds for each phase.
    """
    names, order = list(contenders), random.Random(0)
    times: dict[str, list[list[float]]] = {name: [[] for _ in phases] for name, phases in contenders.items()}
    for index in range(warmup + rounds):
        refresh()
        order.shuffle(names)
        for name in names:
            measured = time_phases(contenders[name], device=device, hide_launches=hide_launches)
            if index >= warmup:
                for phase, milliseconds in zip(times[name], measured):
                    phase.append(milliseconds)
    return times


def ratio(times: list[list[float]], other: list[list[float]]) -> Summary:
    """Time of all phases over the other's, round by round, so that what slows down a whole round cancels."""
    mine, theirs = ([sum(phases) for phases in zip(*x)] for x in (times, other))
    return Summary.of([a / b for a, b in zip(mine, theirs)])
