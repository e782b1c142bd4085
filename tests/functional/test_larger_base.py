"""The script for a larger base in its tiny form: corpus, base, export, and every method of the line."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_tiny_form_trains_a_base_and_every_method(tmp_path, warm_path):
    out = tmp_path / "out"
    environment = {**os.environ, "MIDUS_VENV": "none", "TINY": "1", "PATH": warm_path}
    command = [shutil.which("bash"), str(ROOT / "examples/larger_base/run.sh"), str(out)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert json.loads((out / "base/hf/config.json").read_text())["num_hidden_layers"] == 2
    results = json.loads((out / "line/results.json").read_text())
    methods = {arm["name"].partition("@")[0] for arm in results["arms"]}
    assert methods == {"base", "midus", "token", "token-gate", "llama_pro", "lora", "control"}
    assert "FAILED" not in run.stdout and (out / "line/line.svg").exists()
    # What is done is not done again.
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0 and ": train" not in again.stdout
