"""tools/compare.py on two arms: what is done is not done again, an interrupted run ends as one that was not."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megatron_midus.config.compare import CompareConfig
from megatron_midus.errors import UserError
from megatron_midus.verbs import compare as verbs_compare

pytestmark = pytest.mark.usefixtures("warm_executable")

ROOT = Path(__file__).parents[2]
STEPS = 40


def experiment(directory: Path, **midus_flags: float) -> Path:
    """Writes two texts and the file."""
    drawn = random.Random(1)
    words = ["layer", "memory", "token", "of", "the", "loss", "model", "a", "key", "value"]
    for name, count in (("train", 120), ("new", 20)):
        lines = [json.dumps({"text": " ".join(drawn.choices(words, k=40))}) for _ in range(count)]
        (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    memory = {"num_keys": 8, "topk": 4, "latent_size": 16, "query_norm": "rms"}
    entries = {
        "base": str(ROOT / "examples/tiny_base"),
        "data": {"train": [{"text": "train.jsonl"}], "new": "new.jsonl", "third": "train.jsonl"},
        "budget": {"tokens": STEPS * 64},
        "seeds": [1],
        "seq_length": 32,
        "micro_batch_size": 2,
        "global_batch_size": 2,
        "lr": 3e-3,
        "driver": {"num-workers": 0},
        "evaluation": {"points": 2, "valid_batches": 1, "max_tokens": 500},
        "latency": {"rounds": 0},
        "defaults": {"num_blocks": 2},
        "arms": [
            {"name": "pro", "policy": "llama_pro"},
            {"name": "midus", "policy": "interleave", "memory": memory, "driver": midus_flags},
        ],
    }
    path = directory / "mine.yaml"
    path.write_text(yaml.safe_dump(entries))
    return path


def start(file: Path, output: Path) -> subprocess.Popen:
    words = [sys.executable, str(ROOT / "tools/compare.py"), str(file), "--output", str(output)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def compare(file: Path, output: Path) -> list[str]:
    """Runs it to its end; the steps that it ran."""
    process = start(file, output)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    return steps_of(said)


def steps_of(said: str) -> list[str]:
    """``arm, seed: step`` for each that was begun."""
    lines = [line.partition("] ")[2] for line in said.splitlines() if line.startswith("[")]
    return [line for line in lines if not line.startswith("report: ")]


def figures(output: Path) -> dict:
    """What must not depend on when it ran: all losses of all arms."""
    arms = json.loads((output / "results.json").read_text())["arms"]
    found = {}
    for arm in arms:
        (run,) = arm["runs"]
        curves = {kind: [(p["tokens"], p["loss"]) for p in run["curves"][kind]] for kind in ("training", "validation")}
        assert run["old_loss"] is None and run["third_loss"] not in (None, run["new_loss"])
        found[arm["name"]] = (run["new_loss"], curves, arm["lr"])
    return found


def kill_in_training(file: Path, output: Path, log: Path) -> str:
    """Ends the tool as a scheduler does, when the training has made some steps but not all."""
    log.unlink(missing_ok=True)
    process = start(file, output)
    while process.poll() is None and not (log.is_file() and "iteration        3/" in log.read_text()):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate()
    assert process.returncode == 130, said
    assert not (log.parent / "train.done.json").exists()
    return said


@pytest.mark.slow
def test_done_changed_and_interrupted(tmp_path):
    file, output = experiment(tmp_path), tmp_path / "out"
    ran = compare(file, output)
    kinds = ["upscale", "train", "export", "evaluate"]
    assert ran == ["data: tokenise-train-0", "data: tokenise-valid"] + [
        f"{arm}, seed 1, lr 0.003: {kind}" for arm in ("pro", "midus") for kind in kinds
    ]
    whole = figures(output)
    check_same_data(whole)
    for name in ("table.md", "report.html"):
        assert "midus" in (output / name).read_text()

    # A changed arm runs again, and nothing else, also from another place. The flag says what is the default, so the
    # figures must be the same ones, though the training is interrupted in its middle.
    moved = tmp_path / "moved"
    output.rename(moved)
    changed = experiment(tmp_path, clip_grad=1.0)
    log = moved / "runs/midus/seed-1/lr-0.003/train.log"
    said = kill_in_training(changed, moved, log)
    assert steps_of(said) == ["midus, seed 1, lr 0.003: train"]
    assert compare(changed, moved) == [f"midus, seed 1, lr 0.003: {kind}" for kind in kinds[1:]]
    assert "resuming after iteration" in log.read_text()
    assert figures(moved) == whole


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lr_warmup_iters": 999}, "lr_warmup_iters=999 is not shorter than the decay of 40"),
        ({"tensor_model_parallel_size": 2}, "1 processes do not divide into replicas of tensor 2"),
        ({"recompute_granularity": "full"}, "needs --recompute-method"),
    ],
)
def test_what_the_driver_would_refuse_is_said_before_the_first_step(flags, message, tmp_path):
    config = CompareConfig(experiment=str(experiment(tmp_path, **flags)), output=str(tmp_path / "out"))
    with pytest.raises(UserError, match=f"arm 'midus': .*{re.escape(message)}"):
        verbs_compare.compare(config)
    assert not (tmp_path / "out").exists()


def check_same_data(found: dict) -> None:
    """Both arms are the base at step 0, so the loss of the first batch tells whether it is the same batch."""
    (_, pro, _), (_, midus, _) = found["pro"], found["midus"]
    assert [tokens for tokens, _ in pro["training"]] == [64 * (i + 1) for i in range(STEPS)]
    for kind in ("training", "validation"):
        assert pro[kind][0] == pytest.approx(midus[kind][0], rel=1e-6)
        assert pro[kind][-1][1] != midus[kind][-1][1]
        # Words at random, but few: what was trained learnt something.
        assert pro[kind][-1][1] < pro[kind][0][1]
