"""What the processes of the layout tests do: train as the driver does, from flags and a checkpoint, on numbered samples.

Everything between the command line and the optimizer's step is the driver's own; only the loop around the steps is here.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import load_common_state_dict, load_plain_tensors
from megatron.core.num_microbatches_calculator import (
    destroy_num_microbatches_calculator,
    init_num_microbatches_calculator,
)
from megatron.core.rerun_state_machine import RerunMode, initialize_rerun_state_machine
from scenarios import fill_with_random_numbers, generator, weights

from megatron_midus.checkpoint.layout import find_checkpoint, iteration_directory, write_latest_iteration
from megatron_midus.config import MemoryConfig, ModelConfig
from megatron_midus.model.builder import unwrap
from megatron_midus.model.checkpoint import save_weights
from megatron_midus.training import build
from megatron_midus.training.architecture import Architecture, resolve_architecture
from megatron_midus.training.arguments import Arguments, parse_arguments
from megatron_midus.training.checkpoint.optimizer_state import stored_groups
from megatron_midus.training.checkpoint.source import Source, find_source
from megatron_midus.training.checkpoint.state import (
    Progress,
    load_average,
    load_start_weights,
    load_training_state,
    training_state,
)
from megatron_midus.training.checkpoint.writer import CheckpointWriter
from megatron_midus.training.checks import check_experts, check_schedule, resolve_pipeline, resolve_sizes
from megatron_midus.training.kl_to_base import KlToBase, kl_to_base
from megatron_midus.training.memory.telemetry import MemoryTelemetry
from megatron_midus.training.memory.value_updates import ValueUpdates
from megatron_midus.training.optimizer import build_optimizer, build_scheduler
from megatron_midus.training.schedule import schedule_flags
from megatron_midus.training.start_weights import StartWeights
from megatron_midus.training.step import BatchShape, Learner, make_forward_step, train_step
from megatron_midus.training.weight_average import WeightAverage
from megatron_midus.upscaling import make_plan

SEQUENCE, VOCABULARY, GLOBAL_BATCH = 16, 37, 4

# Adam's eps: with 1e-8 it turns rounding of near-zero gradients into whole steps.
COMMON = (
    f"--distributed-backend gloo --mock-data --seq-length {SEQUENCE} --global-batch-size {GLOBAL_BATCH} --lr 3e-3 "
    "--lr-decay-style constant --adam-eps 1e-3 --value-lr-mult 3 --make-vocab-size-divisible-by 1 --train all "
    "--memory-backend torch --num-workers 0 --micro-batch-size 2 --train-iters 10 "
    # Every prediction counts alike, in however many micro-batches.
    "--calculate-per-token-loss"
)

# Eight heads, so that eight ranks can share them; two groups of keys and values, so that four ranks share one.
MODEL = {
    "num_layers": 6,
    "hidden_size": 32,
    "ffn_hidden_size": 40,
    "num_attention_heads": 8,
    "num_query_groups": 2,
    "kv_channels": 6,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "hive": {},
    "full": {"memory_variant": "full"},
    "block": {"memory_variant": "block"},
}
# A checkpoint of its own: Memory blocks between mixtures of experts.
EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24, "moe_aux_loss_coeff": 0.05}


class NumberedSamples(torch.utils.data.Dataset):
    """Random tokens that depend on the sample's number alone."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        text = torch.randint(VOCABULARY, (SEQUENCE + 1,), generator=generator(f"sample {index}"))
        # Not every prediction counts, and not as many on every rank.
        mask = (torch.arange(SEQUENCE) >= index % 3).float()
        return {
            "tokens": text[:-1],
            "labels": text[1:],
            "loss_mask": mask,
            "position_ids": torch.arange(SEQUENCE),
        }


