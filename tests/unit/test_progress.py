"""Progress where the output is no terminal: a line a minute, with what is left."""

from __future__ import annotations

import io

import pytest

from megatron_midus import progress
from megatron_midus.progress import Bars


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_a_minute(clock):
    file = io.StringIO()
    with Bars(file)("reading", total=1000, unit="token") as advance:
        for _ in range(9):
            clock[0] += 10
            advance(50)
    assert file.getvalue() == "reading: 300 of 1,000 token (30 %), 5 token/s, 2 min 20 s left\n"


def test_a_step_goes_on_where_it_was(clock):
    file = io.StringIO()
    with Bars(file)("encode", total=7400, unit="B", initial=100) as advance:
        clock[0] += 61
        advance(61)
    assert file.getvalue() == "encode: 161 of 7,400 B (2 %), 1 B/s, 2 h 00 min left\n"


def test_without_a_total(clock):
    file = io.StringIO()
    with Bars(file)("encode", unit="B") as advance:
        clock[0] += 60
        advance(1200)
    assert file.getvalue() == "encode: 1,200 B, 20 B/s\n"


def test_short_steps_say_nothing(clock):
    file = io.StringIO()
    with Bars(file)("reading", total=10) as advance:
        clock[0] += 59
        advance(10)
    assert file.getvalue() == ""
