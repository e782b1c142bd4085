"""Up-scales a Hugging Face model: plans the inserted blocks, says what they cost, writes the result.

Examples:
  python tools/upscale.py --hf-model DIR --policy interleave --num-blocks 4 --dry-run
  python tools/upscale.py --hf-model DIR --save OUT --policy interleave --insert-after 1 3 5 --memory-num-keys 64
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from megatron_midus import cli
from megatron_midus.config import ModelConfig
from megatron_midus.config.parser import ArgumentParser
from megatron_midus.config.run_file import parse_arguments_with_file
from megatron_midus.conversion.checkpoint_layout import iteration_directory
from megatron_midus.conversion.directories import write_hf_directory, write_megatron_checkpoint
from megatron_midus.conversion.families import from_hf_config, notes_on, to_hf_config
from megatron_midus.conversion.hf_io import dtype_name, open_hf_weights, parse_size, read_hf_config, source_hash
from megatron_midus.conversion.megatron_io import MegatronReader, check_parallel_sizes
from megatron_midus.conversion.streaming import check_workers, default_workers
from megatron_midus.conversion.tokenizer import check_tokenizer
from megatron_midus.errors import UserError
from megatron_midus.files import check_output_directory, staged_directory
from megatron_midus.upscaling import UpscalePlan
from megatron_midus.upscaling.arguments import add_plan_arguments, plan_from_arguments
from megatron_midus.upscaling.cost import block_flops, block_parameters, cost_of
from megatron_midus.upscaling.initialize import DTYPES, UpscaledTensors
from megatron_midus.upscaling.policies import none
from megatron_midus.upscaling.tensors import EMBEDDING, TensorSource, model_shapes


def make_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--hf-model",
        required=True,
        metavar="DIR",
        help="directory with the base model: config.json, safetensors, tokenizer",
    )
    add("--save", metavar="DIR", help="output directory; made whole or not at all (not needed with --dry-run)")
    add(
        "--save-format",
        choices=["megatron", "hf"],
        default="megatron",
        help="megatron = a distributed checkpoint for pretrain_midus.py; hf = a Hugging Face directory (default: megatron)",
    )
    add("--seed", type=int, default=0, help="seed of newly initialised tensors (default: 0)")
    add(
        "--dtype",
        choices=["keep", *DTYPES],
        default="keep",
        help="dtype of the written weights; keep = as in the base (default: keep)",
    )
    add(
        "--calibration-data",
        metavar="FILE",
        help="text or .jsonl with a 'text' entry, for --memory-key-init calibrated",
    )
    add(
        "--calibration-tokens",
        type=int,
        default=8192,
        help="tokens of it that are run through the model (default: 8192)",
    )
    add(
        "--max-shard-size",
        default="5GB",
        help="largest safetensors file of --save-format hf, for instance 500MB (default: 5GB)",
    )
    add(
        "--target-tensor-parallel-size",
        type=int,
        default=1,
        help="tensor-parallel size of the training to come: checked, recorded, and the embedding padded for it. A checkpoint is stored unsplit; any size can load it (default: 1)",
    )
    add(
        "--target-pipeline-parallel-size",
        type=int,
        default=1,
        help="pipeline-parallel size of the training to come: checked and recorded (default: 1)",
    )
    add(
        "--make-vocab-size-divisible-by",
        type=int,
        default=128,
        help="rows of the embedding of each tensor-parallel rank are padded to a multiple of this (default: 128)",
    )
    add(
        "--seq-length",
        type=int,
        default=2048,
        help="tokens of a sequence for the FLOPs of the cost table (default: 2048)",
    )
    add(
        "--workers",
        type=int,
        default=default_workers(),
        help="tensors that are read, hashed and written at a time; each worker holds a few copies of one tensor (default: the cores of this machine, up to 4)",
    )
    add("--overwrite", action="store_true", help="replace the output directory when it exists")
    add("--dry-run", action="store_true", help="print the plan and its cost and write nothing")
    add("--verify", action="store_true", help="compare fp32 logits of base and result before the output is kept; fails when a policy that promises identity breaks it")  # fmt: skip
    add_plan_arguments(parser)
    return parser


# -- what is asked for -----------------------------------------------------------------------------------------------
def check_arguments(args: argparse.Namespace) -> None:
    """Everything about the command line that needs no model."""
    if args.save is None and not args.dry_run:
        raise UserError("--save is missing; give an output directory or --dry-run")
    if args.seq_length < 1 or args.calibration_tokens < 1 or args.make_vocab_size_divisible_by < 1:
        raise UserError("--seq-length, --calibration-tokens and --make-vocab-size-divisible-by must be at least 1")
    check_workers(args.workers)
    parse_size(args.max_shard_size)
    calibrated = getattr(args, "memory_key_init", None) == "calibrated"
    if calibrated and args.calibration_data is None and not args.dry_run:
        raise UserError("--memory-key-init calibrated needs a text to calibrate with; give --calibration-data FILE")
    if args.calibration_data is not None and not calibrated:
        raise UserError("--calibration-data is used by --memory-key-init calibrated alone; give both or neither")
    if args.calibration_data is not None and not Path(args.calibration_data).is_file():
        raise UserError(f"--calibration-data {args.calibration_data} does not exist")
    if args.save is not None and not args.dry_run:
        save, base = Path(args.save).resolve(), Path(args.hf_model).resolve()
        if save == base or save in base.parents:
            raise UserError(f"--save {args.save} would replace the base model; choose another directory")
        check_output_directory(args.save, overwrite=args.overwrite)


def plan_from(args: argparse.Namespace, model: ModelConfig) -> UpscalePlan:
    if model.family == "midus":
        raise UserError(f"{args.hf_model} is a MIDUS model already; up-scale its base instead")
    plan = plan_from_arguments(args, model)
    check_parallel_sizes(
        model,
        plan,
        tensor_parallel_size=args.target_tensor_parallel_size,
        pipeline_parallel_size=args.target_pipeline_parallel_size,
    )
    return dataclasses.replace(plan, seed=args.seed, source_name=Path(args.hf_model).resolve().name)


# -- what it costs ---------------------------------------------------------------------------------------------------
def print_layers(console: Console, model: ModelConfig, plan: UpscalePlan, seq_length: int) -> None:
    table = Table(title=f"{plan.num_base_layers} -> {plan.num_layers} layers, policy {plan.policy}")
    for heading, justify in (("layer", "right"), ("block", "left"), ("source", "right"), ("filled", "left"), ("parameters", "right"), ("MFLOP/token", "right")):  # fmt: skip
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for index, (block, parameters) in enumerate(zip(plan.blocks, block_parameters(model, plan))):
        flops = block_flops(model, plan, index, seq_length)
        table.add_row(
            str(index),
            block.kind,
            ", ".join(map(str, block.source)),
            block.init,
            f"{parameters:,}",
            f"{(flops.weights + flops.activations) / 1e6:,.2f}",
            style="bold" if block.inserted else None,
        )
    console.print(table)
    for note in plan.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)


def print_cost(console: Console, model: ModelConfig, plan: UpscalePlan, *, seq_length: int, dtype: str) -> None:
    cost = cost_of(model, plan, seq_length=seq_length, dtype=dtype)
    table = Table(title=f"cost (sequences of {seq_length} tokens, {dtype})")
    for heading in ("", "base", "up-scaled", "change"):
        table.add_column(heading, justify="right" if heading else "left")
    rows = [
        ("parameters", cost.base_parameters, cost.parameters, "{:,.0f}"),
        ("forward GFLOP/token", cost.base_forward_flops / 1e9, cost.forward_flops / 1e9, "{:,.4f}"),
        ("KV cache bytes/token", cost.base_kv_bytes, cost.kv_bytes, "{:,.0f}"),
    ]
    for name, base, scaled, form in rows:
        table.add_row(name, form.format(base), form.format(scaled), f"{100 * (scaled - base) / base:+.1f} %")
    mebibytes = [b / 2**20 for b in (cost.weight_bytes, cost.training_bytes_inserted, cost.training_bytes_all)]
    table.add_row("parameters in inserted blocks", "", f"{cost.trainable_inserted:,}", "")
    table.add_row("training GFLOP/token, --train inserted", "", f"{cost.training_flops / 1e9:,.4f}", "")
    table.add_row("weights, MiB", "", f"{mebibytes[0]:,.1f}", "")
    table.add_row("weights + AdamW, --train inserted, MiB", "", f"{mebibytes[1]:,.1f}", "")
    table.add_row("weights + AdamW, --train all, MiB", "", f"{mebibytes[2]:,.1f}", "")
    console.print(table)


# -- the work --------------------------------------------------------------------------------------------------------
def progress_bar(title: str, total: int) -> tqdm:
    return tqdm(total=total, desc=title, unit="tensor", file=sys.stderr, leave=False, disable=None)


def calibrate(args: argparse.Namespace, source: TensorSource, config: dict[str, Any], plan: UpscalePlan) -> dict:
    """Sub-keys by canonical name, from the queries that the up-scaled model's memories see on the calibration text."""
    import torch
    from transformers import AutoTokenizer

    from megatron_midus.hf import MidusConfig, MidusForCausalLM
    from megatron_midus.upscaling.calibration import calibration_tokens, collect_queries, keys_from_queries

    tokenizer = AutoTokenizer.from_pretrained(args.hf_model, local_files_only=True)
    sequences = calibration_tokens(
        args.calibration_data,
        tokenizer,
        num_tokens=args.calibration_tokens,
        seq_length=min(512, config["max_position_embeddings"]),
    )
    # The values are zero, so this is the base: every memory sees what the base's attention would hand it.
    model = MidusForCausalLM(MidusConfig(**config)).float().eval()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in source.names():
            parameters[name].copy_(source.read(name))
    return keys_from_queries(collect_queries(model, sequences), plan)


