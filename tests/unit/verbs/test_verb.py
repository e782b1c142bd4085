"""Verbs as functions: keywords with the names of flags, mistakes, progress."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import megatron_midus
from megatron_midus.config.fields import part
from megatron_midus.errors import UserError
from megatron_midus.progress import SILENT, Callback
from megatron_midus.verbs.verb import verb


@dataclasses.dataclass(frozen=True)
class Inner:
    """Inner"""

    size: int = 3
    """Size."""


@dataclasses.dataclass(frozen=True)
class Outer:
    """Outer"""

    name: str
    """Name."""

    rates: list[float] = dataclasses.field(default_factory=list)
    """Rates."""

    inner: Inner = part(Inner)
    given: dict = part(Inner, given_only=True)


@verb(Outer)
def work(config, progress):
    """Works."""
    with progress("working", total=2, unit="thing") as advance:
        advance(1)
        advance(1)
    return config


def test_keywords_are_flags():
    made = work(name="a", size=4, rates=[1, 2.5], progress=SILENT)
    assert made == Outer("a", [1.0, 2.5], Inner(4), {"size": 4})
    assert work.__doc__ == "Works." and work.__name__ == "work"


def test_a_configuration_and_changes_to_it():
    assert work(Outer("a"), name="b", progress=SILENT).name == "b"


def test_paths_are_texts():
    assert work(name=Path("a") / "b", progress=SILENT).name == "a/b"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nam": "a"}, r"work\(\): unknown key 'nam'; did you mean name\?"),
        ({}, r"work\(\): 'name' is missing"),
        ({"name": "a", "size": "x"}, r"work\(\): size: 'x' is not a whole number"),
        ({"name": True}, r"work\(\): name: True is not a text"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        work(**settings, progress=SILENT)


def test_progress_is_told():
    seen = []
    work(name="a", progress=Callback(lambda *told: seen.append(told)))
    assert seen == [("working", 1, 2), ("working", 2, 2)]


def test_the_package_has_every_verb():
    from megatron_midus.command import SUMMARIES

    assert set(megatron_midus.__all__) == set(SUMMARIES)
    for name in megatron_midus.__all__:
        assert callable(getattr(megatron_midus, name)), name
    with pytest.raises(AttributeError, match="no attribute 'upscail'"):
        megatron_midus.upscail  # noqa: B018
