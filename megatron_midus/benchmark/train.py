"""Sub-command train: whole training iterations of the real model, with Memory blocks (watched or not), with copied blocks, and without."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
from megatron.core.rerun_state_machine import RerunDataIterator, RerunMode, initialize_rerun_state_machine

from megatron_midus.benchmark.ceilings import measure_ceilings
from megatron_midus.benchmark.models import (
    check_memory,
    fill_values,
    make_model_config,
    make_shape_plan,
    start_process,
)
from megatron_midus.benchmark.peak import in_own_process, peak_above_start
from megatron_midus.benchmark.result import BenchmarkResult, Section, make_rows
from megatron_midus.benchmark.settings import TrainSettings
from megatron_midus.benchmark.shapes import Shape, find_shapes
from megatron_midus.benchmark.timing import interleave
from megatron_midus.benchmark.work import Work
from megatron_midus.report.machine import machine_facts
from megatron_midus.training import build
from megatron_midus.training.architecture import Architecture, Source
from megatron_midus.training.arguments import Arguments, parse_arguments
from megatron_midus.training.memory.figures import BlockFigures
from megatron_midus.training.memory.telemetry import MemoryReport, MemoryTelemetry
from megatron_midus.training.optimizer import build_optimizer, build_scheduler
from megatron_midus.training.step import BatchShape, Learner, make_forward_step, train_step
from megatron_midus.upscaling.cost import flops_per_token, trainable_parameters

BASELINES = {
    "watched": ["memory"],
    "token": ["copied", "memory", "floor"],
    "memory": ["copied", "base", "floor"],
    "copied": ["base", "floor"],
}
PEAK_ITERATIONS = 2  # the first one makes the optimizer's state


def make_arguments(shape: Shape, settings: TrainSettings, device: str) -> Arguments:
    """What pretrain_midus.py would be told."""
    flags = {
        "--distributed-backend": "nccl" if device == "cuda" else "gloo",
        "--train-iters": settings.warmup + settings.rounds + PEAK_ITERATIONS,
        "--lr": 1e-4,
        "--seq-length": shape.seq_length,
        "--micro-batch-size": settings.batch,
        "--global-batch-size": settings.batch,
        "--memory-backend": settings.backend,
        "--transformer-impl": settings.transformer_impl,
        "--seed": settings.seed,
    }
    switches = ["--mock-data"] + ["--bf16"] * (shape.dtype == "bfloat16")
    return parse_arguments([*switches, *(str(part) for flag in flags.items() for part in flag)])


class Trainee:
    """A model in training: DDP, optimizer, schedule, and random tokens."""

    def __init__(self, shape: Shape, variant: str, settings: TrainSettings, device: str) -> None:
        self.arguments = make_arguments(shape, settings, device)
        plan = make_shape_plan(shape, variant, num_layers=shape.num_layers, num_blocks=shape.num_blocks)
        train = "all" if variant == "base" else "inserted"
        self.architecture = Architecture(make_model_config(shape, plan.num_layers), plan, train, None)
        config = build.transformer_config(self.arguments, self.architecture)
        chunks = build.build_model_chunks(self.arguments, self.architecture, config, Source(None))
        fill_values(chunks[0])
        self.chunks = build.wrap_model_chunks(chunks, self.arguments, config)
        self.optimizer = build_optimizer(
            self.chunks, self.arguments.optimizer, self.arguments.training, self.arguments.parallel
        )
        self.scheduler = build_scheduler(
            self.optimizer, self.arguments.optimizer, self.arguments.training, settings.batch
        )
        build.connect(config, self.chunks, self.optimizer, self.arguments.parallel)
        self.batch_shape = BatchShape(settings.batch, shape.seq_length, reset_attention_mask=False, eod=None)
        self.iterator = RerunDataIterator(random_batches(self.batch_shape, shape.vocab_size, settings.seed))
        self.iteration = 0
        self.telemetry = self._watch() if variant == "watched" else None

    def _watch(self) -> MemoryTelemetry:
        """Counts and reports in every iteration."""
        return MemoryTelemetry(
            dataclasses.replace(self.arguments.memory_telemetry, memory_log_interval=1),
            model_chunks=self.chunks,
            optimizer=self.optimizer,
            report=_Unwritten(),
            seed=self.arguments.training.seed,
        )

    def iterate(self) -> None:
        """One iteration: forward, backward, reduction, clipping, optimizer; of a watched one, a report."""
        self.iteration += 1
        if self.telemetry is not None:
            self.telemetry.before_step(self.iteration)
        self._step()
        if self.telemetry is not None:
            self.telemetry.after_step(self.iteration)

    def _step(self) -> None:
        result = train_step(
            make_forward_step(self.batch_shape, check_loss=True),
            self.iterator,
            Learner(self.chunks, self.optimizer, self.scheduler),
            self.batch_shape,
            self.arguments.optimizer,
            samples=self.batch_shape.micro_batch_size,
            check_loss=True,
        )
        assert result.loss is not None and not result.skipped, "an iteration that did nothing was timed"


class Floor:
    """The base's forward pass, and the backward pass through it down to where the first block would be inserted.

    What no iteration with a frozen base and blocks at these places can do without.
    """

    def __init__(self, shape: Shape, settings: TrainSettings, device: str) -> None:
        arguments = make_arguments(shape, settings, device)
        plan = make_shape_plan(shape, "base", num_layers=shape.num_layers, num_blocks=shape.num_blocks)
        self.architecture = Architecture(make_model_config(shape, plan.num_layers), plan, "all", None)
        config = build.transformer_config(arguments, self.architecture)
        self.chunks = build.build_model_chunks(arguments, self.architecture, config, Source(None))
        inserted = make_shape_plan(shape, "memory", num_layers=shape.num_layers, num_blocks=shape.num_blocks)
        self.chunks[0].requires_grad_(False)
        before = self.chunks[0].decoder.layers[inserted.inserted_indices[0] - 1]
        before.register_forward_hook(lambda layer, inputs, output: (output[0].detach().requires_grad_(), *output[1:]))
        batch_shape = BatchShape(settings.batch, shape.seq_length, reset_attention_mask=False, eod=None)
        self.iterator = RerunDataIterator(random_batches(batch_shape, shape.vocab_size, settings.seed))
        self.forward_step = make_forward_step(batch_shape, check_loss=False)

    def iterate(self) -> None:
        """One forward and one backward pass."""
        output, loss = self.forward_step(self.iterator, self.chunks[0])
        loss(output)[0].backward()


class _Unwritten(MemoryReport):
    """Figures that go nowhere."""

    def __init__(self) -> None:
        pass

    def write(self, iteration: int, blocks: list[BlockFigures], update_ratios: dict[str, float]) -> None:
        assert blocks, "a model without Memory blocks was watched"


def random_batches(shape: BatchShape, vocab_size: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Micro-batches without end."""
    generator = torch.Generator().manual_seed(seed)
    size = (shape.micro_batch_size, shape.seq_length)
    while True:
        tokens = torch.randint(vocab_size, (size[0], size[1] + 1), generator=generator)
        yield {
            "tokens": tokens[:, :-1],
            "labels": tokens[:, 1:],
            "loss_mask": torch.ones(size),
            "position_ids": torch.arange(size[1]).expand(size),
        }


