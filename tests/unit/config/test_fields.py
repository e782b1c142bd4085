"""Flags made from dataclasses: names, types, defaults and help come from the fields."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Literal

import pytest

from megatron_midus.config.fields import add_arguments, field_docs, flag_name, from_namespace
from megatron_midus.config.parser import ArgumentParser
from megatron_midus.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Parent:
    """Things"""

    num_things: int = 3
    """Things, 100 % of them."""

    names: list[str] | None = None
    """Names."""


@dataclasses.dataclass(frozen=True)
class Example(Parent):
    """Example settings

    More words.
    """

    rate: float | None = None
    """Rate, per second."""

    kind: Literal["a", "b"] = "a"
    """Kind."""

    level: Literal[0, 1] = 0
    """Level."""

    is_on: bool = dataclasses.field(default=True, metadata={"aliases": ("--is_on-literally", "is_active")})
    """On or off."""

    hidden: int = dataclasses.field(default=7, metadata={"flag": False})
    """No flag."""

    sizes: tuple[int, ...] = (1, 2)
    """Sizes."""


def parse(*words: str, **options) -> argparse.Namespace:
    parser = ArgumentParser()
    add_arguments(parser, Example, **options)
    return parser.parse_args(words)


def test_defaults_are_the_dataclass_defaults():
    assert from_namespace(Example, parse()) == Example()


def test_values_are_parsed_by_the_type_of_the_field():
    words = [
        "--num-things",
        "4",
        "--names",
        "x",
        "y",
        "--rate",
        "0.5",
        "--kind",
        "b",
        "--level",
        "1",
        "--no-is-on",
        "--sizes",
        "3",
    ]
    made = from_namespace(Example, parse(*words))
    assert made == Example(num_things=4, names=["x", "y"], rate=0.5, kind="b", level=1, is_on=False, sizes=[3])
    assert isinstance(made.level, int)


@pytest.mark.parametrize("flag", ["--no-is_on-literally", "--no-is-active"])
def test_aliases_work_as_the_flag_does(flag):
    assert parse(flag).is_on is False


@pytest.mark.parametrize("words", [["--kind", "c"], ["--level", "2"], ["--hidden", "1"], ["--num-things", "x"]])
def test_what_does_not_fit_is_refused(words):
    with pytest.raises(UsageError, match=words[0]):
        parse(*words)


def test_suppressed_defaults_leave_out_what_was_not_given():
    assert vars(parse("--rate", "1", suppress_defaults=True)) == {"rate": 1.0}


def test_excluded_fields_have_no_flag():
    assert "kind" not in vars(parse(exclude=("kind",)))


def test_help_shows_docstring_and_default():
    parser = ArgumentParser()
    add_arguments(parser, Example)
    text = " ".join(parser.format_help().split())
    assert "Example settings:" in text
    assert "Things, 100 % of them. (default: 3)" in text
    assert "Rate, per second." in text and "per second. (default" not in text
    assert "Sizes. (default: 1 2)" in text


def test_docs_of_base_classes_are_found():
    assert list(field_docs(Example)) == ["num_things", "names", "rate", "kind", "level", "is_on", "hidden", "sizes"]


def test_flag_name():
    assert flag_name("num_query_groups") == "--num-query-groups"
