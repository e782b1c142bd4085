"""Builds a run from its arguments and starts the loop."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.core.num_microbatches_calculator import (
    get_current_running_global_batch_size,
    init_num_microbatches_calculator,
    update_num_microbatches,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.rerun_state_machine import RerunMode, initialize_rerun_state_machine
from megatron.core.timers import Timers

from megatron_midus import platform
from megatron_midus.data import sft_dataset
from megatron_midus.errors import UserError
from megatron_midus.files import write_text_atomically
from megatron_midus.training import build
from megatron_midus.training.architecture import Architecture, resolve_model
from megatron_midus.training.arguments import Arguments
from megatron_midus.training.checkpoint.source import RUN_FILE, Source
from megatron_midus.training.checkpoint.state import (
    Progress,
    check_epoch,
    load_average,
    load_start_weights,
    load_training_state,
    read_common_state,
    read_progress,
)
from megatron_midus.training.checkpoint.verification import agree_on_source
from megatron_midus.training.checkpoint.writer import set_aside
from megatron_midus.training.checks import RunSizes, check_background
from megatron_midus.training.dry_run import dry_run
from megatron_midus.training.loop import Trainer
from megatron_midus.training.memory.value_updates import ValueUpdates
from megatron_midus.training.messages import is_last_rank, print_rank_0, rank, warn_rank_0
from megatron_midus.training.optimizer import build_optimizer, build_scheduler
from megatron_midus.training.schedule import schedule_flags, schedule_lengths
from megatron_midus.training.signals import TerminationSignal
from megatron_midus.training.start import Start
from megatron_midus.training.start_weights import StartWeights
from megatron_midus.training.step import Learner
from megatron_midus.training.summary import describe_groups, describe_run
from megatron_midus.training.telemetry import Telemetry
from megatron_midus.training.weight_average import WeightAverage
from megatron_midus.upscaling.cost import flops_per_token


def pretrain(start: Start) -> int:
    """Trains; returns the exit code. Raises ``ValueError`` for a user's mistake, if possible before any work."""
    if start.arguments.training.dry_run:
        start = dataclasses.replace(start, arguments=start.arguments.without_outputs())
    signal = TerminationSignal()
    if start.arguments.training.exit_signal_handler:
        signal.install()
    start = connect_ranks(start)
    arguments = start.arguments
    with _data_for(arguments) as data_arguments:
        trainer = _build_trainer(dataclasses.replace(start, arguments=data_arguments), signal)
        if arguments.training.dry_run:
            print_rank_0(dry_run(trainer))
    _record_configuration(arguments)
    if arguments.training.exit_signal_handler and not arguments.training.dry_run:
        signal.install_interrupt()
    try:
        code = 0 if arguments.training.dry_run else trainer.run()
    finally:
        trainer.telemetry.close()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return code


def connect_ranks(start: Start) -> Start:
    """Makes the process groups; returns what all ranks agree to begin with, as whole checkpoints go. Collective."""
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    arguments, parallel = start.arguments, start.arguments.parallel
    if parallel.deterministic_mode:
        # Operations that have no deterministic kernel raise instead of drifting.
        torch.use_deterministic_algorithms(True)
    platform.initialize_distributed(parallel.distributed_backend, timeout_minutes=parallel.distributed_timeout_minutes)
    agreed = agree_on_source(arguments.checkpoint, start.source)
    if agreed != start.source:
        tokenizer, architecture = resolve_model(arguments, agreed)
        start = dataclasses.replace(start, source=agreed, tokenizer=tokenizer, architecture=architecture)
    if arguments.training.bf16 and platform.is_cpu() and not platform.cpu_multiplies_bf16():
        warn_rank_0("this processor has no bf16 instructions: --bf16 trains several times slower here than without it")
    build.initialize_model_parallel(parallel, arguments.training.seed, start.architecture.plan.num_layers)
    return start


@contextlib.contextmanager
def _data_for(arguments: Arguments) -> Iterator[Arguments]:
    """A dry run keeps the index of its samples in a directory that goes away: in --data-cache-path, which all nodes see,
    where that is given."""
    if not arguments.training.dry_run or arguments.data.mock_data:
        yield arguments
        return
    cache = arguments.data.data_cache_path
    parent = cache if cache is not None and Path(cache).is_dir() else None
    name = [tempfile.mkdtemp(prefix="midus_dry_run_", dir=parent) if rank() == 0 else None]
    torch.distributed.broadcast_object_list(name)
    assert name[0] is not None
    try:
        yield dataclasses.replace(arguments, data=dataclasses.replace(arguments.data, data_cache_path=name[0]))
    finally:
        if rank() == 0:
            shutil.rmtree(name[0], ignore_errors=True)