def run_train(settings: TrainSettings) -> BenchmarkResult:
    """Measures every shape; raises ``ParityError`` before anything is timed when the look-up is wrong."""
    device = settings.resolved_device()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    shapes = find_shapes(settings.shape, dtype=settings.dtype)
    checks = {shape: check_memory(shape, settings, device) for shape in shapes}
    start(device, settings)
    sections = [dataclasses.replace(measure_training(s, settings, device), checks=checks[s]) for s in shapes]
    return BenchmarkResult("train", dataclasses.asdict(settings), device, machine_facts(), sections)


def start(device: str, settings: TrainSettings) -> None:
    """What Megatron-Core has once in a process."""
    start_process(device, settings.seed)
    initialize_rerun_state_machine(mode=RerunMode.DISABLED)
    init_num_microbatches_calculator(0, None, settings.batch, settings.batch, 1, False)


def make_trainee(shape: Shape, variant: str, settings: TrainSettings, device: str) -> Trainee | Floor:
    return Floor(shape, settings, device) if variant == "floor" else Trainee(shape, variant, settings, device)


def measure_training(shape: Shape, settings: TrainSettings, device: str) -> Section:
    """Iterations of every variant at a shape."""
    peaks = {}
    if settings.measure_memory:
        peaks = {
            variant: in_own_process(peak_of, shape, variant, settings, device, threads=settings.threads)
            for variant in settings.variants
        }
    ceilings = measure_ceilings(device, shape.torch_dtype)
    trainees = {variant: make_trainee(shape, variant, settings, device) for variant in settings.variants}
    phases: dict[str, list[Callable[[], None]]] = {name: [each.iterate] for name, each in trainees.items()}
    times = interleave(
        phases,
        refresh=lambda: None,  # every iteration takes a new batch by itself
        rounds=settings.rounds,
        warmup=settings.warmup,
        device=device,
        hide_launches=False,
    )
    ceilings = ceilings.best(measure_ceilings(device, shape.torch_dtype))
    tokens = shape.seq_length * settings.batch
    work = {name: [_work(each, tokens, shape)] for name, each in trainees.items() if isinstance(each, Trainee)}
    baselines = {name: [b for b in BASELINES.get(name, []) if b in trainees] for name in trainees}
    rows = make_rows(times, ["iteration"], baselines, work=work, ceilings=ceilings, peaks=peaks)
    description = (
        f"{shape.num_layers}+{shape.num_blocks} layers, s={shape.seq_length} b={settings.batch} "
        f"vocabulary {shape.vocab_size} {shape.describe().partition(' ')[2]}"
    )
    return Section(
        f"train {shape.name}",
        description,
        dataclasses.asdict(shape),
        rows,
        ["copied", "base", "memory", "floor"],
        ceilings,
    )


def _work(trainee: Trainee, tokens: int, shape: Shape) -> Work:
    """FLOPs of an iteration, recomputation none; bytes of reading weights and of the optimizer's reads and writes."""
    architecture = trainee.architecture
    flops = tokens * flops_per_token(architecture.model, architecture.plan, shape.seq_length, train=architecture.train)
    weights = sum(p.nbytes for chunk in trainee.chunks for p in chunk.parameters())
    trained = trainable_parameters(architecture.model, architecture.plan, architecture.train)
    adam = 4 * 7 * trained  # gradient read, two moments and the weight read and written, in fp32
    return Work(flops, 2 * weights + adam)


def peak_of(shape: Shape, variant: str, settings: TrainSettings, device: str) -> int | None:
    """Bytes of peak memory of a training run: weights, gradients, optimizer, activations."""
    start(device, settings)

    def train() -> Trainee | Floor:
        trainee = make_trainee(shape, variant, settings, device)
        for _ in range(PEAK_ITERATIONS):
            trainee.iterate()
        return trainee

    return peak_above_start(train, device)
