"""Latency of reading a prompt and of writing a token, of several Hugging Face models side by side.

Examples:
  python tools/measure_decoding.py --models BASE UPSCALED --dtype bfloat16 --prompt-length 512
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

from megatron_midus import cli
from megatron_midus.evaluation.latency import measure_latency
from megatron_midus.evaluation.report import short_names
from megatron_midus.files import write_text_atomically
from megatron_midus.hf import register


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--models", nargs="+", required=True, metavar="DIR", help="Hugging Face directories; the first is the yardstick"
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (default: %(default)s)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the weights (default: %(default)s)")  # fmt: skip
    add("--batch-size", type=int, default=1, help="sequences (default: %(default)s)")
    add("--prompt-length", type=int, default=128, help="tokens read at once (default: %(default)s)")
    add("--new-tokens", type=int, default=32, help="tokens written one by one (default: %(default)s)")
    add("--repetitions", type=int, default=5, help="measured runs of each model, in turns (default: %(default)s)")
    add("--output", metavar="FILE", help="write the figures as JSON as well")
    return parser


def load(directory: str, args: argparse.Namespace) -> torch.nn.Module:
    if not (Path(directory) / "config.json").is_file():
        raise ValueError(
            f"{directory} is no Hugging Face directory; export a checkpoint with tools/convert_checkpoint.py"
        )
    name = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, local_files_only=True, **{name: getattr(torch, args.dtype)}
    )
    return model.eval().to(args.device)


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    register()
    models = [load(directory, args) for directory in args.models]
    found = measure_latency(
        models,
        batch_size=args.batch_size,
        prompt_length=args.prompt_length,
        new_tokens=args.new_tokens,
        repetitions=args.repetitions,
    )
    processor = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"  # fmt: skip
    table = Table(title=f"{processor}, {args.dtype}, batch {args.batch_size}, prompt {args.prompt_length}, torch {torch.__version__}")  # fmt: skip
    for heading in ("model", "parameters", "prefill, ms", "ratio", "decode, ms/token", "ratio"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    rows = []
    for name, model, latency in zip(short_names(args.models), models, found):
        rows.append(
            {
                "model": name,
                "parameters": sum(p.numel() for p in model.parameters()),
                "prefill_ms": latency.prefill_ms,
                "prefill_ratio": latency.prefill_ms / found[0].prefill_ms,
                "decode_ms": latency.decode_ms,
                "decode_ratio": latency.decode_ms / found[0].decode_ms,
            }
        )
        table.add_row(name, *(f"{value:,}" if isinstance(value, int) else f"{value:.2f}" for value in list(rows[-1].values())[1:]))  # fmt: skip
    Console(width=120).print(table)
    if args.output:
        settings = {k: v for k, v in vars(args).items() if k not in ("models", "output")}
        write_text_atomically(args.output, json.dumps({"settings": settings, "models": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    cli.run(main)
