"""A tiny experiment for the tests of this directory: a base of 4 layers, texts of a few words."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

from megatron_midus.comparison.arms import resolve
from megatron_midus.comparison.experiment import Experiment, read_experiment
from megatron_midus.comparison.runs import Runs
from megatron_midus.config import ModelConfig
from megatron_midus.training.arguments import build_parser

MODEL = ModelConfig(
    num_layers=4,
    hidden_size=24,
    ffn_hidden_size=40,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=10,
    vocab_size=37,
    max_position_embeddings=64,
)

VALUES: dict[str, Any] = {
    "base": "base",
    "data": {"train": [{"text": "train.jsonl"}], "new": "new.jsonl"},
    "budget": {"tokens": 4096},
    "seeds": [1, 2],
    "seq_length": 32,
    "global_batch_size": 4,
    "lr": "1e-3",
    "defaults": {"num_blocks": 2, "memory": {"num_keys": 8, "topk": 4, "latent_size": 6}},
    "arms": [
        {"name": "pro", "policy": "llama_pro"},
        {"name": "midus", "policy": "interleave", "lr": ["1e-3", "1e-2"], "driver": {"value-lr-mult": 30}},
        {"name": "base", "policy": "none", "train": "none"},
    ],
}


def values(**changes: Any) -> dict[str, Any]:
    """The entries of the file; ``None`` takes one away."""
    found = {**copy.deepcopy(VALUES), **changes}
    return {key: value for key, value in found.items() if value is not None}


def read(directory: Path, entries: dict[str, Any] | None = None, output: str | Path = "out") -> Experiment:
    """Writes base, texts and file into ``directory``, and reads the file."""
    base = directory / "base"
    base.mkdir(exist_ok=True)
    (base / "config.json").write_text("{}")
    for name in ("train.jsonl", "new.jsonl"):
        (directory / name).write_text('{"text": "some words"}\n')
    path = directory / "mine.yaml"
    path.write_text(yaml.safe_dump(values() if entries is None else entries, sort_keys=False))
    return read_experiment(path, directory / output)


def make_runs(directory: Path, entries: dict[str, Any] | None = None, output: str | Path = "out") -> Runs:
    """Its steps."""
    driver = build_parser()
    experiment = read(directory, entries, output)
    return Runs(experiment, resolve(experiment, MODEL, driver), directory / output, driver)
