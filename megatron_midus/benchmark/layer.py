"""Sub-command layer: Memory blocks, with and without attention, against a copied Transformer block, as Megatron layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

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
from megatron_midus.benchmark.settings import LayerSettings
from megatron_midus.benchmark.shapes import Shape, find_shapes
from megatron_midus.benchmark.timing import interleave
from megatron_midus.benchmark.work import Work
from megatron_midus.memory import MemoryRuntime
from megatron_midus.model.builder import build_model, make_transformer_config
from megatron_midus.report.machine import machine_facts
from megatron_midus.upscaling.cost import block_flops

VARIANTS = ("copied", "memory", "token")
BASELINES = {"memory": ["copied"], "token": ["copied", "memory"]}


class Block:
    """The inserted block of a model of two: ``[s, b, d]`` in, ``[s, b, d]`` out, with all of its gradients."""

    def __init__(self, shape: Shape, variant: str, settings: LayerSettings, device: str) -> None:
        plan = make_shape_plan(shape, variant, num_layers=1, num_blocks=1)
        model = make_model_config(shape, plan.num_layers)
        config = make_transformer_config(model, plan, bf16=shape.dtype == "bfloat16", deterministic=False)
        self.plan, self.model = plan, model
        gpt = build_model(
            config,
            model=model,
            plan=plan,
            sequence_length=shape.seq_length,
            memory_runtime=MemoryRuntime(seed=settings.seed, backend=settings.backend),
        ).to(device)
        fill_values(gpt)
        self.rotary = gpt.rotary_pos_emb(shape.seq_length).detach()
        self.layer = gpt.decoder.layers[1]
        self.output: torch.Tensor | None = None

    def phases(self, hidden: torch.Tensor, grad_out: torch.Tensor) -> list[Callable[[], None]]:
        """Forward, then backward."""
        wanted = [hidden, *self.layer.parameters()]

        def forward() -> None:
            self.output = self.layer(hidden, attention_mask=None, rotary_pos_emb=self.rotary)[0]

        def backward() -> None:
            output, self.output = self.output, None
            torch.autograd.grad(output, wanted, grad_out)

        return [forward, backward]


def run_layer(settings: LayerSettings) -> BenchmarkResult:
    """Measures every shape; raises ``ParityError`` before anything is timed when the look-up is wrong."""
    device = settings.resolved_device()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    shapes = find_shapes(settings.shape, dtype=settings.dtype)
    checks = {shape: check_memory(shape, settings, device) for shape in shapes}
    start_process(device, settings.seed)
    sections = [dataclasses.replace(_measure(s, settings, device), checks=checks[s]) for s in shapes]
    return BenchmarkResult("layer", dataclasses.asdict(settings), device, machine_facts(), sections)


def _measure(shape: Shape, settings: LayerSettings, device: str) -> Section:
    peaks = {}
    if settings.measure_memory:
        peaks = {v: in_own_process(peak_of, shape, v, settings, device, threads=settings.threads) for v in VARIANTS}
    ceilings = measure_ceilings(device, shape.torch_dtype)
    blocks = {variant: Block(shape, variant, settings, device) for variant in VARIANTS}
    hidden, grad_out = _activations(shape, settings, device)

    def refresh() -> None:
        with torch.no_grad():
            hidden.normal_()
            grad_out.normal_()

    times = interleave(
        {variant: block.phases(hidden, grad_out) for variant, block in blocks.items()},
        refresh=refresh,
        rounds=settings.rounds,
        warmup=settings.warmup,
        device=device,
    )
    ceilings = ceilings.best(measure_ceilings(device, shape.torch_dtype))
    tokens = shape.seq_length * settings.batch
    work = {}
    for variant, block in blocks.items():
        flops = block_flops(block.model, block.plan, 1, shape.seq_length)
        forward = tokens * (flops.weights + flops.activations)
        num_bytes = sum(p.nbytes for p in block.layer.parameters()) + 2 * hidden.nbytes
        work[variant] = [Work(forward, num_bytes), Work(2 * forward, 2 * num_bytes)]
    rows = make_rows(times, ["forward", "backward"], BASELINES, work=work, ceilings=ceilings, peaks=peaks)
    description = f"s={shape.seq_length} b={settings.batch} {shape.describe().partition(' ')[2]}"
    return Section(f"layer {shape.name}", description, dataclasses.asdict(shape), rows, ["copied", "memory"], ceilings)


def _activations(shape: Shape, settings: LayerSettings, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    size = (shape.seq_length, settings.batch, shape.hidden_size)
    hidden, grad_out = (torch.randn(size, device=device, dtype=shape.torch_dtype) for _ in range(2))
    return hidden.requires_grad_(), grad_out


def peak_of(shape: Shape, variant: str, settings: LayerSettings, device: str) -> int | None:
    """Bytes of peak memory of one block's forward and backward pass, gradients included, parameters not."""
    start_process(device, settings.seed)
    block = Block(shape, variant, settings, device)
    hidden, grad_out = _activations(shape, settings, device)
    short = hidden[:8].detach().requires_grad_(), grad_out[:8]
    whole, block.rotary = block.rotary, block.rotary[:8]
    for phase in block.phases(*short):  # threads, kernels and work spaces come with the first call
        phase()
    block.rotary = whole

    def both() -> tuple[torch.Tensor, ...]:
        output = block.layer(hidden, attention_mask=None, rotary_pos_emb=block.rotary)[0]
        return torch.autograd.grad(output, [hidden, *block.layer.parameters()], grad_out)

    return peak_above_start(both, device)