def _record_configuration(arguments: Arguments) -> None:
    """Says what was changed from the defaults, and keeps the whole beside the checkpoints."""
    changed = "".join(f"  {line}\n" for line in arguments.to_yaml(only_changed=True).splitlines() if line[0] != "#")
    print_rank_0(f"configuration (what is not the default):\n{changed}".rstrip())
    save = arguments.checkpoint.save
    if save is not None and rank() == 0:
        write_text_atomically(Path(save) / RUN_FILE, arguments.to_yaml())


def _build_trainer(start: Start, signal: TerminationSignal) -> Trainer:
    start = _count_epoch(start)
    arguments, source, architecture, sizes = start.arguments, start.source, start.architecture, start.sizes
    training = arguments.training
    timers = Timers(arguments.logging.timing_log_level, arguments.logging.timing_log_option)
    initialize_rerun_state_machine(mode=RerunMode(training.rerun_mode))
    init_num_microbatches_calculator(
        rank(),
        training.rampup_batch_size,
        sizes.global_batch_size,
        training.micro_batch_size,
        sizes.data_parallel_size,
        training.decrease_batch_size_if_needed,
    )
    config = build.transformer_config(arguments, architecture, timers)
    placement = build.place_values(arguments, architecture, sizes)
    chunks = build.build_model_chunks(arguments, architecture, config, source, placement)
    print_rank_0(describe_run(arguments, architecture, sizes, source))
    chunks = build.wrap_model_chunks(chunks, arguments, config)
    optimizer = scheduler = None
    if not training.skip_train:
        optimizer = build_optimizer(
            chunks,
            arguments.optimizer,
            training,
            arguments.parallel,
            timers=timers,
            log_num_zeros=arguments.logging.log_num_zeros_in_grad,
        )
        scheduler = build_scheduler(optimizer, arguments.optimizer, training, sizes.global_batch_size)
        build.connect(config, chunks, optimizer, arguments.parallel)
        print_rank_0(describe_groups(optimizer))
    value_updates = _value_updates(arguments, architecture, chunks, optimizer)
    decay = arguments.optimizer.ema_decay
    average = WeightAverage(chunks, decay, optimizer) if decay is not None else None
    pull = arguments.optimizer.l2_to_start
    start_weights = StartWeights(chunks, pull, optimizer) if optimizer is not None and pull else None
    learner = Learner(chunks, optimizer, scheduler, value_updates, average, start_weights)
    progress = _restore(start, learner)
    train_iters = _train_iters(arguments, progress)
    datasets = build.build_datasets(
        arguments.data, start.tokenizer, num_samples=_num_samples(arguments, sizes, progress), seed=training.seed
    )
    if arguments.data.sft and datasets[0] is not None:
        print_rank_0(sft_dataset.describe(datasets[0], global_batch_size=sizes.global_batch_size))
    telemetry = Telemetry(
        arguments.logging,
        train_iters=train_iters,
        flops_per_token=flops_per_token(
            architecture.model,
            architecture.plan,
            arguments.data.seq_length,
            train=architecture.train,
            lora_rank=training.lora_rank,
            kl_to_base=training.kl_to_base > 0,
        ),
        seq_length=arguments.data.seq_length,
        world_size=sizes.world_size,
        first_iteration=progress.iteration,
        is_writer=is_last_rank(),
        run_settings=dataclasses.asdict(arguments),
        save_directory=arguments.checkpoint.save,
    )
    trainer = Trainer(
        start,
        learner,
        progress=progress,
        datasets=datasets,
        telemetry=telemetry,
        signal=signal,
        timers=timers,
        train_iters=train_iters,
    )
    if trainer.memory_telemetry is not None and source.resume and source.directory is not None:
        trainer.memory_telemetry.load(source.directory)
    return trainer


