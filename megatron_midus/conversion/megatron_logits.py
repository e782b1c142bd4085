"""Logits of a Megatron checkpoint on one CPU process of its own, to compare with those of the Hugging Face model.

python -m megatron_midus.conversion.megatron_logits ITERATION_DIRECTORY TOKENS.pt LOGITS.pt [--round-to DTYPE] [--states]

With --states LOGITS.pt holds what the modules of the model put out as well, under the names of transformers.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

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
    return _in_process(directory, ids, "--round-to", round_to)["logits"]


def megatron_states(directory: str | Path, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """``{name in transformers: what the module puts out}``, ``[b, s, channels]`` fp32, of a model without experts; ``logits``.

    ``model.layers.0:input`` and ``…o_proj:input`` are what a module gets. Args and errors as of ``megatron_logits``.
    """
    return _in_process(directory, ids, "--states")


def _in_process(directory: str | Path, ids: torch.Tensor, *flags: str) -> dict[str, torch.Tensor]:
    with tempfile.TemporaryDirectory(prefix="midus-logits-") as temporary:
        given, made = Path(temporary) / "tokens.pt", Path(temporary) / "logits.pt"
        torch.save(ids, given)
        command = [sys.executable, "-m", __name__, str(directory), str(given), str(made), *flags]
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


def _run(directory: Path, ids: torch.Tensor, dtype: torch.dtype, with_states: bool) -> dict[str, torch.Tensor]:
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
        states: dict[str, torch.Tensor] = {}
        if with_states:
            _record(built, model, states)
        logits = built.eval()(ids, torch.arange(ids.shape[1])[None].expand_as(ids), None)
    torch.distributed.destroy_process_group()
    return {**states, "logits": logits[..., : model.vocab_size].clone()}


def _record(built: torch.nn.Module, model: ModelConfig, states: dict[str, torch.Tensor]) -> None:
    """Lets the modules of the local backend write what they put out into ``states``, under the names of transformers."""
    from megatron.core.transformer.identity_op import IdentityOp

    from megatron_midus.upscaling.tensors import norm_names

    def keep(name: str, found: Any) -> None:
        output, bias = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
        output = output[0] if isinstance(output, tuple) else output
        states.setdefault(name, (output if bias is None else output + bias).transpose(0, 1).float().clone())

    def of_output(module: torch.nn.Module, name: str | None) -> None:
        if name is not None and not isinstance(module, IdentityOp):
            module.register_forward_hook(lambda m, inputs, output: keep(name, output))

    def of_input(module: torch.nn.Module, name: str) -> None:
        module.register_forward_pre_hook(
            lambda m, args, kwargs: keep(name, args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )

    norms = {place: name and name.removesuffix(".weight") for place, name in norm_names(model).items()}
    of_input(built.decoder.layers[0], "model.layers.0:input")
    for index, layer in enumerate(built.decoder.layers):
        prefix = f"model.layers.{index}"
        for module, place in ((layer.input_layernorm, "before_attention"), (layer.pre_mlp_layernorm, "before_mlp")):
            of_output(module, norms[place] and f"{prefix}.{norms[place]}")
            if norms[place]:
                of_input(module, f"{prefix}.{norms[place]}:input")
        for branch, place in ((layer.self_attn_bda, "behind_attention"), (layer.mlp_bda, "behind_mlp")):
            if norms[place]:
                of_output(branch.norm, f"{prefix}.{norms[place]}")
        of_input(layer.self_attention.linear_proj, f"{prefix}.self_attn.o_proj:input")
        of_output(layer.self_attention, f"{prefix}.self_attn")
        if hasattr(layer.mlp, "linear_fc2"):
            of_input(layer.mlp.linear_fc2, f"{prefix}.mlp.down_proj:input")
        of_output(layer.mlp, f"{prefix}.mlp")
        layer.register_forward_hook(lambda m, inputs, output, prefix=prefix: keep(prefix, output[0]))
    of_input(built.decoder.final_layernorm, "model.norm:input")
    of_output(built.decoder.final_layernorm, "model.norm")


def main() -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("logits", type=Path)
    parser.add_argument("--round-to", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--states", action="store_true")
    args = parser.parse_args()
    ids = torch.load(args.tokens, weights_only=True)
    torch.save(_run(args.directory, ids, getattr(torch, args.round_to), args.states), args.logits)
    return 0


if __name__ == "__main__":
    cli.run(main)
