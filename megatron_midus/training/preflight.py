"""What flags, file system and environment alone can refuse, before torch, model and optimizer. Imports no torch."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence

from megatron_midus.config import ModelConfig
from megatron_midus.config.parallel import ParallelConfig
from megatron_midus.data.sources import check_data, check_data_files
from megatron_midus.data.tokenizer import Tokenizer
from megatron_midus.errors import UserError
from megatron_midus.files import check_writable_directory
from megatron_midus.training.architecture import Architecture, resolve_train
from megatron_midus.training.arguments import Arguments, parse_arguments
from megatron_midus.training.checks import (
    check_background,
    check_environment,
    check_experts,
    check_kl_to_base,
    check_memory_settings,
    check_schedule,
    resolve_pipeline,
    resolve_sizes,
)
from megatron_midus.training.schedule import schedule_lengths
from megatron_midus.upscaling import UpscalePlan
from megatron_midus.upscaling.parallel_sizes import check_tensor_parallel_size


def check_files(arguments: Arguments) -> None:
    """Raises ``ValueError`` for data that are not there and for outputs that cannot be written."""
    check_data_files(arguments.data, _split_sizes(arguments))
    if arguments.training.dry_run:
        return
    outputs = {
        "--save": None if arguments.training.skip_train else arguments.checkpoint.save,
        "--tensorboard-dir": arguments.logging.tensorboard_dir,
        "--profile-dir": arguments.logging.profile_dir,
        "--wandb-save-dir": arguments.logging.wandb_save_dir,
        "--data-cache-path": arguments.data.data_cache_path,
    }
    for flag, directory in outputs.items():
        if directory is not None:
            check_writable_directory(directory, what=flag)


def check_data_contents(arguments: Arguments, tokenizer: Tokenizer) -> None:
    """Raises ``ValueError`` for data that are damaged, empty, or of another tokenizer. One process of a machine looks:
    the others fail with it."""
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        check_data(arguments.data, tokenizer, _split_sizes(arguments), _not_yet)


def _not_yet(warning: str) -> None:
    """Warnings come when the datasets are built."""


def check_run_to_come(
    words: Sequence[str], model: ModelConfig, plan: UpscalePlan, *, processes: int, warn: Callable[[str], None]
) -> None:
    """Raises ``ValueError`` for what the driver would refuse of a command line whose model and data are yet to be made.

    Args:
        words: flags of ``pretrain_midus.py``.
        model: the base.
        plan: what it is up-scaled by.
        processes: ranks of the run.
    """
    arguments = parse_arguments(words)
    check_environment(arguments)
    sizes = resolve_sizes(arguments, processes)
    if arguments.training.train_epochs is None:
        schedule_lengths(arguments.optimizer, arguments.training, sizes.global_batch_size)
    train = resolve_train(arguments.training.train, plan)
    architecture = Architecture(plan.applied_to(model), plan, train, None)
    check_model_fits(arguments, architecture, warn)
    parallel = resolve_pipeline(
        arguments.parallel, architecture.model, plan, seq_length=arguments.data.seq_length, train=train
    )
    check_schedule(dataclasses.replace(arguments, parallel=parallel), sizes, plan.num_layers)
    check_memory_settings(arguments, plan)
    check_experts(arguments, architecture, processes)
    check_kl_to_base(arguments, architecture)
    check_background(arguments, architecture)


def _split_sizes(arguments: Arguments) -> list[int | None]:
    """As many samples of train, valid and test as say which of them are read at all, and which in one pass."""
    training = arguments.training
    train: int | None = 0 if training.skip_train and not (training.train_iters or training.train_samples) else 1
    if training.train_epochs and not training.skip_train:
        train = None
    evaluated = None if training.full_validation else training.eval_iters
    return [train, evaluated, evaluated]


def check_model_fits(arguments: Arguments, architecture: Architecture, warn: Callable[[str], None]) -> None:
    """Raises ``ValueError`` for a layout that the model's sizes do not divide into; warns of sequences that are longer
    than what the model was made for."""
    parallel, seq_length = arguments.parallel, arguments.data.seq_length
    ranks = parallel.tensor_model_parallel_size
    check_tensor_parallel_size(architecture.model, architecture.plan, ranks, name="tensor_model_parallel_size")
    if parallel.sequence_parallel and seq_length % ranks:
        raise UserError(
            f"seq_length={seq_length} is not divisible by tensor_model_parallel_size={ranks}, which --sequence-parallel "
            "needs; change --seq-length or leave --sequence-parallel out"
        )
    _check_softcap(parallel, architecture.model.attention_softcap)
    _check_context_parallel(parallel, seq_length)
    if architecture.train == "lora":
        _check_lora(parallel)
    if seq_length > architecture.model.max_position_embeddings:
        warn(_beyond_positions(architecture.model, seq_length))


def _beyond_positions(model: ModelConfig, seq_length: int) -> str:
    """What happens to sequences that are longer than the model was made for."""
    longest, kind = model.max_position_embeddings, (model.rope_scaling or {}).get("rope_type", "default")
    if kind == "dynamic":
        rope = f"Rope scaling 'dynamic' lowers all frequencies to {seq_length} positions, as transformers does"
    else:
        scaled = "" if kind == "default" else f" that rope scaling {kind!r} gives"
        rope = f"Rotary positions go on beyond them with the same frequencies{scaled}, at angles that the model has not seen"
    return (
        f"--seq-length {seq_length} is longer than the {longest} positions that the model was made for. {rope}; "
        f"checkpoints and exports keep max_position_embeddings={longest}"
    )


def _check_lora(parallel: ParallelConfig) -> None:
    if parallel.tensor_model_parallel_size > 1:
        raise UserError(
            f"tensor_model_parallel_size={parallel.tensor_model_parallel_size}: --train lora does not split its adapters; "
            "choose 1"
        )
    if (parallel.expert_tensor_parallel_size or 1) > 1:
        raise UserError(
            f"expert_tensor_parallel_size={parallel.expert_tensor_parallel_size}: --train lora does not split its adapters; "
            "choose 1, and --expert-model-parallel-size for experts on several processes"
        )
    if parallel.moe_grouped_gemm:
        raise UserError("--train lora adapts experts one by one; leave --moe-grouped-gemm out")
    if parallel.transformer_impl == "transformer_engine":
        raise UserError(
            "--train lora adapts layers of plain torch; leave --transformer-impl transformer_engine out, which is then local"
        )


def _check_softcap(parallel: ParallelConfig, bound: float | None) -> None:
    if bound is not None and (parallel.transformer_impl == "transformer_engine" or parallel.context_parallel_size > 1):
        raise UserError(
            f"attention_softcap={bound} of this model needs the local layers, because Transformer Engine's attention caps no "
            "scores; leave out --transformer-impl transformer_engine and context parallelism"
        )


def _check_context_parallel(parallel: ParallelConfig, seq_length: int) -> None:
    size = parallel.context_parallel_size
    if size > 1 and (parallel.distributed_backend == "gloo" or parallel.transformer_impl == "local"):
        raise UserError(
            f"context_parallel_size={size} needs Transformer Engine's attention on a GPU; choose 1, or "
            "--transformer-impl transformer_engine and --distributed-backend nccl"
        )
    if seq_length % (2 * size) and size > 1:
        raise UserError(
            f"seq_length={seq_length} is not divisible by 2 * context_parallel_size={size}; change --seq-length"
        )
