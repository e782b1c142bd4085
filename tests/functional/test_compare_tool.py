"""tools/compare.py on two arms: what is done is not done again, an interrupted run ends as one that was not."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
STEPS = 20


def experiment(directory: Path, midus_rate: float = 3e-3) -> Path:
    """Writes two texts and the file."""
    drawn = random.Random(1)
    words = ["layer", "memory", "token", "of", "the", "loss", "model", "a", "key", "value"]
    for name, count in (("train", 120), ("new", 20)):
        lines = [json.dumps({"text": " ".join(drawn.choices(words, k=40))}) for _ in range(count)]
        (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    memory = {"num_keys": 8, "topk": 4, "latent_size": 16, "query_norm": "rms"}
    entries = {
        "base": str(ROOT / "examples/tiny_base"),
        "data": {"train": [{"text": "train.jsonl"}], "new": "new.jsonl"},
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
            {"name": "midus", "policy": "interleave", "lr": midus_rate, "memory": memory},
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
    return [line.partition("] ")[2] for line in said.splitlines() if line.startswith("[") and ": " in line][:-1]


def figures(output: Path) -> dict:
    """What must not depend on when it ran: all losses of all arms."""
    arms = json.loads((output / "results.json").read_text())["arms"]
    found = {}
    for arm in arms:
        (run,) = arm["runs"]
        curves = {kind: [(p["tokens"], p["loss"]) for p in run["curves"][kind]] for kind in ("training", "validation")}
        found[arm["name"]] = (run["new_loss"], curves, arm["lr"])
    return found


def kill_in_training(file: Path, output: Path, log: Path) -> None:
    """Ends the tool as a scheduler does, when the training has made some steps but not all."""
    process = start(file, output)
    while process.poll() is None and not (log.is_file() and "iteration        3/" in log.read_text()):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate()
    assert process.returncode == 130, said
    assert not (log.parent / "export.done.json").exists()


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

    # Nothing is left to do, nor after a move: the settings are the same.
    moved = tmp_path / "moved"
    output.rename(moved)
    assert compare(file, moved) == [] and figures(moved) == whole

    # A changed arm runs again, without the up-scaling, which does not depend on its learning rate.
    changed = compare(experiment(tmp_path, midus_rate=1e-2), moved)
    assert changed == [f"midus, seed 1, lr 0.01: {kind}" for kind in kinds[1:]]
    other = figures(moved)
    assert other["pro"] == whole["pro"] and other["midus"][0] != whole["midus"][0]

    # Interrupted in the middle of a training, it goes on to the same figures.
    run = moved / "runs/midus/seed-1/lr-0.01"
    shutil.rmtree(run)
    kill_in_training(file, moved, run / "train.log")
    assert compare(file, moved) == changed and figures(moved) == other


def check_same_data(found: dict) -> None:
    """Both arms are the base at step 0, so the loss of the first batch tells whether it is the same batch."""
    (_, pro, _), (_, midus, _) = found["pro"], found["midus"]
    assert [tokens for tokens, _ in pro["training"]] == [64 * (i + 1) for i in range(STEPS)]
    for kind in ("training", "validation"):
        assert pro[kind][0] == pytest.approx(midus[kind][0], rel=1e-6)
        assert pro[kind][-1][1] != midus[kind][-1][1]
        # Words at random, but few: what was trained learnt something.
        assert pro[kind][-1][1] < pro[kind][0][1]
