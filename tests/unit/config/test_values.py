"""Mappings into dataclasses: every type, every mistake in one line that says where."""

import dataclasses
import math
from typing import Any, Literal

import pytest

from megatron_midus.config.fields import add_arguments, from_namespace
from megatron_midus.config.parser import ArgumentParser
from megatron_midus.config.run_file import words_of_entries
from megatron_midus.config.values import build, check_keys, parse_number
from megatron_midus.errors import UserError


@dataclasses.dataclass(frozen=True)
class Steps:
    """Steps"""

    steps: int = 1
    """Steps."""


@dataclasses.dataclass
class Inner:
    rate: float
    kind: Literal["gloo", "nccl"] = "gloo"


@dataclasses.dataclass
class Outer:
    name: str
    steps: int = 1
    is_on: bool = False
    level: Literal[0, 1] = 0
    rates: list[float] | None = None
    inner: Inner | None = None
    more: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.steps < 0:
            raise ValueError(f"steps={self.steps} must be 0 or more")


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e-3", 1e-3), ("9007199254740993", 2**53 + 1), ("inf", None), ("2M", 2e6), ("1.5G", 1.5e9), ("3k", 3e3), ("2_000_000", 2e6), (7, 7), ("1T", 1e12),
     ("1P", 1e15), ("2E", 2e18), (" 4 ", 4), ("M", None), ("", None), ("12MB", None), (None, None), ([], None)],
)  # fmt: skip
def test_numbers(text, number):
    assert parse_number(text) == number


def test_a_whole_mapping():
    values = {
        "name": "a",
        "steps": "2k",
        "level": "1",
        "rates": "1e-3",
        "inner": {"rate": "1e-2", "kind": "nccl"},
        "more": {"x": [1]},
    }
    found = build(Outer, values, "f")
    assert found == Outer("a", 2000, False, 1, [1e-3], Inner(1e-2, "nccl"), {"x": [1]})
    assert isinstance(found.steps, int)
    assert build(Outer, {"name": "a", "rates": ["1e-3", 2], "inner": None}, "f").rates == [1e-3, 2.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "a", "step": 2}, "f: unknown key 'step'; did you mean steps?"),
        ({"name": "a", "zzz": 2}, "f: unknown key 'zzz'; choose one of name, steps, is_on, level, rates, inner, more"),
        ({}, "f: 'name' is missing"),
        ([1], "f: [1] is not a mapping of 'key: value' lines"),
        ({1: 2}, "f: {1: 2} is not a mapping of 'key: value' lines"),
        ({"name": True}, "f: name: True is not a text; put it in quotes"),
        ({"name": ["a"]}, "f: name: a list, where one value is expected"),
        ({"name": "a", "level": True}, "f: level: True is not a whole number"),
        ({"name": "a", "level": "2"}, "f: level: 2 is not one of 0, 1"),
        ({"name": "a", "steps": "1e400"}, "f: steps: '1e400' is not a whole number"),
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


@pytest.mark.parametrize("word", ["12", "2k", "1e3", "2_000", "9007199254740993"])
def test_a_flag_a_file_and_a_call_read_a_number_alike(word):
    parser = ArgumentParser()
    add_arguments(parser, Steps)
    typed = from_namespace(Steps, parser.parse_args(["--steps", word]))
    filed = from_namespace(Steps, parser.parse_args(words_of_entries(parser, {"steps": word}, where="f")))
    assert typed == filed == build(Steps, {"steps": word}, "f") and typed.steps == parse_number(word)


@pytest.mark.parametrize("word", ["x", "1.5", "inf", ""])
def test_a_flag_a_file_and_a_call_refuse_a_number_alike(word):
    parser = ArgumentParser()
    add_arguments(parser, Steps)
    ways = [
        lambda: parser.parse_args(["--steps", word]),
        lambda: words_of_entries(parser, {"steps": word}, where="f"),
        lambda: build(Steps, {"steps": word}, "f"),
    ]
    for way in ways:
        with pytest.raises(UserError) as caught:
            way()
        assert str(caught.value).endswith(f"steps: {word!r} is not a whole number")


def test_known_keys_pass():
    check_keys(["a", "b"], ["b", "a"], "f")
