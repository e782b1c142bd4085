"""--dry-run: what a run costs at its layout, measured on the real parts of it, with nothing trained and nothing written."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import update_num_microbatches

from megatron_midus.training.loop import Trainer
from megatron_midus.training.step import Learner, forward_backward, mean_loss
from megatron_midus.training.telemetry import peak_memory_bytes

# fp32 state of one trained element: two moments, or one momentum.
_STATE_BYTES = {"adam": 8, "sgd": 4}


@dataclasses.dataclass(frozen=True)
class RankUse:
    """What one rank holds. Bytes, but for the counts of elements.

    Attributes:
        optimizer: fp32 master weights where the weights have 16 bits, and the state that the first step will make.
        peak: of the process (CPU) or the device (GPU) after one forward and backward pass, without that state.
        average: of weights, fp32.
    """

    parameters: int
    trainable: int
    weights: int
    gradients: int
    optimizer: int
    peak: int
    average: int = 0
    start: int = 0


def dry_run(trainer: Trainer) -> str:
    """One forward and backward pass; returns the report on rank 0 and ``""`` elsewhere. Collective."""
    update_num_microbatches(trainer.progress.consumed_train_samples, consistency_check=False)
    for chunk in trainer.learner.model_chunks:
        chunk.zero_grad_buffer()
    reports = forward_backward(
        trainer.forward_step, trainer.training_iterator(), trainer.learner.model_chunks, trainer.shape
    )
    loss = mean_loss(reports)
    use = rank_use(trainer.learner, trainer.arguments.optimizer.optimizer)
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, (use, loss))
    if torch.distributed.get_rank():
        return ""
    losses = [loss for _, loss in gathered if loss is not None]
    return "\n".join([*describe_cost(trainer), *describe_ranks([use for use, _ in gathered]), describe_end(losses)])


def rank_use(learner: Learner, kind: str) -> RankUse:
    """Counts what lies on this rank; weights that share memory count once."""
    chunks, optimizer = learner.model_chunks, learner.optimizer
    assert optimizer is not None
    parameters = {p.data_ptr() or id(p): p for chunk in chunks for p in chunk.parameters()}.values()
    buffers = [buffer for chunk in chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    updated = [p for group in optimizer.param_groups for p in group["params"]]
    is_16_bit = any(p.element_size() == 2 for p in parameters)
    elements = sum(p.numel() for p in updated)
    return RankUse(
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        weights=sum(p.numel() * p.element_size() for p in parameters),
        gradients=sum(buffer.grad_data.numel() * buffer.grad_data.element_size() for buffer in buffers),
        optimizer=elements * (_STATE_BYTES[kind] + (4 if is_16_bit else 0)),
        peak=peak_memory_bytes(),
        average=0 if learner.average is None else learner.average.num_bytes(),
        start=0 if learner.start_weights is None else learner.start_weights.num_bytes(),
    )


def describe_cost(trainer: Trainer) -> list[str]:
    """FLOPs and tokens of a step and of the rest of the run."""
    sizes, seq_length = trainer.sizes, trainer.arguments.data.seq_length
    tokens = sizes.global_batch_size * seq_length
    step = trainer.telemetry.flops_per_token * tokens
    steps = max(0, trainer.train_iters - trainer.progress.iteration)
    return [
        "dry run:",
        f"FLOPs: {trainer.telemetry.flops_per_token:.4g} a token, {step:.4g} a step of {tokens:,} tokens, "
        f"{step / sizes.world_size:.4g} a step on each of {sizes.world_size} devices",
        f"steps: {steps:,} to go of {trainer.train_iters:,}, {steps * tokens:,} tokens, {steps * step:.4g} FLOPs",
    ]


def describe_ranks(uses: Sequence[RankUse]) -> list[str]:
    """A line for each group of neighbouring ranks that hold the same; the largest peak of the group."""
    lines, first = [], 0
    for _, group in itertools.groupby(uses, key=lambda use: dataclasses.replace(use, peak=0)):
        members = list(group)
        use, last = members[0], first + len(members) - 1
        name = f"rank {first}" if last == first else f"ranks {first}-{last}, each"
        held = use.weights + use.gradients + use.optimizer + use.average + use.start
        average = f"average of weights {size(use.average)}, " if use.average else ""
        start = f"weights of the start {size(use.start)}, " if use.start else ""
        lines.append(
            f"{name}: {use.parameters:,} parameters, {use.trainable:,} trainable; weights {size(use.weights)}, "
            f"gradients {size(use.gradients)}, optimizer {size(use.optimizer)}, {average}{start}together {size(held)}; "
            f"peak of a pass {size(max(member.peak for member in members))}, the optimizer's state not included"
        )
        first = last + 1
    return lines


def describe_end(losses: Sequence[float]) -> str:
    """The last line; the loss shows that data and weights go together."""
    return f"loss of the first batch: {losses[0]:.4f} nats; nothing was trained and nothing written"


def size(num_bytes: int) -> str:
    """``12.3 MB``: three digits, powers of 1000."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.{2 if num_bytes < 10 * factor else 1 if num_bytes < 100 * factor else 0}f} {unit}"
    return f"{num_bytes} B"
