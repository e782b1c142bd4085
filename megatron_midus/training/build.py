"""From arguments to the parts of a run: process groups, model, data. Everything that can be refused is refused here."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.rerun_state_machine import RerunDataIterator
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_midus import data as midus_data
from megatron_midus.config.data import DataConfig
from megatron_midus.config.parallel import ParallelConfig
from megatron_midus.data.tokenizer import Tokenizer
from megatron_midus.memory import BalanceLoss, MemoryRuntime
from megatron_midus.model.builder import build_model, freeze, let_gradients_through, unwrap
from megatron_midus.model.checkpoint import load_adapters, load_weights
from megatron_midus.model.config import make_transformer_config
from megatron_midus.model.lora import add_adapters
from megatron_midus.model.specs import TransformerImpl
from megatron_midus.training.architecture import Architecture
from megatron_midus.training.arguments import Arguments
from megatron_midus.training.checkpoint.source import Source
from megatron_midus.training.checkpoint.state import readable
from megatron_midus.training.checks import RunSizes, num_virtual_stages
from megatron_midus.training.memory.counters import memory_layers
from megatron_midus.training.messages import print_rank_0
from megatron_midus.upscaling.value_placement import Placement, resolve_value_placement


def initialize_model_parallel(parallel: ParallelConfig, seed: int, num_layers: int) -> None:
    """Makes the process groups and seeds every generator, differently per pipeline stage."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=num_virtual_stages(parallel, num_layers),
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
    )
    # As Megatron does: the same on all ranks of a stage, so that tensor-parallel ranks draw the same full matrices.
    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(stage_seed)
    numpy.random.seed(stage_seed % 2**32)
    torch.manual_seed(stage_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed)


def transformer_config(arguments: Arguments, architecture: Architecture, timers: Any = None) -> TransformerConfig:
    """Megatron-Core's view of model, layout and precision."""
    parallel, training = arguments.parallel, arguments.training
    return make_transformer_config(
        architecture.model,
        architecture.plan,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=num_virtual_stages(parallel, architecture.plan.num_layers),
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        bf16=training.bf16,
        recompute_granularity=parallel.recompute_granularity,
        recompute_method=parallel.recompute_method,
        recompute_num_layers=parallel.recompute_num_layers,
        deterministic=parallel.deterministic_mode,
        calculate_per_token_loss=training.calculate_per_token_loss or arguments.data.sft,
        hidden_dropout=training.hidden_dropout,
        attention_dropout=training.attention_dropout,
        timers=timers,
        barrier_with_L1_time=arguments.logging.barrier_with_L1_time,
        pipeline_model_parallel_layout=parallel.pipeline_model_parallel_layout,
        **({"fp16": True} if training.fp16 else {}),
        **_experts(arguments, architecture),
    )


def _experts(arguments: Arguments, architecture: Architecture) -> dict[str, Any]:
    if architecture.model.num_moe_experts is None:
        return {}
    coeff = arguments.training.moe_aux_loss_coeff
    return {
        "moe_token_dispatcher_type": arguments.parallel.moe_token_dispatcher_type,
        "moe_grouped_gemm": arguments.parallel.moe_grouped_gemm,
        **({} if coeff is None else {"moe_aux_loss_coeff": coeff}),
    }


def transformer_impl(arguments: Arguments) -> TransformerImpl:
    """What ``auto`` means for this run: masks between documents need attention that looks at masks, adapters layers whose
    input is that of their weight."""
    chosen = arguments.parallel.transformer_impl
    needs_local = arguments.data.reset_attention_mask or arguments.training.lora_rank is not None
    return "local" if chosen == "auto" and needs_local else chosen


def build_model_chunks(
    arguments: Arguments,
    architecture: Architecture,
    config: TransformerConfig,
    source: Source,
    value_placement: Placement = "replicated",
) -> list[torch.nn.Module]:
    """This rank's part of the model, with the weights of ``source``, frozen where ``--train`` says so, on its device.

    Weights are loaded before the optimizer copies them, so that its master weights need no second look.
    """
    stages = num_virtual_stages(arguments.parallel, architecture.plan.num_layers)
    runtime = MemoryRuntime(
        seed=arguments.training.seed,
        backend=arguments.parallel.memory_backend,
        value_placement=value_placement,
        deterministic=arguments.parallel.memory_deterministic,
        values_main_grad=arguments.parallel.memory_values_main_grad,
    )
    chunks: list[torch.nn.Module] = []
    for vp_stage in [None] if stages is None else list(range(stages)):
        chunk = build_model(
            config,
            model=architecture.model,
            plan=architecture.plan,
            sequence_length=arguments.data.seq_length,
            transformer_impl=transformer_impl(arguments),
            make_vocab_size_divisible_by=arguments.compatibility.make_vocab_size_divisible_by,
            memory_runtime=runtime,
            vp_stage=vp_stage,
        )
        for parameter in chunk.parameters():
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        chunks.append(chunk.cuda())
    if source.directory is not None:
        with readable(source.directory):
            load_weights(chunks, source.directory)
    if architecture.train == "lora":
        _add_adapters(chunks, arguments, config, source)
    else:
        freeze(chunks, architecture.plan, architecture.train)
    coeff = arguments.memory_telemetry.memory_balance_loss_coeff
    if coeff:
        for layer in memory_layers(chunks):
            # Of a frozen block it would be a goal for the blocks before it alone.
            if any(parameter.requires_grad for parameter in layer.parameters()):
                layer.self_attention.linear_proj.balance_loss = BalanceLoss(coeff, get_num_microbatches)
    return chunks