def write(
    args: argparse.Namespace, directory: Path, source: TensorSource, model: ModelConfig, plan: UpscalePlan
) -> None:
    """Writes the result into ``directory``, in the format that was asked for."""
    with progress_bar("writing", len(source.names())) as bar:
        if args.save_format == "hf":
            write_hf(directory, source, args, model, plan, progress=lambda name: bar.update())
        else:
            write_megatron_checkpoint(
                source,
                directory,
                assets=args.hf_model,
                model=model,
                plan=plan,
                tensor_parallel_size=args.target_tensor_parallel_size,
                pipeline_parallel_size=args.target_pipeline_parallel_size,
                make_vocab_size_divisible_by=args.make_vocab_size_divisible_by,
                workers=args.workers,
                progress=lambda name: bar.update(),
            )


def write_hf(directory: Path, source: TensorSource, args: argparse.Namespace, model: ModelConfig, plan: UpscalePlan, **options: Any) -> None:  # fmt: skip
    code_files: tuple[Path, ...] = ()
    if plan.memory_indices:
        from megatron_midus.hf import CODE_FILES

        code_files = CODE_FILES
    write_hf_directory(
        source,
        directory,
        assets=args.hf_model,
        model=model,
        plan=plan,
        code_files=code_files,
        max_shard_size=parse_size(args.max_shard_size),
        workers=args.workers,
        **options,
    )


