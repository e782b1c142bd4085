"""Order and statistics of the timing; no test here looks at how long anything took."""

import pytest

from megatron_midus.benchmark import timing
from megatron_midus.benchmark.timing import Summary, interleave, ratio


def test_every_contender_is_timed_in_every_round_on_fresh_data():
    calls = []
    contenders = {
        name: [lambda name=name: calls.append((name, "f")), lambda name=name: calls.append((name, "b"))]
        for name in "abc"
    }
    times = interleave(contenders, refresh=lambda: calls.append("fresh"), rounds=20, warmup=2, device="cpu")
    assert {name: [len(phase) for phase in phases] for name, phases in times.items()} == {n: [20, 20] for n in "abc"}
    rounds = [calls[i : i + 7] for i in range(0, len(calls), 7)]
    assert len(rounds) == 22
    firsts = set()
    for first, *others in rounds:
        assert first == "fresh"
        assert sorted(others) == sorted((n, p) for n in "abc" for p in "fb")
        assert [p for _, p in others] == ["f", "b"] * 3, "backward comes straight after its forward"
        firsts.add(others[0][0])
    assert firsts == set("abc"), "nobody is always first"


def test_summary():
    summary = Summary.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (summary.median, summary.lower_quartile, summary.upper_quartile) == (3.0, 2.0, 4.0)
    assert (summary.minimum, summary.rounds) == (1.0, 5)
    assert Summary.of([7.0]) == Summary(7.0, 7.0, 7.0, 7.0, 1)


def test_ratios_are_taken_round_by_round():
    """The second round was slow for both: the ratio of the medians would be wrong, the median of the ratios is not."""
    mine, theirs = [[1.0, 10.0, 1.0], [1.0, 10.0, 1.0]], [[2.0, 20.0, 2.0], [2.0, 20.0, 2.0]]
    assert ratio(mine, theirs) == Summary(0.5, 0.5, 0.5, 0.5, 3)


def test_phases_are_timed_apart(monkeypatch):
    clock = iter([0.0, 1.0, 4.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    assert timing.time_phases([lambda: None, lambda: None], device="cpu") == pytest.approx([1e3, 3e3])
