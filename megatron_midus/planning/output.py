"""Proposed layouts as a table for the terminal, and the flags that a run takes for one of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_midus.planning.search import Candidate
from megatron_midus.report.table import Cell, terminal_table
from megatron_midus.upscaling.pipeline_layout import format_layout

if TYPE_CHECKING:
    from rich.table import Table

GIB = 2**30
LAYOUT = ("TP", "PP", "DP", "micro", "recompute", "values")
HELD = ("weights", "grads", "optimizer")
COSTS = ("activ.", "total", "TP", "PP", "DP")
TIMES = ("s/step", "tokens/s/GPU", "of peak")


def layout_table(candidates: list[Candidate], *, has_experts: bool = False, has_copies: bool = False) -> Table:
    """A row per layout; those that do not fit stand back.

    Args:
        has_experts: whether to show the ranks that share experts, ``EP``, and their traffic.
        has_copies: whether to show the copies of weights.
    """
    expert = ("EP",) * has_experts
    header = (*LAYOUT, *expert, *HELD, *("copies",) * has_copies, *COSTS, *expert, *TIMES)
    return terminal_table(
        header,
        [_row(candidate, has_experts, has_copies) for candidate in candidates],
        text_columns=len(LAYOUT) + has_experts,
        title="layouts, fastest first; memory in GiB of the fullest GPU, traffic in GB that a GPU sends a step",
    )


def _row(c: Candidate, has_experts: bool, has_copies: bool) -> list[Cell]:
    memory, layout = c.memory, c.layout
    held = (memory.weights, memory.gradients, memory.optimizer, *(memory.copies,) * has_copies)
    sizes = (*held, memory.activations + memory.transient, memory.total)
    gigabytes = {axis: size / 1e9 for axis, size in c.sent_bytes.items()}
    gigabytes["data"] += gigabytes["expert data"]
    gigabytes["expert"] += gigabytes["expert channels"]
    shared = f"{layout.expert}{f' x {layout.expert_channels}' if layout.expert_channels > 1 else ''}"
    texts = [
        f"{layout.tensor}{'+SP' if layout.sequence_parallel else ''}", str(layout.pipeline), str(layout.data),
        str(c.workload.micro_batch_size), "full" if layout.recompute else "-", "latent" if layout.latent_values else "repl.",
        *([shared] * has_experts), *(f"{size / GIB:.1f}" for size in sizes),
        *(f"{gigabytes[axis]:.2f}" for axis in ("tensor", "pipeline", "data", *(["expert"] * has_experts))),
        f"{c.seconds:.2f}", f"{c.tokens_per_second:,.0f}", f"{c.flops_share:.0%}",
    ]  # fmt: skip
    return [Cell(text, is_faint=not c.fits) for text in texts]


def driver_flags(c: Candidate) -> list[str]:
    """What to give to midus pretrain for this layout."""
    layout = c.layout
    flags = [f"--micro-batch-size {c.workload.micro_batch_size}", f"--global-batch-size {c.workload.global_batch_size}"]
    if layout.tensor > 1:
        flags += [f"--tensor-model-parallel-size {layout.tensor}", "--sequence-parallel"]
    if layout.expert > 1:
        flags += [f"--expert-model-parallel-size {layout.expert}"]
        if layout.expert_channels != layout.tensor:
            flags += [f"--expert-tensor-parallel-size {layout.expert_channels}"]
        if layout.all_to_all:
            flags += ["--moe-token-dispatcher-type alltoall"]
    if layout.latent_values:
        flags += ["--memory-value-placement latent"]
    if layout.pipeline > 1:
        flags += [
            f"--pipeline-model-parallel-size {layout.pipeline}",
            f"--pipeline-model-parallel-layout '{format_layout([len(blocks) for blocks in layout.stages])}'",
        ]
    if layout.distributed_optimizer:
        flags += ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
    if layout.recompute:
        flags += ["--recompute-granularity full", "--recompute-method uniform", "--recompute-num-layers 1"]
    return flags
