"""The launch scripts of examples/, from the first to the last, in their tiny form on the CPU."""

import json
import math
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from megatron_midus.conversion.hf_io import SafetensorsReader
from megatron_midus.upscaling import UpscalePlan
from megatron_midus.upscaling.tensors import layer_name, split_name

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = ("01_preprocess.sh", "02_upscale.sh", "03_cpt.sh", "04_export.sh", "05_evaluate.sh")
MODELS = ("llama3.2_1b", "llama3.1_8b", "qwen3_4b")


def free_port() -> str:
    """A port that nobody listens on; nothing here holds it until torchrun does."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return str(store.port)


def environment(work: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "MIDUS_VENV": "none", "WORK": str(work), "MASTER_PORT": free_port(), **more}


def script(model: str, name: str, work: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess:
    command = ["bash", str(EXAMPLES / model / name), *arguments]
    return subprocess.run(command, env=environment(work, **more), capture_output=True, text=True, timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_all_scripts_in_order(model, warm_path, tmp_path):
    output = {}
    # The last script is the same for all models, and its tasks take as long as the other four together.
    is_whole = model == MODELS[0]
    for name in SCRIPTS if is_whole else SCRIPTS[:-1]:
        done = script(model, name, tmp_path, "--tiny", PATH=warm_path)
        assert done.returncode == 0, f"{name}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        output[name] = done.stdout
    statistics = json.loads((tmp_path / "data" / "train_text_document.json").read_text())
    assert statistics["tokens"] > 50_000
    assert "bit-equal yes" in output["02_upscale.sh"]
    assert re.search(r"iteration +6/ +6 ", output["03_cpt.sh"])
    losses = [
        float(x) for x in re.findall(r"validation loss at iteration \d+ \| lm loss value: (\S+)", output["03_cpt.sh"])
    ]
    assert losses[-1] < losses[0] < math.log(2048) + 0.1  # random weights know as little as a die of 2048 sides
    assert "tensors are equal when read back" in output["04_export.sh"]
    config = json.loads((tmp_path / "midus_hf" / "config.json").read_text())
    assert config["model_type"] == "midus" and config["block_types"].count("memory") == 2
    check_weights(tmp_path)
    if is_whole:
        check_evaluation(tmp_path)


def check_evaluation(work: Path) -> None:
    figures = json.loads((work / "evaluation.json").read_text())
    base, midus = (model["results"]["heldout.jsonl"]["loss"] for model in figures["models"])
    assert midus < base
    for report in figures["models"]:
        assert {"arc_easy", "piqa"} <= set(report["tasks"]) and report["latency"]["decode_seconds"] > 0
        assert 0 <= report["tasks"]["piqa"]["acc"]["value"] <= 1 and report["tasks"]["piqa"]["acc"]["stderr"] >= 0
    assert (work / "evaluation.md").read_text().count("|") > 10


def check_weights(work: Path) -> None:
    """What was exported is the base, bit for bit in bf16, and Memory blocks whose values are no longer zero."""
    base, midus = SafetensorsReader(work / "base"), SafetensorsReader(work / "midus_hf")
    plan = UpscalePlan.load(work / "midus_hf")
    kept = [index for index in range(plan.num_layers) if index not in plan.inserted_indices]
    for name in base.names():
        layer, rest = split_name(name)
        exported = midus.read(name if layer is None else layer_name(kept[layer], rest))
        assert torch.equal(base.read(name).bfloat16(), exported), name
    values = [midus.read(name) for name in midus.names() if name.endswith("memory.value_bank")]
    assert len(values) == 2 and all(tensor.any() for tensor in values)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_that_comes_too_early_says_what_to_do(name, tmp_path):
    done = script("llama3.2_1b", name, tmp_path, GPUS_PER_NODE="2")
    assert done.returncode == 1
    assert re.fullmatch(r"error: .* does not exist; .*\n", done.stderr), done.stderr
    assert not list(tmp_path.iterdir())


def test_an_unknown_argument_is_refused(tmp_path):
    done = script("qwen3_4b", "02_upscale.sh", tmp_path, "--num-blocks", "3")
    assert done.returncode == 1 and "error: unknown argument --num-blocks" in done.stderr


def test_every_model_has_every_script():
    for model in MODELS:
        assert {"00_download.md", *SCRIPTS} == {path.name for path in (EXAMPLES / model).iterdir()}
        for name in SCRIPTS:
            assert os.access(EXAMPLES / model / name, os.X_OK)


def test_kubernetes_manifest():
    job = yaml.safe_load((EXAMPLES / "kubernetes" / "pytorchjob.yaml").read_text())
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert job["kind"] == "PyTorchJob" and set(replicas) == {"Master", "Worker"}
    for replica in replicas.values():
        container = replica["template"]["spec"]["containers"][0]
        assert container["name"] == "pytorch"
        command = " ".join(container["args"])
        assert (ROOT / re.search(r"bash (\S+\.sh)", command)[1]).is_file()
        for variable in ("NNODES", "NODE_RANK", "GPUS_PER_NODE"):
            assert f"{variable}=" in command
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        assert mounts == {volume["name"] for volume in replica["template"]["spec"]["volumes"]}
