"""Compile gate: every Triton kernel compiles for Hopper and Ampere and needs no more than the committed table."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[3]
TABLE = Path(__file__).parent / "triton_resources.json"

# Bytes of stack that kernels may use, by the start and the end of their names; all others none. All lie outside the loops
# over the tiles of scores, where lists of several columns are merged. On Ampere the scores of a tile stand in registers
# beside the selection, where Hopper keeps one operand in shared memory.
MAY_SPILL = {
    ("sm_90 1b-n512-k16-block ", "select_kernel"): 216,
    ("sm_90 8b-n512-k16 ", "select_kernel"): 96,
    ("sm_90 1b-n256-k16-full ", "select_kernel"): 24,
    ("sm_80 1b-n512-k16-block ", "select_kernel"): 1608,
    ("sm_80 1b-n256-k8 ", "select_kernel"): 1448,
    ("sm_80 ", "select_kernel"): 168,
}
SHARED_LIMIT = {"sm_90": 227 * 1024, "sm_80": 163 * 1024}


def kernel_resources(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: in this one Triton interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "tools" / "kernel_resources.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


def test_committed_table_spills_nothing_but_what_is_stated():
    table = json.loads(TABLE.read_text())
    assert {name.split()[0] for name in table} == set(SHARED_LIMIT)
    for name, found in table.items():
        allowed = next(
            (n for (first, last), n in MAY_SPILL.items() if name.startswith(first) and name.endswith(last)), 0
        )
        assert found["spill_bytes"] <= allowed, name
        assert found["registers"] <= 255
        assert found["shared_bytes"] <= SHARED_LIMIT[name.split()[0]], name


def test_kernels_compile_within_the_table_for_ampere():
    found = kernel_resources("--check", str(TABLE), "--capability", "80", "--shapes", "1b-n512-k16")
    assert found.returncode == 0, found.stderr


@pytest.mark.slow
def test_all_kernels_compile_within_the_table():
    found = kernel_resources("--check", str(TABLE), "--capability", "90")
    assert found.returncode == 0, found.stderr
    names = {name for name in json.loads(TABLE.read_text()) if name.startswith("sm_90 ")}
    assert {" ".join(line.split()[:3]) for line in found.stdout.splitlines()} == names


def test_a_kernel_that_needs_more_is_named():
    spec = importlib.util.spec_from_file_location("kernel_resources", ROOT / "tools" / "kernel_resources.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    table = json.loads(TABLE.read_text())
    tool.check(table, table)
    name = "sm_90 1b-n512-k16 _sum_runs_kernel"
    needs_more = {name: table[name] | {"registers": table[name]["registers"] + 1}}
    with pytest.raises(ValueError, match=f"{name}: registers 62, committed 61"):
        tool.check(needs_more, table)
    with pytest.raises(ValueError, match="sm_90 new kernel: registers 61, committed None"):
        tool.check({"sm_90 new kernel": table[name]}, table)
