"""Sub-command hml: one look-up of the head-wise memory, forward and backward, and in single decoding steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from megatron_midus.benchmark.ceilings import Ceilings, measure_ceilings
from megatron_midus.benchmark.contenders import Contender, Operands, find_contenders, make_operands
from megatron_midus.benchmark.parity import require_parity
from megatron_midus.benchmark.peak import in_own_process, peak_above_start
from megatron_midus.benchmark.result import BenchmarkResult, Section, make_rows
from megatron_midus.benchmark.settings import HmlSettings
from megatron_midus.benchmark.shapes import Shape, find_shapes
from megatron_midus.benchmark.timing import interleave
from megatron_midus.benchmark.work import work_of
from megatron_midus.report.machine import machine_facts

BASELINES = ["ffn", "copied", "naive", "product-key-memory", "memory-layer"]
WHOLE = ("ffn", "transformer")  # what a memory replaces, whatever it computes
POOL = 16  # batches that decoding steps take in turn, drawn beforehand: drawing one takes longer than a step


def run_hml(settings: HmlSettings) -> BenchmarkResult:
    """Measures every shape; raises ``ParityError`` before anything is timed when a contender is wrong."""
    device = settings.resolved_device()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    shapes = find_shapes(settings.shape, tokens=settings.tokens, dtype=settings.dtype)
    fields = {}
    for shape in shapes:
        contenders, notes = find_contenders(
            shape, backends=settings.backends, baselines=settings.baselines, device=device
        )
        fields[shape] = contenders, notes, require_parity(contenders, shape, device=device, seed=settings.seed)
    ceilings = {d: measure_ceilings(device, d) for d in sorted({s.torch_dtype for s in shapes}, key=str)}
    sections = []
    for shape, (contenders, notes, checks) in fields.items():
        section = _measure(shape, contenders, settings, device, ceilings[shape.torch_dtype])
        sections.append(dataclasses.replace(section, notes=notes, checks=checks))
        steps = [c for c in contenders if c.function != "transformer"]  # a block decodes with a cache, see layer
        sections += [_measure_decode(shape, steps, n, settings, device) for n in settings.decode_tokens if n]
    return BenchmarkResult("hml", dataclasses.asdict(settings), device, machine_facts(), sections)


def _measure(
    shape: Shape, contenders: list[Contender], settings: HmlSettings, device: str, ceilings: Ceilings
) -> Section:
    """Forward and backward with the gradients of all operands."""
    peaks = {}
    if settings.measure_memory:
        peaks = {
            c.name: in_own_process(peak_of, shape, c.name, device, settings.seed, threads=settings.threads)
            for c in contenders
        }
    operands = {
        function: make_operands(shape, function, tokens=shape.tokens, device=device, seed=settings.seed)
        for function in dict.fromkeys(c.function for c in contenders)
    }

    def refresh() -> None:
        for each in operands.values():
            each.refresh()

    times = interleave(
        {c.name: phases_of(c, operands[c.function]) for c in contenders},
        refresh=refresh,
        rounds=settings.rounds,
        warmup=settings.warmup,
        device=device,
    )
    ceilings = ceilings.best(measure_ceilings(device, shape.torch_dtype))
    work = {c.name: work_of(c.function, shape, shape.tokens) for c in contenders}
    rows = make_rows(times, ["forward", "backward"], comparisons(contenders), work=work, ceilings=ceilings, peaks=peaks)
    return Section(f"hml {shape.name}", shape.describe(), dataclasses.asdict(shape), rows, BASELINES, ceilings)


def comparisons(contenders: list[Contender]) -> dict[str, list[str]]:
    """By contender its baselines: the FFN, the copied block, and whoever else computes the same function as it does."""
    return {
        c.name: [
            other.name
            for other in contenders
            if other.name in BASELINES and other != c and other.function in (c.function, *WHOLE)
        ]
        for c in contenders
    }


def phases_of(contender: Contender, operands: Operands) -> list[Callable[[], None]]:
    """Forward, then backward of the same pass."""
    output: list[torch.Tensor] = []

    def forward() -> None:
        output.append(contender.run(operands.inputs))

    def backward() -> None:
        torch.autograd.grad(output.pop(), operands.inputs, operands.grad_out)

    return [forward, backward]


def peak_of(shape: Shape, name: str, device: str, seed: int) -> int | None:
    """Bytes of peak memory of one contender's forward and backward pass, gradients included."""
    contenders, _ = find_contenders(shape, backends=None, baselines=BASELINES, device=device)
    contender = next(c for c in contenders if c.name == name)
    small = make_operands(shape, contender.function, tokens=min(8, shape.tokens), device=device, seed=seed)
    for phase in phases_of(contender, small):  # threads, kernels and work spaces come with the first call
        phase()
    del small
    operands = make_operands(shape, contender.function, tokens=shape.tokens, device=device, seed=seed)

    def both() -> tuple[torch.Tensor, ...]:
        out = contender.run(operands.inputs)
        return torch.autograd.grad(out, operands.inputs, operands.grad_out)

    return peak_above_start(both, device)


def _measure_decode(
    shape: Shape, contenders: list[Contender], tokens: int, settings: HmlSettings, device: str
) -> Section:
    """Forward passes of a few tokens without gradients, launches and all."""
    operands = {
        function: make_operands(shape, function, tokens=tokens, device=device, seed=settings.seed)
        for function in dict.fromkeys(c.function for c in contenders)
    }
    pools = {name: [torch.randn_like(each.inputs[0]) for _ in range(POOL)] for name, each in operands.items()}
    step = 0

    def refresh() -> None:
        nonlocal step
        step += 1
        for name, each in operands.items():
            each.inputs[0] = pools[name][step % POOL]

    def forward(contender: Contender) -> Callable[[], None]:
        each = operands[contender.function]
        return lambda: [None, contender.run(each.inputs)][0]

    with torch.no_grad():
        times = interleave(
            {c.name: [forward(c)] for c in contenders},
            refresh=refresh,
            rounds=settings.decode_rounds,
            warmup=max(settings.warmup, 10),
            device=device,
            hide_launches=False,
        )
    rows = make_rows(times, ["forward"], comparisons(contenders))
    values = dataclasses.asdict(dataclasses.replace(shape, tokens=tokens))
    return Section(f"decode {shape.name} T={tokens}", f"forward only, {tokens} tokens", values, rows, BASELINES)
