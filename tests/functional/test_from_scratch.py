"""A model that the driver trained from scratch has no Hugging Face source, and is exported all the same."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from driver import TINY_RUN, train
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
BASE = ROOT / "examples" / "tiny_base"
SHAPE = (
    "--num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --num-query-groups 2 --kv-channels 16"
)


def convert(*arguments) -> None:
    spec = importlib.util.spec_from_file_location("convert_checkpoint", ROOT / "tools" / "convert_checkpoint.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    assert module.main([str(a) for a in arguments]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("features", "architecture"),
    [
        ("--tie-word-embeddings", "LlamaForCausalLM"),
        ("--add-qkv-bias", "Qwen2ForCausalLM"),
        ("--qk-layernorm", "Qwen3ForCausalLM"),
    ],
)
def test_trained_from_flags_loads_in_transformers(features, architecture, tmp_path):
    tokenizer = f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {BASE}"
    train(*TINY_RUN, SHAPE, features, tokenizer, "--train-iters 2 --train all --save", tmp_path / "checkpoints").check()
    convert("--load", tmp_path / "checkpoints", "--save", tmp_path / "hf", "--to", "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == [architecture]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert type(model).__name__ == architecture
    assert config["eos_token_id"] == loaded.eos_token_id == 2
    ids = loaded("def main():", return_tensors="pt", return_token_type_ids=False)["input_ids"]
    assert torch.isfinite(model(ids).logits).all()
