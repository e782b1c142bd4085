"""Mistakes as a person meets them at the launcher: the last line that torchrun prints, and warnings before training."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from driver import TINY_MODEL, TINY_RUN, train

ROOT = Path(__file__).parents[2]


def torchrun(*words: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, str(ROOT / "pretrain_midus.py"), *" ".join(words).split()],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


def last_line(text: str) -> str:
    return [line.strip() for line in text.splitlines() if re.search(r"\w", line)][-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ("--train-iters 2 --save /proc/nowhere", 1, "error: --save /proc/nowhere cannot be written"),
        ("--trian-iters 2", 2, "error: --trian-iters is no flag; did you mean --train-iters?"),
    ],
)
def test_the_last_line_under_torchrun_is_the_mistake(flags, code, message):
    done = torchrun(*TINY_MODEL, *TINY_RUN, flags)
    assert done.returncode != 0
    assert last_line(done.stderr).startswith(message)
    # Said once by the rank, at once, and once by torchrun at the end; the other rank is silent.
    assert done.stderr.count(message) == 2 and done.stderr.startswith(message)
    assert f"exitcode  : {code} " in done.stderr


@pytest.mark.slow
def test_a_bug_leaves_its_traceback_for_torchrun(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import megatron_midus.training.main as main\n"
        "def broken(arguments): raise KeyError('a bug of ours')\n"
        "main.check_files = broken\n"
    )
    done = torchrun(*TINY_MODEL, *TINY_RUN, "--train-iters 2", PYTHONPATH=f"{tmp_path}:{ROOT}")
    end = done.stderr.split("Root Cause")[1]
    assert "in broken" in end and last_line(end) == "KeyError: 'a bug of ours'"


def test_sequences_longer_than_the_model_was_made_for_are_said_and_the_model_keeps_the_truth(tmp_path):
    run = train(*TINY_MODEL, *TINY_RUN, "--train-iters 1 --max-position-embeddings 16 --save", tmp_path).check()
    warning = "warning: --seq-length 32 is longer than the 16 positions that the model was made for"
    assert run.err.count(warning) == 1 and "same frequencies" in run.err
    stored = json.loads((tmp_path / "iter_0000001" / "model_config.json").read_text())
    assert stored["max_position_embeddings"] == 16
    again = train(*TINY_RUN, "--train-iters 1 --seq-length 16 --load", tmp_path).check()
    assert "longer than" not in again.err
