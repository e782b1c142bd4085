"""Refuses, before anything is built, layouts that do not fit the number of processes or that would train wrongly."""

from __future__ import annotations

import dataclasses
import importlib.util

from megatron_midus.config.parallel import ParallelConfig
from megatron_midus.training.arguments import Arguments


@dataclasses.dataclass(frozen=True)
class Layout:
    """How processes and batches divide.

    Attributes:
        data_parallel_size: model replicas.
        global_batch_size: samples per step (at the end of a ramp-up).
    """

    world_size: int
    data_parallel_size: int
    global_batch_size: int


def num_virtual_stages(parallel: ParallelConfig, num_layers: int) -> int | None:
    """Model chunks per pipeline stage under the interleaved schedule; ``None`` without it.

    Raises:
        ValueError: layers that do not divide into such chunks.
    """
    per_chunk = parallel.num_layers_per_virtual_pipeline_stage
    if per_chunk is None:
        return None
    stages = parallel.pipeline_model_parallel_size
    if num_layers % (stages * per_chunk):
        raise ValueError(
            f"num_layers={num_layers} does not divide into {stages} pipeline stages of chunks of "
            f"num_layers_per_virtual_pipeline_stage={per_chunk} layers"
        )
    chunks = num_layers // (stages * per_chunk)
    if chunks < 2:
        raise ValueError(
            f"num_layers_per_virtual_pipeline_stage={per_chunk} leaves one chunk per stage, which is the schedule "
            "without it; leave the flag out or give fewer layers"
        )
    return chunks


def resolve_layout(arguments: Arguments, world_size: int) -> Layout:
    """Divides ``world_size`` processes and the global batch; raises ``ValueError`` when they do not divide."""
    parallel, training = arguments.parallel, arguments.training
    sizes = {
        "tensor": parallel.tensor_model_parallel_size,
        "pipeline": parallel.pipeline_model_parallel_size,
        "context": parallel.context_parallel_size,
    }
    replica = sizes["tensor"] * sizes["pipeline"] * sizes["context"]
    if world_size % replica:
        raise ValueError(
            f"{world_size} processes do not divide into replicas of tensor {sizes['tensor']} * pipeline "
            f"{sizes['pipeline']} * context {sizes['context']} = {replica}; start a multiple of {replica}"
        )
    data_parallel_size = world_size // replica
    step = training.micro_batch_size * data_parallel_size
    global_batch_size = training.global_batch_size or step
    if training.decrease_batch_size_if_needed:
        if global_batch_size < step:
            raise ValueError(
                f"global_batch_size={global_batch_size} is below micro_batch_size={training.micro_batch_size} * "
                f"data-parallel size {data_parallel_size} = {step}; raise it"
            )
    elif global_batch_size % step:
        raise ValueError(
            f"global_batch_size={global_batch_size} is not divisible by micro_batch_size={training.micro_batch_size} "
            f"* data-parallel size {data_parallel_size} = {step}; change it or give --decrease-batch-size-if-needed"
        )
    _check_rampup(arguments, step)
    _check_pipeline(arguments, global_batch_size // step)
    return Layout(world_size, data_parallel_size, global_batch_size)


def _check_rampup(arguments: Arguments, step: int) -> None:
    rampup = arguments.training.rampup_batch_size
    if rampup is None or arguments.training.decrease_batch_size_if_needed:
        return
    if rampup[0] % step or rampup[1] % step:
        raise ValueError(
            f"rampup_batch_size={rampup}: start and increment must be multiples of micro-batch size * data-parallel "
            f"size = {step}; change them or give --decrease-batch-size-if-needed"
        )


def _check_pipeline(arguments: Arguments, num_microbatches: int) -> None:
    parallel = arguments.parallel
    stages = parallel.pipeline_model_parallel_size
    if parallel.num_layers_per_virtual_pipeline_stage is not None and num_microbatches % stages:
        raise ValueError(
            f"the interleaved schedule needs micro-batches ({num_microbatches}) to be a multiple of "
            f"pipeline_model_parallel_size={stages}; change --global-batch-size"
        )
    if parallel.num_layers_per_virtual_pipeline_stage is not None and arguments.training.rampup_batch_size:
        raise ValueError("rampup_batch_size does not go with --num-layers-per-virtual-pipeline-stage; drop one")


def check_environment(arguments: Arguments) -> None:
    """Packages without which a run would fail or hang late."""
    if arguments.checkpoint.save is not None and importlib.util.find_spec("psutil") is None:
        # Megatron-Core's writer processes die on the import, and the save waits for them for ever.
        raise ValueError("saving checkpoints needs psutil, which is not installed; pip install psutil")
    if arguments.logging.tensorboard_dir is not None and importlib.util.find_spec("tensorboard") is None:
        raise ValueError("--tensorboard-dir needs tensorboard, which is not installed; pip install tensorboard")
    if arguments.logging.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise ValueError("--wandb-project needs wandb, which is not installed; pip install wandb")
