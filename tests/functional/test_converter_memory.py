"""A model of 2 GB goes through the converters in under 1 GB of memory, whatever the size of its shards."""

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
from megatron_midus.conversion.hf_io import write_safetensors
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
MODEL = ModelConfig(
    num_layers=14,
    hidden_size=2048,
    ffn_hidden_size=8192,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=64,
    vocab_size=43_000,
    max_position_embeddings=4096,
)
GIGABYTE = 10**9


class Synthetic:
    """A ``TensorSource`` of numbers that are quick to make."""

    def __init__(self) -> None:
        self._shapes = model_shapes(MODEL, none(num_layers=MODEL.num_layers))

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


def write_base(directory):
    directory.mkdir()
    write_safetensors(Synthetic(), directory)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    size = (directory / "model.safetensors").stat().st_size
    assert size > 2 * GIGABYTE  # one file: a shard does not fit in 1 GB
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
