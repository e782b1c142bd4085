"""Refuses, before anything is built, layouts that do not fit the number of processes or that would train wrongly."""

from __future__ import annotations

import dataclasses
import importlib.util

from megatron_midus.config import ModelConfig
from megatron_midus.config.parallel import ParallelConfig
from megatron_midus.errors import UserError
from megatron_midus.training.architecture import Architecture
from megatron_midus.training.arguments import Arguments
from megatron_midus.upscaling import UpscalePlan
from megatron_midus.upscaling.cost import Train
from megatron_midus.upscaling.pipeline_layout import balanced_layout, format_layout, parse_layout


@dataclasses.dataclass(frozen=True)
class RunSizes:
    """Processes, model replicas and samples of a step.

    Attributes:
        world_size: processes.
        data_parallel_size: model replicas.
        global_batch_size: samples per step (at the end of a ramp-up).
    """

    world_size: int
    data_parallel_size: int
    global_batch_size: int

    def num_microbatches(self, micro_batch_size: int) -> int:
        """Of each replica in a step; 0 where the global batch is smaller than one of each."""
        return self.global_batch_size // (micro_batch_size * self.data_parallel_size)


def num_virtual_stages(parallel: ParallelConfig, num_layers: int) -> int | None:
    """Model chunks per pipeline stage under the interleaved schedule; ``None`` without it.

    Raises:
        ValueError: layers that do not divide into such chunks.
    """
    stages = parallel.pipeline_model_parallel_size
    if parallel.pipeline_model_parallel_layout not in (None, "auto"):
        assert parallel.pipeline_model_parallel_layout is not None
        parts = parse_layout(parallel.pipeline_model_parallel_layout, num_layers=num_layers, num_stages=stages)
        return len(parts) // stages if len(parts) > stages else None
    chunks, per_chunk = parallel.num_virtual_stages_per_pipeline_rank, parallel.num_layers_per_virtual_pipeline_stage
    if per_chunk is not None:
        if num_layers % (stages * per_chunk):
            raise UserError(
                f"num_layers={num_layers} does not divide into {stages} pipeline stages of chunks of "
                f"num_layers_per_virtual_pipeline_stage={per_chunk} layers; give "
                "--num-virtual-stages-per-pipeline-rank and --pipeline-model-parallel-layout auto"
            )
        chunks = num_layers // (stages * per_chunk)
        if chunks < 2:
            raise UserError(
                f"num_layers_per_virtual_pipeline_stage={per_chunk} leaves one chunk per stage, which is the schedule "
                "without it; leave the flag out or give fewer layers"
            )
    return chunks if chunks is not None and chunks > 1 else None


def resolve_pipeline(
    parallel: ParallelConfig, model: ModelConfig, plan: UpscalePlan, *, seq_length: int, train: Train
) -> ParallelConfig:
    """Says where every block goes: ``auto`` and the counts of first and last stage become a layout string.

    Raises:
        ValueError: blocks that do not divide, or a layout that is not this model's.
    """
    stages, num_layers = parallel.pipeline_model_parallel_size, plan.num_layers
    layout = parallel.pipeline_model_parallel_layout
    chunks = num_virtual_stages(parallel, num_layers) or 1
    if layout == "auto":
        layout = balanced_layout(model, plan, stages * chunks, seq_length=seq_length, train=train)
    elif layout is not None:
        asked = parallel.num_virtual_stages_per_pipeline_rank
        if asked not in (None, chunks):
            raise UserError(
                f"num_virtual_stages_per_pipeline_rank={asked} contradicts pipeline_model_parallel_layout={layout}, "
                f"which has {chunks}; leave one out"
            )
        layout = format_layout(parse_layout(layout, num_layers=num_layers, num_stages=stages))
    elif parallel.decoder_first_pipeline_num_layers or parallel.decoder_last_pipeline_num_layers:
        layout = format_layout(_sizes_with_given_ends(parallel, num_layers))
    elif num_layers % (stages * chunks):
        raise UserError(
            f"num_layers={num_layers} ({plan.num_base_layers} of the base) do not divide evenly into {stages} pipeline "
            f"stages of {chunks} chunks; give --pipeline-model-parallel-layout auto, or a layout string"
        )
    return dataclasses.replace(
        parallel,
        pipeline_model_parallel_layout=layout,
        decoder_first_pipeline_num_layers=None,
        decoder_last_pipeline_num_layers=None,
    )


