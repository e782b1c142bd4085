"""The README's table of tested versions says what the constraints pin."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]


def pinned(python: str) -> dict[str, str]:
    """``{package: version}`` of constraints.txt on one Python."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    found = [r for r in map(Requirement, lines) if r.marker is None or r.marker.evaluate({"python_version": python})]
    assert len({r.name for r in found}) == len(found), "a package is pinned twice"
    return {r.name: str(r.specifier).removeprefix("==") for r in found}


def table() -> dict[str, list[str]]:
    rows = re.findall(r"^\| (Python|megatron-core|torch|transformers) \| (\S+) \| (\S+) \|$", (ROOT / "README.md").read_text(), re.M)  # fmt: skip
    return {name: [old, new] for name, old, new in rows}


@pytest.mark.parametrize("world", [0, 1])
def test_the_table_of_versions_is_what_is_pinned(world):
    found = table()
    pins = pinned(found["Python"][world])
    assert {name: versions[world] for name, versions in found.items() if name != "Python"} == {
        name: pins[name] for name in ("megatron-core", "torch", "transformers")
    }


def test_setup_accepts_both_releases():
    accepted = re.search(r'"megatron-core(>=[^"]+)"', (ROOT / "setup.py").read_text())
    assert accepted and all(version in SpecifierSet(accepted[1]) for version in table()["megatron-core"])


def test_versions_are_said_in_one_place():
    """No other page has a table of tested versions; results name what they were measured with."""
    for page in (ROOT / "docs").glob("*.md"):
        assert not re.search(r"^\| megatron-core \|", page.read_text(), re.M), page
