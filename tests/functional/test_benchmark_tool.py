"""tools/benchmark.py as it is called: every sub-command at a tiny shape, and every way to ask it for nonsense."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("warm_executable")

TOOL = Path(__file__).parents[2] / "tools/benchmark.py"


def run_tool(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_hml_with_memory_json_and_plot(tmp_path):
    done = run_tool(
        "hml", "--shape", "tiny", "--device", "cpu", "--threads", 1, "--rounds", 2, "--decode-tokens", 0,
        "--backends", "torch", "--baselines", "ffn", "--json", tmp_path / "a.json", "--plot", tmp_path / "a.png",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "hml tiny" in done.stdout and "time / ffn" in done.stdout
    report = json.loads((tmp_path / "a.json").read_text())
    assert [row["name"] for row in report["sections"][0]["rows"]] == ["torch", "ffn"]
    assert all(row["peak_bytes"] is not None for row in report["sections"][0]["rows"])
    assert "hml --shape tiny" in report["command"] and (tmp_path / "a.png").stat().st_size > 10_000


def test_layer(tmp_path):
    done = run_tool(
        "layer", "--shape", "tiny", "--device", "cpu", "--rounds", 2, "--no-measure-memory",
        "--json", tmp_path / "a.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (section,) = json.loads((tmp_path / "a.json").read_text())["sections"]
    assert [row["name"] for row in section["rows"]] == ["copied", "memory", "token"]
    assert [list(row["ratios"]) for row in section["rows"]] == [[], ["copied"], ["copied", "memory"]] and section[
        "checks"
    ]


@pytest.mark.slow
def test_train_with_memory(tmp_path):
    done = run_tool(
        "train", "--shape", "tiny", "--device", "cpu", "--rounds", 2, "--json", tmp_path / "a.json",
        "--variants", "copied", "memory", "watched", "floor",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (section,) = json.loads((tmp_path / "a.json").read_text())["sections"]
    assert {row["name"]: list(row["ratios"]) for row in section["rows"]} == {
        "copied": ["floor"], "memory": ["copied", "floor"], "watched": ["memory"], "floor": [],
    }  # fmt: skip
    assert all(row["peak_bytes"] > 0 for row in section["rows"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["hml", "--shape", "nope"], "shape 'nope' is not known"),
        (["hml", "--shape", "tiny", "--backends", "nope"], "backend 'nope' cannot run"),
        (["train", "--shape", "tiny", "--backend", "nope"], "backend 'nope' cannot run"),
        (["hml", "--shape", "tiny", "--json", "/dev/null/a.json"], "/dev/null is not a writable directory"),
    ],
)
def test_mistakes_are_one_line(arguments, words):
    done = run_tool(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and words in done.stderr and len(done.stderr.splitlines()) == 1
