"""Models go through the converters in a part of their size in memory, whatever the size of their shards."""

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
# Half as wide as Llama-3.2-1B, and a small vocabulary: 0.5 GB in bf16 in one file, its largest tensor 0.02 GB.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 10_000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "torch_dtype": "bfloat16",
}
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


def write_base(directory, config, least):
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


@pytest.mark.parametrize(("config", "size", "workers", "share"), [(CONFIG, 500, 2, 0.5), (EXPERTS, 150, 1, 0.1)])
def test_both_directions(directory, config, size, workers, share):
    """Beside a small model, whose conversion comes first, so that what tools import does not count."""
    size *= 10**6
    small = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 500, "num_hidden_layers": 2}
    write_base(directory / "small", {**config, **(small if config is CONFIG else {"num_experts": 4})}, least=0)
    write_base(directory / "base", config, least=size)

    def convert(tool, *arguments):
        words = {name: [word.format(name) for word in map(str, arguments)] for name in ("small", "base")}
        return peak(tool, *words["small"], "THEN", *words["base"], "--workers", workers)

    up = [
        "--hf-model",
        f"{directory}/{{}}",
        "--save",
        f"{directory}/{{}}_megatron",
        "--num-blocks",
        1,
        "--memory-num-keys",
        16,
    ]
    down = ["--load", f"{directory}/{{}}_megatron", "--save", f"{directory}/{{}}_hf", "--to", "hf"]
    # Measured: 81 to 146 MB of the first, by how the two workers meet in the large tensors; 3 and 5 MB of the second.
    peaks = convert("upscale.py", *up), convert("convert_checkpoint.py", *down)
    print(peaks)
    assert max(peaks) < size * share
    assert len(list((directory / "base_hf").glob("*.safetensors"))) == 1
    found = SafetensorsReader(directory / "base_hf").names()
    assert sum(name.endswith("experts.gate_up_proj") for name in found) == (6 if config is EXPERTS else 0)
