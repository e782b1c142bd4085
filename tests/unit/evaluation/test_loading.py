"""Models load whole or not at all, and every reason is one line."""

import json
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from llama_of_bytes import make_llama

from megatron_midus.evaluation.loading import check_context, choose_device, load_model, num_embeddings


def test_loads_the_weights(model_directory):
    directory = model_directory(seed=3)
    model, expected = load_model(directory), make_llama(3)
    assert not model.training and num_embeddings(model) == 263
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), expected.state_dict().values()))
    assert load_model(directory, dtype="bfloat16").dtype == torch.bfloat16


def test_half_precision_checkpoints_are_run_in_fp32_on_a_cpu(tmp_path):
    make_llama().to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_model(tmp_path).dtype == torch.float32


def edit_config(directory, **changes):
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def drop_tensor(directory):
    path = str(directory / "model.safetensors")
    tensors = safetensors.torch.load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def spoil(value):
    def spoil(directory):
        path = str(directory / "model.safetensors")
        tensors = safetensors.torch.load_file(path)
        tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = value
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})

    return spoil


def as_megatron(directory):
    (directory / "config.json").unlink()
    (directory / "latest_checkpointed_iteration.txt").write_text("7")


BROKEN = {
    "no config": (lambda d: (d / "config.json").unlink(), "holds no config.json"),
    "Megatron checkpoint": (as_megatron, "export it with midus convert --to hf"),
    "config cut": (lambda d: (d / "config.json").write_text("{"), "is not valid JSON"),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), "holds no JSON object"),
    "unknown architecture": (lambda d: edit_config(d, model_type="nobody_knows"), "cannot be loaded"),
    "quantised by its config alone": (
        lambda d: edit_config(d, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "has a quantization_config: where the weights are in full precision, take it out",
    ),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "cannot be loaded"),
    "a tensor is missing": (drop_tensor, "lack 1 tensors, the first is model.layers.1.mlp.up_proj.weight"),
    "more layers than weights": (lambda d: edit_config(d, num_hidden_layers=3), "lack 9 tensors"),
    "other shapes": (lambda d: edit_config(d, intermediate_size=41), "config.json|cannot be loaded"),
    "own code": (lambda d: edit_config(d, model_type="x", auto_map={"AutoConfig": "a.B"}), "--trust-remote-code"),
    "NaN": (spoil(float("nan")), "model.layers.1.mlp.up_proj.weight in .* holds NaN or infinities"),
    "infinity": (spoil(float("-inf")), "model.layers.1.mlp.up_proj.weight in .* holds NaN or infinities"),
    "cut weights": (lambda d: (d / "model.safetensors").write_bytes(b"12345"), "is damaged or cut off"),
}


@pytest.mark.parametrize("damage, message", BROKEN.values(), ids=BROKEN.keys())
def test_broken_directories(model_directory, damage, message):
    directory = model_directory()
    damage(directory)
    with pytest.raises(ValueError, match=message) as error:
        load_model(directory)
    assert str(directory) in str(error.value) and "\n" not in str(error.value)


def test_missing_directory(tmp_path):
    with pytest.raises(ValueError, match="none does not exist"):
        load_model(tmp_path / "none")


def test_context_length():
    model = make_llama()
    assert check_context(model, 64, name="m") is None
    assert "m was made for 64 tokens" in check_context(model, 65, name="m")
    model.config = type("Learned", (), {"max_position_embeddings": 64})()
    with pytest.raises(ValueError, match="seq_length=65 exceeds the 64 positions of m"):
        check_context(model, 65, name="m")


def test_devices():
    assert choose_device("cpu").type == "cpu" and choose_device(None).type in ("cpu", "cuda")
    for name in ("toaster", "cuda:99"):
        with pytest.raises(ValueError, match=f"device '{name}' is not available here; choose cpu"):
            choose_device(name)


def test_evaluation_needs_no_megatron():
    program = """
import sys
sys.modules["megatron"] = None
import megatron_midus.evaluation.generation, megatron_midus.evaluation.output, megatron_midus.evaluation
import megatron_midus.data.corpus, megatron_midus.data.tokenizer, megatron_midus.data.encoding
"""
    subprocess.run([sys.executable, "-c", program], check=True)