def check_result_loads(config: dict[str, Any], model: ModelConfig, plan: UpscalePlan) -> None:
    """Raises ``ValueError`` when transformers could not load the result, or a later export of it; before any work."""
    from megatron_midus.conversion.verify import check_loadable
    from megatron_midus.hf import register

    register()
    check_loadable(config, model_shapes(model, plan))


def verify(args: argparse.Namespace, directory: Path, model: ModelConfig, plan: UpscalePlan) -> str:
    """Compares the written model with its base; ``ValueError`` when a promised identity does not hold."""
    from megatron_midus.conversion.verify import compare_logits, load_fp32, round_parameters

    base = load_fp32(args.hf_model)
    if args.dtype != "keep":
        round_parameters(base, DTYPES[args.dtype])
    with tempfile.TemporaryDirectory(prefix=".verify.", dir=directory.parent) as temporary:
        hf = directory
        if args.save_format == "megatron":
            # Through the checkpoint and back, so that what is compared is what lies on the disk.
            hf = Path(temporary)
            write_hf(hf, MegatronReader(iteration_directory(directory, 0), model, plan), args, model, plan)
        if plan.memory_indices:
            # The package's own classes: the files in the output are copies of them.
            from megatron_midus.hf import register

            register()
        result = load_fp32(hf)
        comparison = compare_logits(base, result, vocab_size=model.vocab_size)
    if plan.is_identity and not comparison.bit_equal:
        raise UserError(f"policy {plan.policy} promises the base's function and broke it: {comparison.describe()}")
    return comparison.describe()


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments_with_file(make_parser(), argv)
    check_arguments(args)
    config = read_hf_config(args.hf_model)
    model = from_hf_config(config)
    for note in notes_on(config):
        print(f"note: {note}", file=sys.stderr)
    plan = plan_from(args, model)
    check_tokenizer(args.hf_model, model.vocab_size)
    base_shapes = model_shapes(model, none(num_layers=model.num_layers))
    base = open_hf_weights(args.hf_model, model, base_shapes)
    dtype = dtype_name(base.dtype(EMBEDDING)) if args.dtype == "keep" else args.dtype
    model = dataclasses.replace(model, hf_dtype=dtype)

    console = Console(highlight=False)
    print_layers(console, model, plan, args.seq_length)
    print_cost(console, model, plan, seq_length=args.seq_length, dtype=dtype)
    if args.dry_run:
        return 0

    from megatron_midus.conversion.verify import check_loads

    check_result_loads(to_hf_config(config, model, plan, dtype=dtype), model, plan)
    with progress_bar("hashing", len(base_shapes)) as bar:
        plan = dataclasses.replace(
            plan, source_hash=source_hash(base, list(base_shapes), lambda name: bar.update(), workers=args.workers)
        )
    source = UpscaledTensors(base, model, plan, dtype=args.dtype)
    if plan.memory is not None and plan.memory.memory_key_init == "calibrated":
        keys = calibrate(args, source, to_hf_config(config, model, plan, dtype=dtype), plan)
        source = UpscaledTensors(base, model, plan, dtype=args.dtype, calibrated=keys)
    with staged_directory(args.save, overwrite=args.overwrite) as directory:
        write(args, directory, source, model, plan)
        if args.save_format == "hf":
            check_loads(directory)
        if args.verify:
            console.print(f"verified: {verify(args, directory, model, plan)}", soft_wrap=True)
    console.print(f"written: {args.save} ({args.save_format}, {dtype})", soft_wrap=True)
    return 0


if __name__ == "__main__":
    cli.run(main)
