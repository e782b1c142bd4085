"""--deterministic-mode tells every library, before it starts, and torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

# The environment and torch's switch as they are when the run ends; in a process of its own, because both stay.
PROGRAM = """
import os, sys
from megatron_midus.training import main
os.environ.pop("NCCL_ALGO", None)
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"
code = main.main(sys.argv[1:])
import torch
print([os.environ.get(n) for n in main.DETERMINISTIC_ENVIRONMENT], torch.are_deterministic_algorithms_enabled())
"""
RUN = (
    "--distributed-backend gloo --mock-data --num-workers 0 --seq-length 8 --lr 1e-3 --train-iters 1 --num-layers 1 "
    "--hidden-size 8 --num-attention-heads 2 --vocab-size 11 --eval-interval 0 --eval-iters 0"
)


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--deterministic-mode", "[':16:8', '0', 'Ring'] True"),  # what the user has set stays
        ("--no-deterministic-mode", "[':16:8', None, None] False"),
    ],
)
def test_the_flag_reaches_every_library(flag, expected):
    run = subprocess.run([sys.executable, "-c", PROGRAM, *RUN.split(), flag], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == expected