def _count_epoch(start: Start) -> Start:
    """Finds out what ``--train-epochs`` means, before anything that has a length is built: from the dataset of one pass."""
    arguments, training = start.arguments, start.arguments.training
    if training.train_epochs is None or training.skip_train:
        return start
    dataset, _, _ = build.build_datasets(arguments.data, start.tokenizer, num_samples=(None, 0, 0), seed=training.seed)
    # Rank 0 always has it.
    counted = torch.tensor([len(dataset) if rank() == 0 else 0], dtype=torch.int64, device="cuda")
    torch.distributed.broadcast(counted, 0)
    training = dataclasses.replace(training, samples_per_epoch=int(counted))
    if not training.total_samples:
        raise UserError(f"the training data are less than one sample of --seq-length {arguments.data.seq_length}")
    schedule_lengths(arguments.optimizer, training, start.sizes.global_batch_size)
    print_rank_0(
        f"{training.train_epochs} epochs of {training.samples_per_epoch:,} samples: {training.total_samples:,} samples"
    )
    if start.source.resume and start.source.directory is not None:
        check_epoch(start.source.directory, training.samples_per_epoch)
    return dataclasses.replace(start, arguments=dataclasses.replace(arguments, training=training))


def _value_updates(
    arguments: Arguments, architecture: Architecture, chunks: list[torch.nn.Module], optimizer: MegatronOptimizer | None
) -> ValueUpdates | None:
    """How memory values are updated; ``None`` where as the rest."""
    settings = arguments.optimizer
    if optimizer is None or not (settings.memory_update_slots or settings.value_optimizer):
        return None
    # Again: the ranks may have agreed on an earlier checkpoint.
    check_background(arguments, architecture)
    updates = ValueUpdates(settings, chunks, optimizer, architecture.background)
    print_rank_0(updates.describe())
    return updates


def _restore(start: Start, learner: Learner) -> Progress:
    """Where the run goes on, with the optimizer as it was there."""
    arguments, source = start.arguments, start.source
    if source.directory is None or not source.resume:
        return Progress()
    _set_damaged_aside(arguments, source)
    if learner.optimizer is None or learner.scheduler is None:
        progress = read_progress(read_common_state(source.directory))
    else:
        progress = load_training_state(
            source.directory,
            learner.model_chunks,
            learner.optimizer,
            learner.scheduler,
            settings=arguments.optimizer,
            flags=schedule_flags(arguments.optimizer, arguments.training, start.sizes.global_batch_size),
            train=start.architecture.train,
            load_optim=arguments.checkpoint.load_optim,
            load_rng=arguments.checkpoint.load_rng,
        )
    load_average(source.directory, learner.average, train=start.architecture.train)
    load_start_weights(source.directory, learner.start_weights, train=start.architecture.train)
    if learner.optimizer is not None and progress.iteration:
        print_rank_0(f"resuming after iteration {progress.iteration}, {progress.consumed_train_samples} samples")
    return progress


def _set_damaged_aside(arguments: Arguments, source: Source) -> None:
    """In the run's own directory, so that neither retention nor the next start counts damaged checkpoints."""
    save = arguments.checkpoint.save
    if save is None or source.directory is None or source.directory.parent.resolve() != Path(save).resolve():
        return
    if rank() == 0 and source.damaged:
        set_aside(Path(save), source.damaged, go_on_from=source.iteration)
    torch.distributed.barrier()


def _train_iters(arguments: Arguments, progress: Progress) -> int:
    """Steps of the whole run, earlier starts included.

    ``--train-samples`` and ``--train-epochs`` are counted from the samples consumed so far, whatever batch sizes they came in. As in Megatron-LM
    the samples that are left after the last whole batch are not trained on.
    """
    training = arguments.training
    total = training.total_samples
    if total is None:
        return training.train_iters or 0
    consumed, iterations = progress.consumed_train_samples, progress.iteration
    ramp = training.rampup_batch_size[2] if training.rampup_batch_size is not None else 0
    while True:
        update_num_microbatches(consumed, consistency_check=False)
        step = get_current_running_global_batch_size()
        left = max(total - consumed, 0)
        if consumed > ramp or left < step:
            update_num_microbatches(progress.consumed_train_samples, consistency_check=False)
            return iterations + left // step
        consumed += step
        iterations += 1


def _num_samples(
    arguments: Arguments, sizes: RunSizes, progress: Progress
) -> tuple[int | None, int | None, int | None]:
    """Samples of train, validation and test that the run will ask for."""
    training = arguments.training
    if training.total_samples is not None:
        train = training.total_samples
    else:
        # Earlier steps of the run may have had another batch size.
        left = max((training.train_iters or 0) - progress.iteration, 0)
        train = progress.consumed_train_samples + left * get_current_running_global_batch_size()
    if training.full_validation:
        return train, None, None
    evaluated = training.eval_iters * sizes.global_batch_size
    return train, evaluated, evaluated
