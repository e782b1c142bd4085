"""The README's first command, from the corpus to the generated text, with fewer training steps."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_quickstart(tmp_path):
    environment = {**os.environ, "MIDUS_VENV": "none", "TRAIN_ITERS": "12"}
    command = ["bash", str(ROOT / "examples" / "quickstart.sh"), str(tmp_path / "out")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "bit-equal yes" in run.stdout
    figures = json.dumps(json.loads((tmp_path / "out" / "evaluation.json").read_text()))
    assert "midus_hf" in figures and "tiny_base" in figures
    losses = [float(x) for x in re.findall(r"validation loss at iteration \d+ \| lm loss value: (\S+)", run.stdout)]
    assert losses[-1] < losses[0] - 0.05  # nats; the base is far from this domain, and 12 steps are worth 0.15
    for name in ("upscaled", "checkpoints", "midus_hf", "tensorboard"):
        assert (tmp_path / "out" / name).is_dir()
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert again.returncode == 1 and "is not empty" in again.stderr
