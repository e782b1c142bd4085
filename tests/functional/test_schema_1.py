"""What was written before the value bank had its name stays readable by every tool: a trained checkpoint and an export."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from driver import train
from upscaled import read_tensors, read_weights

from megatron_midus.conversion.hf_io import SafetensorsReader
from megatron_midus.evaluation.loading import load_model

pytestmark = pytest.mark.usefixtures("warm_executable")

TESTS = Path(__file__).parents[1]
FIXTURE = TESTS / "fixtures" / "schema_1"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text())
OLD_NAME, NEW_NAME = "model.layers.1.memory.values", "model.layers.1.memory.value_bank"
STORED = "decoder.layers.1.self_attention.linear_proj.values"
sys.path.append(str(TESTS / "fixtures"))


def convert(*arguments) -> None:
    from tools import convert_checkpoint

    assert convert_checkpoint.main([str(a) for a in arguments]) == 0


def logits(directory) -> torch.Tensor:
    with torch.no_grad():
        return load_model(directory)(torch.tensor(EXPECTED["tokens"])).logits


def stored_names(directory) -> set[str]:
    from safetensors import safe_open

    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return set(file.keys())


def test_the_fixtures_are_of_the_earlier_version():
    assert OLD_NAME in stored_names(FIXTURE / "export") and NEW_NAME not in stored_names(FIXTURE / "export")
    for path in (FIXTURE / "export", FIXTURE / "checkpoint" / "iter_0000002"):
        assert json.loads((path / "midus_plan.json").read_text())["schema_version"] == 1
    tensors = read_tensors(FIXTURE / "checkpoint", 2)
    assert tensors[STORED].abs().min() > 0 and tensors[f"optimizer.state.exp_avg.{STORED}"].any()


def test_an_earlier_checkpoint_becomes_an_export_with_the_new_name(tmp_path):
    convert("--load", FIXTURE / "checkpoint", "--save", tmp_path / "hf", "--to", "hf", "--verify", "logits")
    old, new = SafetensorsReader(FIXTURE / "export"), SafetensorsReader(tmp_path / "hf")
    assert NEW_NAME in stored_names(tmp_path / "hf") and OLD_NAME not in stored_names(tmp_path / "hf")
    assert set(old.names()) == set(new.names())
    assert all(torch.equal(old.read(name), new.read(name)) for name in old.names())
    assert json.loads((tmp_path / "hf" / "midus_plan.json").read_text())["schema_version"] == 2


def test_an_earlier_export_goes_back_to_megatron(tmp_path):
    convert("--load", FIXTURE / "export", "--save", tmp_path / "back", "--to", "megatron", "--verify", "logits")
    found, expected = read_weights(tmp_path / "back", 0), read_weights(FIXTURE / "checkpoint", 2)
    vocabulary = {name for name in expected if name.split(".")[0] in ("embedding", "output_layer")}
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name][:31] if name in vocabulary else found[name], tensor), name


def test_an_earlier_export_is_evaluated_and_saved_under_the_new_name(tmp_path):
    # fp32 on another processor: other orders of sums
    torch.testing.assert_close(logits(FIXTURE / "export"), torch.tensor(EXPECTED["logits"]), rtol=0, atol=1e-5)
    load_model(FIXTURE / "export").save_pretrained(tmp_path / "saved")
    assert NEW_NAME in stored_names(tmp_path / "saved") and OLD_NAME not in stored_names(tmp_path / "saved")
    assert torch.equal(logits(tmp_path / "saved"), logits(FIXTURE / "export"))


def test_the_code_that_an_earlier_export_carries_reads_it():
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    model_class = get_class_from_dynamic_module("modeling_midus.MidusForCausalLM", str(FIXTURE / "export"))
    model = model_class.from_pretrained(FIXTURE / "export").float()
    with torch.no_grad():
        found = model(torch.tensor(EXPECTED["tokens"])).logits
    torch.testing.assert_close(found, torch.tensor(EXPECTED["logits"]), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_training_resumes_with_the_earlier_optimizer_state(tmp_path):
    from make_schema_1 import RUN

    shutil.copytree(FIXTURE / "checkpoint", tmp_path / "run")
    more = ["--train-iters 4 --override-opt_param-scheduler", "--load"]
    run = train(*RUN, *more, tmp_path / "run", "--save", tmp_path / "run").check()
    assert list(run.losses) == [3, 4]
    for iteration, loss in EXPECTED["losses"].items():
        assert float(run.losses[int(iteration)]) == pytest.approx(float(loss), rel=2e-6)
    fresh = train(*RUN, *more, FIXTURE / "checkpoint", "--no-load-optim").check()
    assert fresh.losses[4] != run.losses[4], "the moments change nothing here, so the comparison shows nothing"
    stored = read_tensors(tmp_path / "run", 4)
    assert set(stored) == set(read_tensors(FIXTURE / "checkpoint", 2))
