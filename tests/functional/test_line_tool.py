"""midus compare with strengths: every run of a small experiment, adapters and replay among them, and the line that they make."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest
import yaml

from megatron_midus.config.compare import CompareConfig
from megatron_midus.verbs import compare as verbs_compare

pytestmark = pytest.mark.usefixtures("warm_executable")

ROOT = Path(__file__).parents[2]
NEW = ["layer", "memory", "token", "of", "the", "loss"]
OLD = ["def", "return", "self", "import", "for", "class"]


def experiment(directory: Path) -> Path:
    """Texts of few words and the file."""
    drawn = random.Random(1)
    for name, words, count in (("train", NEW, 60), ("new", NEW, 10), ("old", OLD, 10), ("replay", OLD, 40)):
        lines = [json.dumps({"text": " ".join(drawn.choices(words, k=40))}) for _ in range(count)]
        (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    entries = {
        "base": str(ROOT / "examples/tiny_base"),
        "data": {"train": [{"text": "train.jsonl"}], "replay": [{"text": "replay.jsonl"}], "new": "new.jsonl", "old": "old.jsonl"},
        "budget": {"tokens": 4 * 64},
        "seeds": [1],
        "seq_length": 32,
        "micro_batch_size": 2,
        "global_batch_size": 2,
        "lr": 3e-3,
        "driver": {"num-workers": 0},
        "evaluation": {"points": 1, "valid_batches": 1, "max_tokens": 500},
        "latency": {"rounds": 0},
        "reference": "pro",
        "arms": [
            {"name": "pro", "policy": "llama_pro", "num_blocks": 1, "strengths": {"lr": [1e-3, 1e-2]}},
            {"name": "lora", "policy": "none", "train": "lora", "strengths": {"lora-rank": [2, 4]}},
            {"name": "full", "policy": "none", "train": "all", "strengths": {"replay": [0.5]}},
        ],
    }  # fmt: skip
    path = directory / "line.yaml"
    path.write_text(yaml.safe_dump(entries, sort_keys=False))
    return path


@pytest.mark.slow
def test_the_line_of_a_small_experiment(tmp_path):
    output = tmp_path / "out"
    config = CompareConfig(experiment=str(experiment(tmp_path)), output=str(output))
    done = verbs_compare.compare(config)
    assert not done.failures
    runs = list(csv.DictReader((output / "line.csv").read_text().splitlines()))
    assert [(run["method"], run["strength"]) for run in runs] == [
        ("pro", "lr=0.001"), ("pro", "lr=0.01"), ("lora", "lora-rank=2"), ("lora", "lora-rank=4"), ("full", "replay=0.5"),
    ]  # fmt: skip
    # A few steps on few words: everybody learns, the more with the larger rate.
    gained = [float(run["gained"]) for run in runs]
    assert min(gained) > 0.01 and gained[1] > gained[0]
    # Words of the old text were half of what it read.
    assert float(runs[-1]["forgotten"]) < 0
    for name in ("line.html", "line.md", "line.svg", "line.json"):
        assert "lora" in (output / name).read_text()
    # What is done is not done again, and the page of a part is made of its runs and the base.
    part = CompareConfig(experiment=config.experiment, output=config.output, arms=["lora"], report_only=True)
    assert [arm.name for arm in verbs_compare.compare(part).results.arms] == [
        "base",
        "lora@lora-rank=2",
        "lora@lora-rank=4",
    ]
