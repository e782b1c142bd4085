"""Mappings into dataclasses: every type, every mistake in one line that says where."""

import dataclasses
import math
from typing import Any, Literal

import pytest

from megatron_midus.config.schema import build, check_keys, parse_number


@dataclasses.dataclass
class Inner:
    rate: float
    kind: Literal["gloo", "nccl"] = "gloo"


@dataclasses.dataclass
class Outer:
    name: str
    steps: int = 1
    is_on: bool = False
    rates: list[float] | None = None
    inner: Inner | None = None
    more: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.steps < 0:
            raise ValueError(f"steps={self.steps} must be 0 or more")


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e-3", 1e-3), ("2M", 2e6), ("1.5G", 1.5e9), ("3k", 3e3), ("2_000_000", 2e6), (7, 7), ("1T", 1e12),
     ("1P", 1e15), ("2E", 2e18), (" 4 ", 4), ("M", None), ("", None), ("12MB", None), (None, None), ([], None)],
)  # fmt: skip
def test_numbers(text, number):
    assert parse_number(text) == (number if number is None else pytest.approx(number))


def test_a_whole_mapping():
    values = {
        "name": "a",
        "steps": "2k",
        "rates": "1e-3",
        "inner": {"rate": "1e-2", "kind": "nccl"},
        "more": {"x": [1]},
    }
    found = build(Outer, values, "f")
    assert found == Outer("a", 2000, False, [1e-3], Inner(1e-2, "nccl"), {"x": [1]})
    assert isinstance(found.steps, int)
    assert build(Outer, {"name": "a", "rates": ["1e-3", 2], "inner": None}, "f").rates == [1e-3, 2.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "a", "step": 2}, "f: unknown key 'step'; did you mean steps?"),
        ({"name": "a", "zzz": 2}, "f: unknown key 'zzz'; choose one of name, steps, is_on, rates, inner, more"),
        ({}, "f: 'name' is missing"),
        ([1], "f: [1] is not a mapping of 'key: value' lines"),
        ({1: 2}, "f: {1: 2} is not a mapping of 'key: value' lines"),
        ({"name": 3}, "f: name: 3 is not a text; put it in quotes"),
        ({"name": "a", "steps": 1.5}, "f: steps: 1.5 is not a whole number"),
        ({"name": "a", "steps": True}, "f: steps: True is not a whole number"),
        ({"name": "a", "steps": None}, "f: steps: None is not a whole number"),
        ({"name": "a", "is_on": "yes"}, "f: is_on: 'yes' is not true or false"),
        ({"name": "a", "rates": [1, "x"]}, "f: rates[1]: 'x' is not a number"),
        ({"name": "a", "rates": [math.inf]}, "f: rates[0]: inf is not a number"),
        ({"name": "a", "inner": {"kind": "gloo"}}, "f: inner: 'rate' is missing"),
        ({"name": "a", "inner": {"rate": 1, "kind": "mpi"}}, "f: inner: kind: 'mpi' is not one of gloo, nccl"),
        ({"name": "a", "more": [1]}, "f: more: [1] is not a mapping of 'key: value' lines"),
        ({"name": "a", "steps": -1}, "f: steps=-1 must be 0 or more"),
        ({"name": "a", "steps": "x" * 80}, "f: steps: '" + "x" * 56 + "... is not a whole number"),
    ],
)
def test_mistakes(values, message):
    with pytest.raises(ValueError) as caught:
        build(Outer, values, "f")
    assert str(caught.value) == message


def test_known_keys_pass():
    check_keys(["a", "b"], ["b", "a"], "f")