def _sizes_with_given_ends(parallel: ParallelConfig, num_layers: int) -> list[int]:
    stages = parallel.pipeline_model_parallel_size
    first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    between = stages - (first is not None) - (last is not None)
    rest = num_layers - (first or 0) - (last or 0)
    if rest < between or (rest % between if between else rest):
        raise UserError(
            f"decoder_first_pipeline_num_layers={first} and decoder_last_pipeline_num_layers={last} leave {rest} of "
            f"num_layers={num_layers} for {between} pipeline stages, which cannot share them evenly; give "
            "--pipeline-model-parallel-layout"
        )
    middle = [rest // between] * between if between else []
    return [*([first] if first else []), *middle, *([last] if last else [])]


def resolve_sizes(arguments: Arguments, world_size: int) -> RunSizes:
    """Divides ``world_size`` processes and the global batch; raises ``ValueError`` when they do not divide."""
    parallel, training = arguments.parallel, arguments.training
    sizes = {
        "tensor": parallel.tensor_model_parallel_size,
        "pipeline": parallel.pipeline_model_parallel_size,
        "context": parallel.context_parallel_size,
    }
    replica = sizes["tensor"] * sizes["pipeline"] * sizes["context"]
    if world_size % replica:
        raise UserError(
            f"{world_size} processes do not divide into replicas of tensor {sizes['tensor']} * pipeline "
            f"{sizes['pipeline']} * context {sizes['context']} = {replica}; start a multiple of {replica}"
        )
    data_parallel_size = world_size // replica
    step = training.micro_batch_size * data_parallel_size
    global_batch_size = training.global_batch_size or step
    if training.decrease_batch_size_if_needed:
        if global_batch_size < step:
            raise UserError(
                f"global_batch_size={global_batch_size} is below micro_batch_size={training.micro_batch_size} * "
                f"data-parallel size {data_parallel_size} = {step}; raise it"
            )
    elif global_batch_size % step:
        raise UserError(
            f"global_batch_size={global_batch_size} is not divisible by micro_batch_size={training.micro_batch_size} "
            f"* data-parallel size {data_parallel_size} = {step}; change it or give --decrease-batch-size-if-needed"
        )
    _check_rampup(arguments, step)
    return RunSizes(world_size, data_parallel_size, global_batch_size)


def _check_rampup(arguments: Arguments, step: int) -> None:
    rampup = arguments.training.rampup_batch_size
    if rampup is None or arguments.training.decrease_batch_size_if_needed:
        return
    if rampup[0] % step or rampup[1] % step:
        raise UserError(
            f"rampup_batch_size={rampup}: start and increment must be multiples of micro-batch size * data-parallel "
            f"size = {step}; change them or give --decrease-batch-size-if-needed"
        )


def check_schedule(arguments: Arguments, sizes: RunSizes, num_layers: int) -> None:
    """Refuses what the interleaved schedule cannot run, or would run wrongly. ``arguments`` of ``resolve_pipeline``."""
    parallel, training = arguments.parallel, arguments.training
    stages = parallel.pipeline_model_parallel_size
    if num_virtual_stages(parallel, num_layers) is None:
        return
    if not parallel.overlap_p2p_comm:
        # Batched transfers mix up the messages of the chunks of two stages and the loss is wrong without a word.
        raise UserError(
            "several model chunks per pipeline stage train wrongly without overlapped transfers; "
            "leave --no-overlap-p2p-comm out"
        )
    num_microbatches = sizes.num_microbatches(training.micro_batch_size)
    if num_microbatches % stages:
        raise UserError(
            f"the interleaved schedule needs micro-batches ({num_microbatches}) to be a multiple of "
            f"pipeline_model_parallel_size={stages}; change --global-batch-size"
        )
    if training.rampup_batch_size:
        raise UserError("rampup_batch_size does not go with several model chunks per pipeline stage; drop one of them")


def check_memory_settings(arguments: Arguments, plan: UpscalePlan) -> None:
    """Refuses what only Memory blocks can do where there are none, and what theirs cannot."""
    if plan.memory is not None:
        slots, bank = arguments.optimizer.memory_update_slots, plan.memory.memory_num_keys**2
        if slots > bank:
            raise UserError(
                f"memory_update_slots={slots} is more than the {bank} slots of a value bank; give fewer, or 0 for all"
            )
        if arguments.training.train == "lora" and (slots or arguments.optimizer.value_optimizer):
            raise UserError(
                "--train lora trains no memory values; leave --memory-update-slots and --value-optimizer out"
            )
        interval = arguments.memory_telemetry.memory_revive_interval
        if interval and arguments.training.train in ("values", "lora"):
            raise UserError(
                f"memory_revive_interval={interval} moves keys, which --train {arguments.training.train} freezes; leave one out"
            )
        return
    for group, name in (
        (arguments.memory_telemetry, "memory_revive_interval"),
        (arguments.memory_telemetry, "memory_balance_loss_coeff"),
        (arguments.optimizer, "memory_update_slots"),
        (arguments.optimizer, "value_optimizer"),
    ):
        value = getattr(group, name)
        if value:
            raise UserError(
                f"{name}={value} is a setting of Memory blocks, and policy {plan.policy} has none; leave it out"
            )


def check_experts(arguments: Arguments, architecture: Architecture, world_size: int) -> None:
    """Refuses what a mixture of experts cannot do, and its flags where there is none."""
    parallel, training, model = arguments.parallel, arguments.training, architecture.model
    if model.num_moe_experts is None:
        if parallel.moe_grouped_gemm or training.moe_aux_loss_coeff or parallel.expert_model_parallel_size > 1:
            raise UserError(
                f"moe_grouped_gemm={parallel.moe_grouped_gemm}, moe_aux_loss_coeff={training.moe_aux_loss_coeff} and "
                f"expert_model_parallel_size={parallel.expert_model_parallel_size} are settings of experts, and this model "
                "has none; leave them out"
            )
        return
    tensor = parallel.tensor_model_parallel_size
    if tensor > 1 and not parallel.sequence_parallel and not training.skip_train:
        raise UserError(
            f"tensor_model_parallel_size={tensor} with experts needs --sequence-parallel, as in Megatron-Core; add it"
        )
    experts, channels = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size or tensor
    replica = experts * channels * parallel.pipeline_model_parallel_size
    if world_size % replica:
        raise UserError(
            f"{world_size} processes do not divide into expert_model_parallel_size={experts} * "
            f"expert_tensor_parallel_size={channels} * pipeline_model_parallel_size="
            f"{parallel.pipeline_model_parallel_size} = {replica}; start a multiple of {replica}"
        )
    if parallel.moe_grouped_gemm and parallel.distributed_backend == "gloo":
        raise UserError("moe_grouped_gemm needs kernels of a GPU; leave it out with --distributed-backend gloo")
    if parallel.moe_grouped_gemm and not any(
        importlib.util.find_spec(package) for package in ("transformer_engine", "grouped_gemm")
    ):
        raise UserError("moe_grouped_gemm needs Transformer Engine or grouped_gemm, neither is installed; leave it out")


def check_kl_to_base(arguments: Arguments, architecture: Architecture) -> None:
    """Refuses a divergence from a base that training changes, or that no process holds whole."""
    coefficient, plan, train = arguments.training.kl_to_base, architecture.plan, architecture.train
    if not coefficient or arguments.training.skip_train:
        return
    stages = arguments.parallel.pipeline_model_parallel_size
    if stages > 1:
        raise UserError(
            f"kl_to_base={coefficient:g} runs the base whole on every process, and pipeline_model_parallel_size={stages} divides "
            "it; choose 1"
        )
    check_keeps_base(coefficient, plan, train)


def check_keeps_base(coefficient: float, plan: UpscalePlan, train: Train) -> None:
    """Raises ``ValueError`` where training changes the base that ``--kl-to-base`` needs."""
    if not plan.keeps_base(train):
        raise UserError(
            f"kl_to_base={coefficient:g} needs the base as it was, and --train {train} of policy {plan.policy} changes it; choose "
            "--train lora, or --train inserted where blocks were inserted, or --l2-to-start in its place"
        )


def check_background(arguments: Arguments, architecture: Architecture) -> None:
    """Refuses sparse updates without the counts that they need."""
    slots = arguments.optimizer.memory_update_slots
    if slots and architecture.background is None and not arguments.training.skip_train:
        raise UserError(
            f"memory_update_slots={slots} needs to know which slots text of the old domain reads, "
            "and the checkpoint has no such counts; make them with midus background --load DIR --data-path OLD"
        )


def check_environment(arguments: Arguments) -> None:
    """Packages without which a run would fail or hang late."""
    if arguments.checkpoint.save is not None and importlib.util.find_spec("psutil") is None:
        # Megatron-Core's writer processes die on the import, and the save waits for them for ever.
        raise UserError("saving checkpoints needs psutil, which is not installed; pip install psutil")
    if arguments.logging.tensorboard_dir is not None and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard-dir needs tensorboard, which is not installed; pip install tensorboard")
    if arguments.logging.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise UserError("--wandb-project needs wandb, which is not installed; pip install wandb")
