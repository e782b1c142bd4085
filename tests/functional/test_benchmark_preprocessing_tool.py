"""tools/benchmark_preprocessing.py runs both sides on the same text and says what it found. How fast is not tested."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("warm_executable")

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools/benchmark_preprocessing.py"


def run(*arguments):
    command = [sys.executable, str(TOOL), "--tokenizer-model", str(ROOT / "examples/tiny_base"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_both_sides(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "def main() -> int:"}\n\n{"text": "größe"}')
    done = run("--input", tmp_path, "--workers", 2, "--megabytes", 0.3, "--shards", 2)
    assert done.returncode == 0, done.stderr
    rates = [[float(x) for x in re.findall(r"\d+\.\d+", line)] for line in done.stdout.splitlines()[3:6]]
    (alone, alone_each), (together, together_each), (ours, ours_each) = rates
    assert alone == alone_each
    # Two decimals are printed.
    for whole, each in ((together, together_each), (ours, ours_each)):
        assert abs(whole - 2 * each) <= 0.015
    shards = re.findall(
        r"^(\d) shards? at once: (\S+) MB/s, (\S+) s of a core for each MB, merged in", done.stdout, re.MULTILINE
    )
    assert [count for count, _, _ in shards] == ["2"] and all(float(used) > 0 for _, _, used in shards)
    ratio = float(re.search(r"a worker: (\d+\.\d+) of a loop alone", done.stdout)[1])
    assert abs(ratio - ours_each / alone) <= 0.005 + 0.01 * ratio / alone + 0.01 / alone


def test_mistakes_are_one_line(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.jsonl").write_text('{"body": "x"}')
    for name, message in {"a.txt": "not a plain .jsonl file", "b.jsonl": "with the key 'text'"}.items():
        done = run("--input", tmp_path / name, "--megabytes", 0.01)
        assert done.returncode == 1 and message in done.stderr.splitlines()[-1] and done.stdout == ""
