"""A model of 2 GB goes through the converters in under 1 GB of memory, whatever the size of its shards; a mixture whose
experts are most of it in a fraction of its size."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from megatron_midus.config import ModelConfig
from megatron_midus.conversion.families import from_hf_config
from megatron_midus.conversion.hf_io import SafetensorsReader, write_safetensors
from megatron_midus.upscaling.policies import none
from megatron_midus.upscaling.tensors import model_shapes

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).with_name("converter_memory_program.py")
TOOLS = Path(__file__).parents[2] / "tools"
# The sizes of Llama-3.2-1B with 14 layers, an output layer of its own and a third of its vocabulary: 2.0 GB in bf16, its
# largest tensor 0.18 GB.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 14,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 43_000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "torch_dtype": "bfloat16",
}
GIGABYTE = 10**9
# 384 experts in 1,152 tensors of 0.13 MB, 0.15 GB in bf16.
EXPERTS = {
    **CONFIG,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 1000,
    "num_experts": 64,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 256,
    "norm_topk_prob": True,
}


class Synthetic:
    """A ``TensorSource`` of numbers that are quick to make."""

    def __init__(self, model: ModelConfig) -> None:
        self._shapes = model_shapes(model, none(num_layers=model.num_layers))

    def names(self):
        return list(self._shapes)

    def shape(self, name):
        return self._shapes[name]

    def dtype(self, name):
        return torch.bfloat16

    def read(self, name):
        numbers = torch.arange(torch.Size(self._shapes[name]).numel(), dtype=torch.int32)
        return numbers.remainder_(997).sub_(498).to(torch.bfloat16).div_(10_000).view(self._shapes[name])


@pytest.fixture
def directory():
    """Not tmp_path, whose gigabytes would stay."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def write_base(directory, config=CONFIG, least=2 * GIGABYTE):
    directory.mkdir()
    write_safetensors(Synthetic(from_hf_config(config)), directory)
    (directory / "config.json").write_text(json.dumps(config))
    size = (directory / "model.safetensors").stat().st_size
    assert size > least  # one file: a shard does not fit in the bound
    return directory


def peak(tool, *arguments):
    command = [sys.executable, PROGRAM, TOOLS / tool, *arguments]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    print(done.stdout[-400:])
    return int(re.search(r"peak above imports: (\d+) bytes", done.stdout).group(1))


def test_both_directions(directory):
    base, megatron = write_base(directory / "base"), directory / "megatron"
    memory = ["--num-blocks", 2, "--memory-num-keys", 64, "--workers", 2]
    # Two workers: measured 0.58 and 0.68 GB.
    assert peak("upscale.py", "--hf-model", base, "--save", megatron, *memory) < GIGABYTE
    assert peak("convert_checkpoint.py", "--load", megatron, "--save", directory / "hf", "--to", "hf", "--workers", 2) < GIGABYTE  # fmt: skip
    assert len(list((directory / "hf").glob("*.safetensors"))) == 1


def test_experts_in_both_directions(directory):
    """Beside a small mixture, whose conversion comes first, so that what tools import does not count."""
    size = GIGABYTE * 3 // 20
    names = {"base": EXPERTS, "small": {**EXPERTS, "num_experts": 4}}
    for name, config in names.items():
        write_base(directory / name, config, least=size if name == "base" else 0)

    def convert(tool, arguments):
        words = {name: [word.format(name) if isinstance(word, str) else word for word in arguments] for name in names}
        return peak(tool, *words["small"], "THEN", *words["base"])

    memory = ["--num-blocks", 2, "--memory-num-keys", 16, "--workers", 1]
    up = ["--hf-model", f"{directory}/{{}}", "--save", f"{directory}/{{}}_megatron", *memory]
    down = ["--load", f"{directory}/{{}}_megatron", "--save", f"{directory}/{{}}_hf", "--to", "hf", "--workers", 1]
    # Measured 5 and 6 MB, with twice the experts too.
    assert convert("upscale.py", up) < size / 10
    assert convert("convert_checkpoint.py", down) < size / 10
    found = SafetensorsReader(directory / "base_hf")
    assert sum(name.endswith("experts.gate_up_proj") for name in found.names()) == 6
