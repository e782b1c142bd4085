"""The driver and the benchmark let idle OpenMP threads sleep; torch reads that when it is imported, so it must come first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Prints what the policy is when torch is about to be imported, or at the end of a program that imports it later.
PROGRAM = """
import os, runpy, sys
class Watch:
    def find_spec(self, name, *rest):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Watch())
runpy.run_path(sys.argv[1], run_name="imported")
print(os.environ.get("OMP_WAIT_POLICY"))
"""


@pytest.mark.parametrize("program", ["pretrain_midus.py", "tools/benchmark.py"])
@pytest.mark.parametrize("chosen", [None, "ACTIVE"])
def test_waiting_is_chosen_before_torch(program, chosen):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": chosen} if chosen else {}
    command = [sys.executable, "-c", PROGRAM, str(ROOT / program)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == (chosen or "PASSIVE"), done.stderr