def write_checkpoints(root: Path, only: str | None = None) -> None:
    """``root/<variant>``: a checkpoint of iteration 0 of each variant, every weight random, value banks too."""
    for variant, settings in {**VARIANTS, "experts": {}, "experts_copied": None}.items():
        if only not in (None, variant):
            continue
        plan = make_plan("llama_pro", num_layers=4, insert_after=(1, 3))
        if settings is not None:
            memory = MemoryConfig(memory_num_keys=9, memory_topk=3, memory_latent_size=8, **settings)
            plan = make_plan("interleave", num_layers=4, insert_after=(1, 3), memory=memory)
        model = ModelConfig(**{**MODEL, **(EXPERTS if variant.startswith("experts") else {})})
        arguments = parse_arguments(shlex.split(COMMON))
        _initialize_parallel(arguments, model.num_layers)
        architecture = Architecture(model, plan, "all", None)
        config = build.transformer_config(arguments, architecture)
        chunks = build.build_model_chunks(arguments, architecture, config, Source(None))
        fill_with_random_numbers(chunks, plan)
        directory = iteration_directory(root / variant, 0)
        directory.mkdir(parents=True)
        save_weights(chunks, directory)
        plan.save(directory)
        model.save(directory)
        write_latest_iteration(root / variant, 0)


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: what it loads, its flags, and where it goes on to.

    Attributes:
        load: checkpoint root.
        flags: on top of ``COMMON`` and those of the layout.
        steps: iteration after which it ends.
        save: root of a checkpoint that is written at the end.
        updated_apart: iterations after which a step updates memory values in their own way, if the flags say so; all when
            absent.
    """

    load: Path
    flags: str = ""
    steps: int = 10
    save: Path | None = None
    updated_apart: range | None = None


@dataclasses.dataclass
class Outcome:
    """What a run leaves in memory.

    Attributes:
        curve: ``(iteration, loss, gradient norm)`` of every step, loss off the last stage None.
        figures: ``(iteration, figures of the blocks, update ratios)`` of every report, on the last rank.
        revived: ``(iteration, sub-keys by block)`` of every revival, on the last rank.
    """

    curve: list[tuple]
    chunks: list
    optimizer: Any
    memory_telemetry: MemoryTelemetry | None
    figures: list[tuple]
    revived: list[tuple]
    average: WeightAverage | None


class _Recorder:
    """In place of ``MemoryReport``."""

    def __init__(self) -> None:
        self.figures: list[tuple] = []
        self.revived: list[tuple] = []

    def write(self, *report: Any) -> None:
        self.figures.append(report)

    def write_revived(self, *revival: Any) -> None:
        self.revived.append(revival)


def train_runs(runs: dict[str, Run], layout_flags: str) -> dict[str, list[tuple]]:
    """The runs one after the other: ``(iteration, loss, gradient norm)`` of every step, loss off the last stage None."""
    return {name: train(run, layout_flags).curve for name, run in runs.items()}


def train_and_average(runs: dict[str, Run], layout_flags: str) -> dict[str, tuple[list[tuple], list]]:
    """As ``train_runs``, of runs with ``--ema-decay``; beside each curve ``weights`` of the average."""
    found = {}
    for name, run in runs.items():
        outcome = train(run, layout_flags)
        assert outcome.average is not None
        with outcome.average.in_place_of_weights():
            found[name] = (outcome.curve, weights(outcome.chunks))
    return found


def train_and_watch(runs: dict[str, Run], layout_flags: str) -> dict[str, list[list]]:
    """``weights`` before the first step and after every step of each run."""
    found: dict[str, list[list]] = {}
    for name, run in runs.items():
        kept = found[name] = []

        def keep(chunks: list, optimizer: Any = None, kept: list = kept) -> None:
            kept.append(weights(chunks))

        train(run, layout_flags, before_steps=keep, after_step=keep)
    return found


def average_of_masters(runs: dict[str, Run], layout_flags: str) -> dict[str, dict[str, Any]]:
    """By run, of every parameter that learns: the average as a checkpoint holds it (fp32); before and after every step the
    weights and, where the optimizer is not distributed, their masters."""
    found = {}
    for name, run in runs.items():
        steps: list[dict[str, tuple[torch.Tensor, torch.Tensor]]] = []

        def keep(chunks: list, optimizer: Any = None, kept: list = steps) -> None:
            if chunks[0].ddp_config.use_distributed_optimizer:
                return
            learning = [(n, p) for n, p in unwrap(chunks[0]).named_parameters() if p.requires_grad]
            kept.append({n: (p.detach().float(), p.main_param.detach().clone()) for n, p in learning})

        outcome = train(run, layout_flags, before_steps=keep, after_step=keep)
        if outcome.average is None:
            continue
        entries = outcome.average.state()["weight_average"]["0"]
        found[name] = {"average": {n: entry.data.clone() for n, entry in entries.items()}, "steps": steps}
    return found


def train(
    run: Run,
    layout_flags: str,
    *,
    before_steps: Callable[[list], None] = lambda chunks: None,
    after_step: Callable[[list, Any], None] | None = None,
) -> Outcome:
    """One run; ``before_steps`` is called with the model chunks once everything is loaded, ``after_step`` with chunks and
    optimizer, weights being whole."""
    flags = f"{COMMON} --load {run.load} {layout_flags} {run.flags}"
    arguments = parse_arguments(shlex.split(flags))
    sizes = resolve_sizes(arguments, torch.distributed.get_world_size())
    source = find_source(arguments.checkpoint)
    architecture = resolve_architecture(arguments, source, tokenizer_vocab_size=None)
    parallel = resolve_pipeline(
        arguments.parallel, architecture.model, architecture.plan, seq_length=SEQUENCE, train=architecture.train
    )
    arguments = dataclasses.replace(arguments, parallel=parallel)
    check_schedule(arguments, sizes, architecture.plan.num_layers)
    check_experts(arguments, architecture, sizes.world_size)
    _initialize_parallel(arguments, architecture.plan.num_layers)
    destroy_num_microbatches_calculator()
    init_num_microbatches_calculator(
        0, None, sizes.global_batch_size, arguments.training.micro_batch_size, sizes.data_parallel_size, False
    )
    config = build.transformer_config(arguments, architecture)
    placement = build.place_values(arguments, architecture, sizes)
    chunks = build.build_model_chunks(arguments, architecture, config, source, placement)
    chunks = build.wrap_model_chunks(chunks, arguments, config)
    optimizer = build_optimizer(chunks, arguments.optimizer, arguments.training, parallel)
    scheduler = build_scheduler(optimizer, arguments.optimizer, arguments.training, sizes.global_batch_size)
    build.connect(config, chunks, optimizer, parallel)
    value_updates = None
    if arguments.optimizer.memory_update_slots or arguments.optimizer.value_optimizer:
        value_updates = ValueUpdates(arguments.optimizer, chunks, optimizer, architecture.background)
    decay = arguments.optimizer.ema_decay
    average = None if decay is None else WeightAverage(chunks, decay, optimizer)
    pull = arguments.optimizer.l2_to_start
    start_weights = StartWeights(chunks, pull, optimizer) if pull else None
    progress = Progress()
    if source.resume:
        assert source.directory is not None
        progress = load_training_state(
            source.directory,
            chunks,
            optimizer,
            scheduler,
            settings=arguments.optimizer,
            flags=schedule_flags(arguments.optimizer, arguments.training, sizes.global_batch_size),
            train=architecture.train,
            load_optim=arguments.checkpoint.load_optim,
            load_rng=False,
        )
        load_average(source.directory, average, train=architecture.train)
        load_start_weights(source.directory, start_weights, train=architecture.train)
    before_steps(chunks)
    recorder, memory_telemetry = _Recorder(), None
    if arguments.memory_telemetry.memory_log_interval and architecture.plan.memory is not None:
        memory_telemetry = MemoryTelemetry(
            arguments.memory_telemetry,
            model_chunks=chunks,
            optimizer=optimizer,
            report=recorder,
            seed=arguments.training.seed,
            synchronise_parameters=lambda: _synchronise(arguments, chunks),
        )
        if source.resume:
            memory_telemetry.load(source.directory)
    learner = Learner(chunks, optimizer, scheduler, value_updates, average, start_weights)
    term = kl_to_base(arguments, architecture, chunks)
    curve = _steps(arguments, learner, progress, run, memory_telemetry, after_step, term)
    if run.save is not None:
        usage = memory_telemetry.state() if memory_telemetry is not None else None
        state = training_state(
            chunks, optimizer, scheduler, progress, train=architecture.train, with_rng=False, memory_usage=usage,
            average=average, start_weights=start_weights,
        )  # fmt: skip
        CheckpointWriter(run.save, architecture, is_async=False, keep_last=0).save(progress.iteration, state)
    return Outcome(curve, chunks, optimizer, memory_telemetry, recorder.figures, recorder.revived, average)


def _steps(
    arguments: Arguments,
    learner: Learner,
    progress: Progress,
    run: Run,
    memory_telemetry: MemoryTelemetry | None,
    after_step: Callable[[list, Any], None] | None,
    term: KlToBase | None,
) -> list[tuple]:
    chunks = list(learner.model_chunks)
    shape = BatchShape(arguments.training.micro_batch_size, SEQUENCE, False, None)
    forward_step = make_forward_step(shape, check_loss=False, kl_to_base=term)
    iterator = build.build_iterators(
        NumberedSamples(),
        arguments,
        num_chunks=len(chunks),
        consumed_samples=progress.consumed_train_samples,
        is_training=True,
    )
    for chunk in chunks:
        chunk.train()
    curve = []
    while progress.iteration < run.steps:
        is_apart = run.updated_apart is None or progress.iteration in run.updated_apart
        if memory_telemetry is not None:
            memory_telemetry.before_step(progress.iteration + 1)
        result = train_step(
            forward_step, iterator, learner if is_apart else dataclasses.replace(learner, value_updates=None), shape,
            arguments.optimizer, samples=GLOBAL_BATCH, check_loss=False,
        )  # fmt: skip
        progress.iteration += 1
        progress.consumed_train_samples += GLOBAL_BATCH
        divergence = () if term is None else (result.kl_to_base,)
        curve.append((progress.iteration, result.loss, result.grad_norm, *divergence))
        if memory_telemetry is not None:
            memory_telemetry.after_step(progress.iteration)
        if after_step is not None:
            _synchronise(arguments, chunks)
            after_step(chunks, learner.optimizer)
    _synchronise(arguments, chunks)
    return curve


def _synchronise(arguments: Arguments, chunks: list) -> None:
    """Under overlapped gathering the parameters of the last step are still on their way."""
    if arguments.parallel.overlap_param_gather:
        for chunk in chunks:
            chunk.start_param_sync(force_sync=True)


def stored_optimizer_state(roots: dict[str, Path]) -> dict[str, dict[str, torch.Tensor]]:
    """Moments, master weights (``master.<key>``, under whatever name) and step counts of the newest checkpoints."""
    found = {}
    for name, root in roots.items():
        directory, _ = find_checkpoint(root)
        tensors = load_plain_tensors(str(directory))
        common = load_common_state_dict(str(directory))
        state = {key: t for key, t in tensors.items() if key.startswith(("optimizer.state.exp_avg",))}
        for key in (key for key in tensors if key.startswith(("embedding.", "decoder.", "output_layer."))):
            names = (f"optimizer.state.param.{key}", f"optimizer.state.fp32_param.{key}", key)
            state[f"master.{key}"] = next(tensors[name] for name in names if name in tensors)
        for index, group in enumerate(stored_groups(common)):
            state[f"step {index}"] = torch.tensor(int(group["step"]))
        found[name] = state
    return found


_is_initialized = False


def _initialize_parallel(arguments: Arguments, num_layers: int) -> None:
    """Once a process: every group of Gloo costs a thread for good, and all runs of a process share their layout."""
    global _is_initialized
    if not _is_initialized:
        build.initialize_model_parallel(arguments.parallel, arguments.training.seed, num_layers)
        initialize_rerun_state_machine(mode=RerunMode.DISABLED)
        _is_initialized = True
    assert parallel_state.get_tensor_model_parallel_world_size() == arguments.parallel.tensor_model_parallel_size
