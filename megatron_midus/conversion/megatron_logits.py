"""Logits of a Megatron checkpoint on one CPU process of its own, to compare with those of the Hugging Face model.

python -m megatron_midus.conversion.megatron_logits ITERATION_DIRECTORY TOKENS.pt LOGITS.pt [--round-to DTYPE]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from megatron_midus import cli
from megatron_midus.config import ModelConfig
from megatron_midus.config.parser import ArgumentParser
from megatron_midus.errors import UserError
from megatron_midus.upscaling import UpscalePlan


def megatron_logits(directory: str | Path, ids: torch.Tensor, *, round_to: str) -> torch.Tensor:
    """fp32 logits of the model in ``directory``.

    In another process, because Megatron-Core on a CPU needs functions of torch replaced; it sees no GPU.

    Args:
        directory: an ``iter_*`` directory.
        ids: token ids, ``[b, s]``.
        round_to: dtype that the weights are rounded to first, for instance that of an export.

    Returns:
        ``[b, s, vocabulary]``.

    Raises:
        ValueError: the checkpoint cannot be read or run; with the last line that the process wrote.
    """
    with tempfile.TemporaryDirectory(prefix="midus-logits-") as temporary:
        given, made = Path(temporary) / "tokens.pt", Path(temporary) / "logits.pt"
        torch.save(ids, given)
        command = [sys.executable, "-m", __name__, str(directory), str(given), str(made), "--round-to", round_to]
        root = str(Path(__file__).parents[2])
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            environment.pop(name, None)
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise UserError(f"{directory} does not run in Megatron: {reason.removeprefix('error: ')}")
        return torch.load(made, weights_only=True)


def _run(directory: Path, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from megatron.core import parallel_state, tensor_parallel

    from megatron_midus.model.builder import build_model, make_transformer_config
    from megatron_midus.model.checkpoint import load_weights
    from megatron_midus.platform import initialize_distributed

    initialize_distributed("gloo")
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    model, plan = ModelConfig.load(directory), UpscalePlan.load(directory)
    built = build_model(make_transformer_config(model, plan), model=model, plan=plan, sequence_length=ids.shape[1])
    load_weights([built], directory)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(parameter.to(dtype).to(parameter.dtype))
        logits = built.eval()(ids, torch.arange(ids.shape[1])[None].expand_as(ids), None)
    torch.distributed.destroy_process_group()
    return logits[..., : model.vocab_size].clone()


def main() -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("logits", type=Path)
    parser.add_argument("--round-to", choices=["float32", "bfloat16", "float16"], default="float32")
    args = parser.parse_args()
    torch.save(
        _run(args.directory, torch.load(args.tokens, weights_only=True), getattr(torch, args.round_to)), args.logits
    )
    return 0


if __name__ == "__main__":
    cli.run(main)
