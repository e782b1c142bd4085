"""A random model in the shape of a real one, small enough for a CPU, with the tokenizer of examples/tiny_base.

Everything that a family does differently is kept (rope scaling, tied embeddings, normalised queries, head size that is
not hidden size / heads); only the sizes shrink. It has learned nothing: it is there to try the launch scripts.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, PretrainedConfig, Qwen3Config

from megatron_midus.cli import run
from megatron_midus.config.parser import ArgumentParser
from megatron_midus.files import staged_directory

TOKENIZER = Path(__file__).resolve().parents[1] / "tiny_base"
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama3_rope(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def llama(factor: float, *, tied: bool) -> PretrainedConfig:
    rope = llama3_rope(factor)
    return LlamaConfig(
        **SIZES, max_position_embeddings=131072, rms_norm_eps=1e-5, tie_word_embeddings=tied, rope_parameters=rope
    )


def qwen3() -> PretrainedConfig:
    rope = {"rope_type": "default", "rope_theta": 1000000.0}
    return Qwen3Config(
        **SIZES,
        head_dim=32,
        max_position_embeddings=40960,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        rope_parameters=rope,
    )


# Named as the directories of examples/ are.
FAMILIES = {
    "llama3.2_1b": lambda: llama(32.0, tied=True),
    "llama3.1_8b": lambda: llama(8.0, tied=False),
    "qwen3_4b": qwen3,
}


def make_model(family: str, directory: Path) -> None:
    """Writes model and tokenizer; ``directory`` is made whole or not at all."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]())
    with staged_directory(directory) as staged:
        model.save_pretrained(staged)
        for path in TOKENIZER.iterdir():
            if path.name.startswith(("tokenizer", "special_tokens")):
                shutil.copyfile(path, staged / path.name)


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", required=True, choices=sorted(FAMILIES), help="whose shape it takes")
    parser.add_argument("--save", required=True, type=Path, metavar="DIR", help="output directory")
    args = parser.parse_args(argv)
    make_model(args.family, args.save)
    return 0


if __name__ == "__main__":
    run(main)
