"""``midus convert``: Megatron checkpoints to Hugging Face directories and back, tensor by tensor."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from megatron_midus.checkpoint.checksums import CHECKSUMS_FILE, check_checkpoint
from megatron_midus.checkpoint.layout import ASSETS_DIRECTORY, find_checkpoint, iteration_directory
from megatron_midus.checkpoint.training_record import read_training_record
from megatron_midus.config import ModelConfig
from megatron_midus.config.convert import ConvertConfig
from megatron_midus.conversion.directories import source_config, write_hf_directory, write_megatron_checkpoint
from megatron_midus.conversion.families import check_model, check_plan, from_hf_config
from megatron_midus.conversion.hf_io import (
    CastTensors,
    dtype_name,
    open_hf_weights,
    parse_size,
    read_hf_config,
    source_hash,
)
from megatron_midus.conversion.megatron_io import MegatronReader, check_parallel_sizes
from megatron_midus.conversion.model_card import read_evaluation
from megatron_midus.conversion.streaming import resolve_workers
from megatron_midus.conversion.tokenizer import check_tokenizer
from megatron_midus.errors import UserError
from megatron_midus.files import staged_directory
from megatron_midus.hub import fetched_model
from megatron_midus.progress import Progress
from megatron_midus.upscaling import UpscalePlan
from megatron_midus.upscaling.initialize import parse_dtype
from megatron_midus.upscaling.tensors import EMBEDDING, TensorSource, model_shapes
from megatron_midus.verbs.exports import check_export_loads, code_files, print_notes, read_plan
from megatron_midus.verbs.first_lines import check_convert
from megatron_midus.verbs.verb import verb


@dataclasses.dataclass(frozen=True)
class Converted:
    """What was made.

    Attributes:
        directory: where it lies.
        model, plan: what the model is.
        dtype: of the written weights.
        iteration: of the Megatron checkpoint that was read; ``None`` in the other direction.
        verified: one line for every comparison that was made.
    """

    directory: Path
    model: ModelConfig
    plan: UpscalePlan
    dtype: str
    iteration: int | None = None
    verified: tuple[str, ...] = ()


@verb(ConvertConfig)
def convert(config: ConvertConfig, progress: Progress) -> Converted:
    """Converts a model. See ``ConvertConfig`` for the settings; returns ``Converted``.

    Raises:
        UserError: something that cannot be converted, an output that is in the way, a comparison that failed.
    """
    check_convert(config)
    return (_to_hf if config.to == "hf" else _to_megatron)(config, progress)


def with_dtype(source: TensorSource, name: str) -> TensorSource:
    """``source`` itself for ``keep``, otherwise cast to the dtype of that name."""
    dtype = parse_dtype(name)
    return source if dtype is None else CastTensors(source, dtype)


# -- Megatron to Hugging Face ----------------------------------------------------------------------------------------
def _to_hf(config: ConvertConfig, progress: Progress) -> Converted:
    directory, iteration = find_checkpoint(config.load, config.ckpt_step)
    if config.verify_checkpoint and not check_checkpoint(directory):
        print(f"{directory} has no {CHECKSUMS_FILE}, so it is read without having been verified", file=sys.stderr)
    model, plan = ModelConfig.load(directory), UpscalePlan.load(directory)
    assets = directory / ASSETS_DIRECTORY
    hf_config = source_config(assets, model, plan)
    check_model(hf_config, model, plan)
    print_notes(hf_config)
    check_tokenizer(assets, model.vocab_size)
    source = with_dtype(
        MegatronReader(directory, model, plan, averaged=config.weights == "ema"),
        model.hf_dtype if config.dtype == "auto" else config.dtype,
    )
    training = read_training_record(directory, iteration)
    evaluation = None if config.evaluation is None else read_evaluation(config.evaluation)
    verified: list[str] = []
    with staged_directory(config.save, overwrite=config.overwrite) as target:
        with progress("writing", total=len(source.names()), unit="tensor") as advance:
            write_hf_directory(
                source,
                target,
                assets=assets,
                model=model,
                plan=plan,
                code_files=code_files(plan),
                max_shard_size=parse_size(config.max_shard_size),
                workers=resolve_workers(config.workers),
                training=training,
                evaluation=evaluation,
                progress=lambda name: advance(1),
            )
        check_export_loads(target, model, plan)
        if config.verify:
            verified.append(
                check_round_trip(source, open_hf_weights(target, model, model_shapes(model, plan)), progress)
            )
        if config.verify == "logits":
            verified.append(check_logits(target, directory, model, dtype=dtype_name(source.dtype(EMBEDDING))))
    dtype = dtype_name(source.dtype(EMBEDDING))
    return Converted(Path(config.save), model, plan, dtype, iteration, tuple(verified))


# -- Hugging Face to Megatron ----------------------------------------------------------------------------------------
def _to_megatron(config: ConvertConfig, progress: Progress) -> Converted:
    config = dataclasses.replace(config, load=fetched_model(config.load))
    hf_config = read_hf_config(config.load)
    model = from_hf_config(hf_config)
    print_notes(hf_config)
    plan = read_plan(config.load, model, hf_config)
    check_plan(hf_config, plan)
    target = config.target
    check_parallel_sizes(
        model,
        plan,
        tensor_parallel_size=target.target_tensor_parallel_size,
        pipeline_parallel_size=target.target_pipeline_parallel_size,
    )
    check_tokenizer(config.load, model.vocab_size)
    shapes, workers = model_shapes(model, plan), resolve_workers(config.workers)
    weights = open_hf_weights(config.load, model, shapes)
    if plan.policy == "none" and not plan.source_hash:
        with progress("hashing", total=len(shapes), unit="tensor") as advance:
            found = source_hash(weights, list(shapes), lambda name: advance(1), workers=workers)
        plan = dataclasses.replace(plan, source_hash=found)
    source = with_dtype(weights, "keep" if config.dtype == "auto" else config.dtype)
    model = dataclasses.replace(model, hf_dtype=dtype_name(source.dtype(EMBEDDING)))
    verified: list[str] = []
    with staged_directory(config.save, overwrite=config.overwrite) as directory:
        with progress("writing", total=len(shapes), unit="tensor") as advance:
            write_megatron_checkpoint(
                source,
                directory,
                assets=config.load,
                model=model,
                plan=plan,
                tensor_parallel_size=target.target_tensor_parallel_size,
                pipeline_parallel_size=target.target_pipeline_parallel_size,
                make_vocab_size_divisible_by=target.make_vocab_size_divisible_by,
                workers=workers,
                progress=lambda name: advance(1),
            )
        iteration = iteration_directory(directory, 0)
        if config.verify:
            verified.append(check_round_trip(source, MegatronReader(iteration, model, plan), progress))
        if config.verify == "logits":
            verified.append(check_logits(config.load, iteration, model, dtype=model.hf_dtype))
    return Converted(Path(config.save), model, plan, model.hf_dtype, verified=tuple(verified))


# -- comparisons -----------------------------------------------------------------------------------------------------
def check_round_trip(wanted: TensorSource, found: TensorSource, progress: Progress) -> str:
    """Every tensor that was written, read back; returns what to say."""
    from megatron_midus.conversion.verify import first_difference

    with progress("verifying", total=len(wanted.names()), unit="tensor") as advance:
        difference = first_difference(wanted, found, lambda name: advance(1))
    if difference:
        raise UserError(f"the written tensors are not those that were read: {difference}")
    return f"{len(wanted.names())} tensors are equal when read back"


def check_logits(hf: str | Path, iteration: Path, model: ModelConfig, *, dtype: str) -> str:
    """Compares Hugging Face's model and Megatron's; ``UserError`` when they differ by more than rounding."""
    from megatron_midus.conversion.megatron_logits import megatron_logits
    from megatron_midus.conversion.verify import compare, load_fp32, logits_of, random_tokens
    from megatron_midus.hf import register

    register()
    ids = random_tokens(vocab_size=model.vocab_size)
    comparison = compare(logits_of(load_fp32(hf), ids), megatron_logits(iteration, ids, round_to=dtype))
    # fp32 sums in another order, through tens of layers: a millionth of sigma each.
    if comparison.max_difference > 1e-4 * comparison.sigma:
        raise UserError(f"Hugging Face and Megatron do not compute the same function: {comparison.describe()}")
    return comparison.describe()


def command(config: ConvertConfig) -> int:
    """``midus convert``."""
    result = convert(config)
    for line in result.verified:
        print(f"verified: {line}")
    what = f"{result.plan.num_layers} layers" if result.iteration is None else f"iteration {result.iteration}"
    print(f"written: {config.save} ({config.to}, {what}, {result.dtype})")
    return 0
