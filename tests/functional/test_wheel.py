"""The wheel alone: the whole journey with ``midus`` in an empty directory, without the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A directory with what the wheel installs; its dependencies are those of this environment."""
    root = tmp_path_factory.mktemp("wheel")
    source = root / "source"
    # A build writes into its source directory.
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "setup.py", "pyproject.toml", "README.md", "pretrain_midus.py", "megatron_midus", "examples"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    for name in filter(None, tracked):
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(root / "dist"), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = (root / "dist").glob("*.whl")
    install = [*pip, "install", "--no-deps", "--target", str(root / "site"), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    return root / "site"


@pytest.fixture(scope="module")
def run(site, tmp_path_factory):
    """Runs ``midus`` of the wheel in an empty directory and returns its output."""
    directory = tmp_path_factory.mktemp("empty")
    environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run(*words: str, code: int = 0) -> str:
        done = subprocess.run(
            [str(site / "bin/midus"), *words], cwd=directory, env=environment, capture_output=True, text=True
        )
        assert done.returncode == code, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    run.directory, run.site = directory, site
    shutil.copytree(ROOT / "examples/tiny_base", directory / "base", ignore=shutil.ignore_patterns("recipe"))
    text = [{"text": f"Slot {i} holds a value. The head reads slot {i}."} for i in range(400)]
    (directory / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in text))
    return run


def test_the_package_is_the_wheels(site, run):
    assert str(site) in run("doctor", code=0).splitlines()[0]


def test_the_journey(run):
    blocks = ("--num-blocks", "2", "--memory-num-keys", "16", "--memory-topk", "4", "--memory-latent-size", "16")
    assert "written: up" in run("upscale", "--hf-model", "base", "--save", "up", *blocks)
    assert "data/text_text_document" in run(
        "preprocess", "--input", "text.jsonl", "--tokenizer-model", "base", "--output-prefix", "data/text", "--append-eod"
    )  # fmt: skip
    log = run(
        "pretrain", "--distributed-backend", "gloo", "--pretrained-checkpoint", "up", "--load", "run", "--save", "run",
        "--save-interval", "2", "--data-path", "data/text_text_document", "--split", "100,0,0", "--eval-iters", "0",
        "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "base", "--seq-length", "32",
        "--micro-batch-size", "2", "--global-batch-size", "2", "--train-iters", "2", "--lr", "1e-3", "--log-interval", "1",
    )  # fmt: skip
    assert "iteration        2/       2" in log
    assert "written: midus_hf" in run("convert", "--load", "run", "--save", "midus_hf", "--to", "hf")
    table = run(
        "evaluate", "--model", "base", "midus_hf", "--data", "text.jsonl", "--seq-length", "64", "--max-tokens", "500"
    )
    assert "midus_hf against base" in table
    assert run("generate", "--model", "midus_hf", "--prompt", "Slot", "--generate-tokens", "3").startswith("Slot")


def test_the_wheel_brings_the_recipes(run):
    shown = run("recipe", "show", "llama3.2_1b", "--step", "upscale")
    assert "--num-blocks=8" in shown and "--memory-num-keys=512" in shown
    assert "get it with: hf download Qwen/Qwen3-4B-Base" in run(
        "recipe", "run", "qwen3_4b", "--step", "upscale", code=1
    )


def test_the_wheel_makes_a_tiny_model_by_itself(run):
    text = ("--train-text", "text.jsonl", "--heldout-text", "text.jsonl")
    run("recipe", "run", "llama3.2_1b", "--tiny", "--step", "preprocess", *text)
    assert (run.directory / "runs/llama3.2_1b-tiny/base/model.safetensors").is_file()
    examples = run.site / "megatron_midus/examples"
    assert (examples / "make_corpus.py").is_file()
    shown = run("recipe", "show", "llama3.2_1b", "--tiny", "--step", "evaluate")
    assert f"--task-data={examples}/task_data" in shown and (examples / "task_data/arc_easy.jsonl").is_file()
