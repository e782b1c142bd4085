"""Converts between Megatron checkpoints and Hugging Face directories, in both directions, tensor by tensor.

Examples:
  python tools/convert_checkpoint.py --load CHECKPOINT --save OUT --to hf
  python tools/convert_checkpoint.py --load HF_DIR --save CHECKPOINT --to megatron --target-tensor-parallel-size 2
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_midus import cli
from megatron_midus.config import ModelConfig
from megatron_midus.config.parser import ArgumentParser
from megatron_midus.conversion.checkpoint_layout import ASSETS_DIRECTORY, find_checkpoint, iteration_directory
from megatron_midus.conversion.checksums import CHECKSUMS_FILE, check_checkpoint
from megatron_midus.conversion.common_state import read_training_record
from megatron_midus.conversion.directories import source_config, write_hf_directory, write_megatron_checkpoint
from megatron_midus.conversion.families import check_model, check_plan, from_hf_config, notes_on
from megatron_midus.conversion.hf_io import (
    CastTensors,
    SafetensorsReader,
    dtype_name,
    open_hf_weights,
    parse_size,
    read_hf_config,
    source_hash,
)
from megatron_midus.conversion.megatron_io import MegatronReader, check_parallel_sizes
from megatron_midus.conversion.model_card import read_evaluation
from megatron_midus.conversion.streaming import check_workers, default_workers
from megatron_midus.conversion.tokenizer import check_tokenizer
from megatron_midus.errors import UserError
from megatron_midus.files import check_output_directory, staged_directory
from megatron_midus.upscaling import PLAN_FILE, UpscalePlan
from megatron_midus.upscaling.initialize import DTYPES, parse_dtype
from megatron_midus.upscaling.policies import none
from megatron_midus.upscaling.tensors import EMBEDDING, TensorSource, model_shapes


def make_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--load",
        required=True,
        metavar="DIR",
        help="what to convert: a Megatron checkpoint (its root or one iter_* directory) or a Hugging Face directory",
    )
    add("--save", required=True, metavar="DIR", help="output directory; made whole or not at all")
    add("--to", required=True, choices=["hf", "megatron"], help="format of the output")
    add("--ckpt-step", type=int, metavar="N", help="iteration of a Megatron checkpoint; the latest when absent")
    add(
        "--dtype",
        choices=["auto", "keep", *DTYPES],
        default="auto",
        help="dtype of the written weights: auto = that of the Hugging Face model that the checkpoint came from, keep = as stored (default: auto)",
    )
    add("--max-shard-size", default="5GB", help="largest safetensors file, for instance 500MB (default: 5GB)")
    add(
        "--target-tensor-parallel-size",
        type=int,
        default=1,
        help="--to megatron: tensor-parallel size of the training to come: checked, recorded, and the embedding padded for it. A checkpoint is stored unsplit, and any size can load it (default: 1)",
    )
    add(
        "--target-pipeline-parallel-size",
        type=int,
        default=1,
        help="--to megatron: pipeline-parallel size of the training to come: checked and recorded (default: 1)",
    )
    add(
        "--make-vocab-size-divisible-by",
        type=int,
        default=128,
        help="--to megatron: rows of the embedding of each tensor-parallel rank are padded to a multiple of this (default: 128)",
    )
    add(
        "--workers",
        type=int,
        default=default_workers(),
        help="tensors that are read, hashed and written at a time; each worker holds a few copies of one tensor (default: the cores of this machine, up to 4)",
    )
    add("--evaluation", metavar="FILE", help="--to hf: JSON report of tools/evaluate.py, shown in the model card")
    add(
        "--verify-checkpoint",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="--to hf: compare every file of the checkpoint with its checksum first (default: yes)",
    )
    add("--overwrite", action="store_true", help="replace the output directory when it exists")
    add(
        "--verify",
        nargs="?",
        choices=["logits", "tensors"],
        const="logits",
        help="before the output is kept: tensors = read it back and compare every tensor; logits = that, and fp32 logits of both ends on the CPU, which takes the memory of the model in fp32 (--verify alone: logits)",
    )
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Everything about the command line that needs no model."""
    parse_size(args.max_shard_size)
    if args.make_vocab_size_divisible_by < 1:
        raise UserError("--make-vocab-size-divisible-by must be at least 1")
    check_workers(args.workers)
    if args.to == "megatron" and args.ckpt_step is not None:
        raise UserError("--ckpt-step chooses an iteration of a Megatron checkpoint; leave it out with --to megatron")
    if args.to == "megatron" and args.evaluation is not None:
        raise UserError("--evaluation goes into the model card of an export; leave it out with --to megatron")
    save, load = Path(args.save).resolve(), Path(args.load).resolve()
    if save == load or save in load.parents:
        raise UserError(f"--save {args.save} would replace what is loaded; choose another directory")
    check_output_directory(args.save, overwrite=args.overwrite)


def with_dtype(source: TensorSource, name: str) -> TensorSource:
    """``source`` itself for ``keep``, otherwise cast to the dtype of that name."""
    dtype = parse_dtype(name)
    return source if dtype is None else CastTensors(source, dtype)


def print_notes(config: dict[str, Any]) -> None:
    for note in notes_on(config):
        print(f"note: {note}", file=sys.stderr)


def progress_bar(title: str, total: int) -> tqdm:
    return tqdm(total=total, desc=title, unit="tensor", file=sys.stderr, leave=False, disable=None)


def check_round_trip(wanted: TensorSource, found: TensorSource) -> None:
    from megatron_midus.conversion.verify import first_difference

    with progress_bar("verifying", len(wanted.names())) as bar:
        difference = first_difference(wanted, found, lambda name: bar.update())
    if difference:
        raise UserError(f"the written tensors are not those that were read: {difference}")
    print(f"verified: {len(wanted.names())} tensors are equal when read back")