def _add_adapters(
    chunks: Sequence[torch.nn.Module], arguments: Arguments, config: TransformerConfig, source: Source
) -> None:
    """Freezes the model but for adapters, those of ``source`` where it has them."""
    training = arguments.training
    assert training.lora_rank is not None
    add_adapters(chunks, config, rank=training.lora_rank, alpha=training.lora_alpha, seed=training.seed)
    for chunk in chunks:
        let_gradients_through(unwrap(chunk))
        for parameter in chunk.parameters():
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    if source.resume and source.directory is not None:
        with readable(source.directory):
            load_adapters(chunks, source.directory)


def place_values(arguments: Arguments, architecture: Architecture, sizes: RunSizes) -> Placement:
    """Resolves ``--memory-value-placement`` and, where there is a choice, says why."""
    wanted, training = arguments.parallel.memory_value_placement, arguments.training
    placement, reason = resolve_value_placement(
        wanted,
        architecture.plan.memory,
        hidden_size=architecture.model.hidden_size,
        num_attention_heads=architecture.model.num_attention_heads,
        tensor_model_parallel_size=arguments.parallel.tensor_model_parallel_size,
        tokens_per_microbatch=training.micro_batch_size
        * (arguments.data.seq_length // arguments.parallel.context_parallel_size),
        num_microbatches=max(1, sizes.num_microbatches(training.micro_batch_size)),
        itemsize=2 if training.bf16 or training.fp16 else 4,
    )
    if wanted != "replicated":
        print_rank_0(f"memory values: {placement} ({reason})")
    return placement


def wrap_model_chunks(
    chunks: Sequence[torch.nn.Module], arguments: Arguments, config: TransformerConfig
) -> list[torch.nn.Module]:
    """Adds 16-bit casting where asked for and, to train, gradient buffers with their data-parallel reduction."""
    parallel, training = arguments.parallel, arguments.training
    if training.bf16 or training.fp16:
        chunks = [Float16Module(config, chunk) for chunk in chunks]
    if training.skip_train:
        return list(chunks)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=parallel.accumulate_allreduce_grads_in_fp32,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        bucket_size=parallel.ddp_bucket_size,
        average_in_collective=parallel.ddp_average_in_collective,
        check_for_nan_in_grad=training.check_for_nan_in_loss_and_grad,
    )
    # Later chunks are too small for buckets to overlap anything.
    return [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]


def connect(
    config: TransformerConfig,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    parallel: ParallelConfig,
) -> None:
    """Tells the schedules when to reduce gradients, gather parameters and scale losses."""
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    if parallel.overlap_grad_reduce:
        config.no_sync_func = [chunk.no_sync for chunk in chunks]
        config.grad_sync_func = [chunk.start_grad_sync for chunk in chunks]
    if parallel.overlap_param_gather:
        config.param_sync_func = [chunk.start_param_sync for chunk in chunks]
    if len(chunks) == 1:
        for name in ("no_sync_func", "grad_sync_func", "param_sync_func"):
            functions = getattr(config, name)
            if functions is not None:
                setattr(config, name, functions[0])


# -- data ------------------------------------------------------------------------------------------------------------
def build_datasets(
    data: DataConfig, tokenizer: Tokenizer, *, num_samples: Sequence[int | None], seed: int
) -> tuple[Any, Any, Any]:
    """Train, validation and test samples; ``None`` on ranks that read nothing."""

    def is_built() -> bool:
        # Global rank 0 writes the sample cache, whatever it reads later.
        return torch.distributed.get_rank() == 0 or (
            parallel_state.get_tensor_model_parallel_rank() == 0
            and midus_data.needs_data(
                is_first_stage=parallel_state.is_pipeline_first_stage(ignore_virtual=True),
                is_last_stage=parallel_state.is_pipeline_last_stage(ignore_virtual=True),
                reset_attention_mask=data.reset_attention_mask,
            )
        )

    return midus_data.build_train_valid_test_datasets(
        data, tokenizer, num_samples=num_samples, seed=seed, is_built_on_rank=is_built
    )


def build_iterators(
    dataset: Any,
    arguments: Arguments,
    *,
    num_chunks: int,
    consumed_samples: int,
    is_training: bool,
) -> RerunDataIterator | list[RerunDataIterator | None] | None:
    """An iterator per model chunk over this rank's micro-batches; ``None`` where nothing is read.

    Args:
        dataset: from ``build_datasets``.
        consumed_samples: samples of the whole run so far.
        is_training: training follows ``--dataloader-type``; evaluation reads every sample once, in order.
    """
    data = arguments.data
    reset_mask = data.reset_attention_mask

    def one(chunk: int) -> RerunDataIterator | None:
        stage = None if num_chunks == 1 else chunk
        wanted = midus_data.needs_data(
            is_first_stage=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            is_last_stage=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            reset_attention_mask=reset_mask,
        )
        if not wanted or dataset is None or parallel_state.get_tensor_model_parallel_rank() != 0:
            return None
        loader = midus_data.build_data_loader(
            dataset,
            consumed_samples=consumed_samples,
            micro_batch_size=arguments.training.micro_batch_size,
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            data_parallel_size=parallel_state.get_data_parallel_world_size(),
            num_workers=data.num_workers,
            dataloader_type=data.dataloader_type if is_training else "single",
            seed=arguments.training.seed,
        )
        return RerunDataIterator(iter(loader))

    iterators = [one(chunk) for chunk in range(num_chunks)]
    return iterators[0] if num_chunks == 1 else iterators