def check_logits(hf: str | Path, iteration: Path, model: ModelConfig, *, dtype: str) -> None:
    """Compares Hugging Face's model and Megatron's; ``ValueError`` when they differ by more than rounding."""
    from megatron_midus.conversion.megatron_logits import megatron_logits
    from megatron_midus.conversion.verify import compare, load_fp32, logits_of, random_tokens
    from megatron_midus.hf import register

    register()
    ids = random_tokens(vocab_size=model.vocab_size)
    comparison = compare(logits_of(load_fp32(hf), ids), megatron_logits(iteration, ids, round_to=dtype))
    # fp32 sums in another order, through tens of layers: a millionth of sigma each.
    if comparison.max_difference > 1e-4 * comparison.sigma:
        raise UserError(f"Hugging Face and Megatron do not compute the same function: {comparison.describe()}")
    print(f"verified: {comparison.describe()}")


def check_export_loads(directory: Path) -> None:
    from megatron_midus.conversion.verify import check_loads
    from megatron_midus.hf import register

    register()
    check_loads(directory)


def to_hf(args: argparse.Namespace) -> str:
    directory, iteration = find_checkpoint(args.load, args.ckpt_step)
    if args.verify_checkpoint and not check_checkpoint(directory):
        print(f"{directory} has no {CHECKSUMS_FILE}, so it is read without having been verified", file=sys.stderr)
    model, plan = ModelConfig.load(directory), UpscalePlan.load(directory)
    assets = directory / ASSETS_DIRECTORY
    config = source_config(assets, model, plan)
    check_model(config, model, plan)
    print_notes(config)
    check_tokenizer(assets, model.vocab_size)
    training = read_training_record(directory, iteration)
    evaluation = None if args.evaluation is None else read_evaluation(args.evaluation)
    dtype = model.hf_dtype if args.dtype == "auto" else args.dtype
    source = with_dtype(MegatronReader(directory, model, plan), dtype)
    code_files: tuple[Path, ...] = ()
    if plan.memory_indices:
        from megatron_midus.hf import CODE_FILES

        code_files = CODE_FILES
    with staged_directory(args.save, overwrite=args.overwrite) as target:
        with progress_bar("writing", len(source.names())) as bar:
            write_hf_directory(
                source,
                target,
                assets=assets,
                model=model,
                plan=plan,
                code_files=code_files,
                max_shard_size=parse_size(args.max_shard_size),
                workers=args.workers,
                training=training,
                evaluation=evaluation,
                progress=lambda name: bar.update(),
            )
        check_export_loads(target)
        if args.verify:
            check_round_trip(source, SafetensorsReader(target))
        if args.verify == "logits":
            check_logits(target, directory, model, dtype=dtype_name(source.dtype(EMBEDDING)))
    return f"iteration {iteration}, {dtype_name(source.dtype(EMBEDDING))}"


def read_plan(args: argparse.Namespace, model: ModelConfig, config: dict[str, Any]) -> UpscalePlan:
    """The plan of a Hugging Face directory; ``none`` for a model that was never up-scaled."""
    if (Path(args.load) / PLAN_FILE).is_file():
        return UpscalePlan.load(args.load)
    name = Path(args.load).resolve().name
    if model.family == "midus":
        print(f"{args.load} has no {PLAN_FILE}; its blocks are taken from block_types in config.json", file=sys.stderr)
        return UpscalePlan.from_hf_config(config, source_name=name)
    return dataclasses.replace(none(num_layers=model.num_layers), source_name=name)


def to_megatron(args: argparse.Namespace) -> str:
    config = read_hf_config(args.load)
    model = from_hf_config(config)
    plan = read_plan(args, model, config)
    check_plan(config, plan)
    print_notes(config)
    check_parallel_sizes(
        model,
        plan,
        tensor_parallel_size=args.target_tensor_parallel_size,
        pipeline_parallel_size=args.target_pipeline_parallel_size,
    )
    check_tokenizer(args.load, model.vocab_size)
    shapes = model_shapes(model, plan)
    weights = open_hf_weights(args.load, model, shapes)
    if plan.policy == "none" and not plan.source_hash:
        with progress_bar("hashing", len(shapes)) as bar:
            found = source_hash(weights, list(shapes), lambda name: bar.update(), workers=args.workers)
        plan = dataclasses.replace(plan, source_hash=found)
    source = with_dtype(weights, "keep" if args.dtype == "auto" else args.dtype)
    model = dataclasses.replace(model, hf_dtype=dtype_name(source.dtype(EMBEDDING)))
    with staged_directory(args.save, overwrite=args.overwrite) as target:
        with progress_bar("writing", len(shapes)) as bar:
            write_megatron_checkpoint(
                source,
                target,
                assets=args.load,
                model=model,
                plan=plan,
                tensor_parallel_size=args.target_tensor_parallel_size,
                pipeline_parallel_size=args.target_pipeline_parallel_size,
                make_vocab_size_divisible_by=args.make_vocab_size_divisible_by,
                workers=args.workers,
                progress=lambda name: bar.update(),
            )
        if args.verify:
            check_round_trip(source, MegatronReader(iteration_directory(target, 0), model, plan))
        if args.verify == "logits":
            check_logits(args.load, iteration_directory(target, 0), model, dtype=model.hf_dtype)
    return f"{plan.num_layers} layers, {model.hf_dtype}"


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    check_arguments(args)
    summary = (to_hf if args.to == "hf" else to_megatron)(args)
    print(f"written: {args.save} ({args.to}, {summary})")
    return 0


if __name__ == "__main__":
    cli.run(main)
