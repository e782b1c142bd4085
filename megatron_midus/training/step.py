"""One step of training or evaluation: forward and backward over the micro-batches, then the optimizer.

Shapes: ``b`` samples of a micro-batch, ``s`` tokens of a sample (``s / cp`` under context parallel).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.rerun_state_machine import RerunDataIterator, RerunMode, get_rerun_state_machine
from megatron.core.utils import get_attr_wrapped_model

from megatron_midus import platform
from megatron_midus.config.optimizer import OptimizationConfig
from megatron_midus.data import get_batch
from megatron_midus.errors import UserError
from megatron_midus.training.kl_to_base import KlToBase
from megatron_midus.training.memory.value_updates import ValueUpdates
from megatron_midus.training.optimizer import optimizer_step
from megatron_midus.training.replicas import is_of_expert
from megatron_midus.training.start_weights import StartWeights
from megatron_midus.training.weight_average import WeightAverage

DataIterator = RerunDataIterator | list[RerunDataIterator | None] | None


class DivergedError(UserError):
    """A loss that is NaN or infinite, where no step can be computed again."""


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """What is alike in all micro-batches of a run."""

    micro_batch_size: int
    seq_length: int
    reset_attention_mask: bool
    eod: int | None
    documents_by_position: bool = False


@dataclasses.dataclass(frozen=True)
class StepResult:
    """Outcome of a training step.

    Attributes:
        loss: mean over the tokens of the global batch, nats; ``None`` off the last pipeline stage.
        kl_to_base: as ``loss``, the divergence from the base; ``None`` without ``--kl-to-base``.
        exit_code: not ``None`` when the loss was refused: the run must end with it, without the optimizer's step.
        save_before_exit: whether a checkpoint of the state before this step is wanted then.
    """

    loss: float | None
    kl_to_base: float | None = None
    skipped: bool = False
    grad_norm: float | None = None
    num_zeros: int | None = None
    exit_code: int | None = None
    save_before_exit: bool = False


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Outcome of an evaluation.

    Attributes:
        loss: mean over the tokens of all batches, nats; ``None`` off the last pipeline stage, and where it was left early.
        num_batches: global batches that were evaluated.
    """

    loss: float | None
    num_batches: int


def make_forward_step(
    shape: BatchShape, *, check_loss: bool, kl_to_base: KlToBase | None = None
) -> Callable[..., tuple[torch.Tensor, Callable]]:
    """The function that Megatron-Core's schedules call for every micro-batch.

    Args:
        kl_to_base: a second term of the loss in training; evaluations are of the cross-entropy alone.
    """

    def forward_step(iterator: Iterator | None, model: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
        vp_stage = get_attr_wrapped_model(model, "vp_stage")
        is_last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        batch = get_batch(
            iterator,
            micro_batch_size=shape.micro_batch_size,
            seq_length=shape.seq_length,
            is_first_stage=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            is_last_stage=is_last,
            device=platform.device(),
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            cp_group=parallel_state.get_context_parallel_group(),
            reset_attention_mask=shape.reset_attention_mask,
            eod=shape.eod,
            documents_by_position=shape.documents_by_position,
        )
        inputs = batch["tokens"], batch["position_ids"], batch["attention_mask"]
        divergence = None
        if kl_to_base is not None and torch.is_grad_enabled():
            kl_to_base.run_base(*inputs)
        output = model(*inputs, labels=batch["labels"])
        if kl_to_base is not None and torch.is_grad_enabled():
            divergence = kl_to_base.coefficient, kl_to_base.take()
        return output, functools.partial(loss_function, batch["loss_mask"], check_loss, divergence)

    return forward_step


def loss_function(
    loss_mask: torch.Tensor | None,
    check_loss: bool,
    divergence: tuple[float, torch.Tensor] | None,
    losses: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the losses that count, their number, and what the log says of it.

    Args:
        loss_mask: ``[b, s]``, 0 where a prediction does not count.
        divergence: a second term of the loss: its weight, and ``[b, s]``, nats.
        losses: ``[b, s]``, nats.
    """
    assert loss_mask is not None
    cross_entropy = total = (losses.float() * loss_mask).sum()
    sums = {"lm loss": cross_entropy}
    if divergence is not None:
        coefficient, of_tokens = divergence
        sums["kl to base"] = (of_tokens.float() * loss_mask).sum()
        total = cross_entropy + coefficient * sums["kl to base"]
    if check_loss and torch.is_grad_enabled():
        validate = get_rerun_state_machine().validate_result
        for name, is_bad in (("nan", torch.isnan), ("infinite", torch.isinf)):
            validate(result=total, rejection_func=is_bad, message=f"{name} loss", tolerance=0.0, fatal=True)
    num_tokens = loss_mask.sum().to(torch.int)
    # Copies: the schedule divides the total in place by tokens and micro-batches.
    report = {name: torch.stack([value.detach(), num_tokens.to(value.dtype)]) for name, value in sums.items()}
    return total, num_tokens, report


@dataclasses.dataclass(frozen=True)
class Learner:
    """What learns on this rank, and what makes it learn.

    Attributes:
        model_chunks: wrapped; more than one under the interleaved schedule.
        optimizer, scheduler: of the trainable parameters; ``None`` to evaluate only.
        value_updates: how memory values are updated, if not as the rest.
        average: of the weights, if one is kept.
        start_weights: towards which the weights decay, if they do.
    """

    model_chunks: Sequence[torch.nn.Module]
    optimizer: MegatronOptimizer | None
    scheduler: OptimizerParamScheduler | None
    value_updates: ValueUpdates | None = None
    average: WeightAverage | None = None
    start_weights: StartWeights | None = None


def train_step(
    forward_step: Callable,
    iterator: DataIterator,
    learner: Learner,
    shape: BatchShape,
    settings: OptimizationConfig,
    *,
    samples: int,
    check_loss: bool,
    empty_cache_level: int = 0,
) -> StepResult:
    """One optimizer step on the next global batch of ``samples`` samples."""
    optimizer, scheduler, value_updates = learner.optimizer, learner.scheduler, learner.value_updates
    assert optimizer is not None and scheduler is not None
    rerun = get_rerun_state_machine()
    is_first = not rerun.first_iteration_complete
    reports: list[dict[str, torch.Tensor]] = []
    while rerun.should_run_forward_backward(iterator):
        for chunk in learner.model_chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        if value_updates is not None:
            value_updates.begin()
        reports = forward_backward(forward_step, iterator, learner.model_chunks, shape)
    save, leave, code = rerun.should_checkpoint_and_exit()
    if leave:
        return StepResult(loss=None, exit_code=code, save_before_exit=save)
    if empty_cache_level >= 1:
        torch.cuda.empty_cache()
    loss = mean_loss(reports)
    if check_loss and is_first and loss is not None and not math.isfinite(loss):
        # The rerun machine lets the first step pass, because it could not save a checkpoint yet.
        raise DivergedError(f"the loss of the first step is {loss}; check the checkpoint, the data and the precision")
    with contextlib.nullcontext() if value_updates is None else value_updates.applied():
        outcome = optimizer_step(optimizer, settings)
    updated, grad_norm, num_zeros = _reduce(*outcome)
    if updated:
        scheduler.step(increment=samples)
        if learner.average is not None:
            learner.average.update()
    if empty_cache_level >= 2:
        torch.cuda.empty_cache()
    divergence = mean_loss(reports, "kl to base") if reports and "kl to base" in reports[0] else None
    return StepResult(loss=loss, kl_to_base=divergence, skipped=not updated, grad_norm=grad_norm, num_zeros=num_zeros)


def forward_backward(
    forward_step: Callable, iterator: DataIterator, model_chunks: Sequence[torch.nn.Module], shape: BatchShape
) -> list[dict[str, torch.Tensor]]:
    """Forward and backward over the micro-batches of one step; the gradients stay in their buffers."""
    try:
        return run_schedule(forward_step, iterator, model_chunks, shape, get_num_microbatches(), False)
    except RuntimeError as error:
        # What the rerun machine says when it is disabled.
        if "Unexpected result" not in str(error):
            raise
        raise DivergedError(f"training diverged: {error}; lower --lr, or check the data and the precision") from None


def run_schedule(
    forward_step: Callable,
    iterator: DataIterator,
    model_chunks: Sequence[torch.nn.Module],
    shape: BatchShape,
    num_microbatches: int,
    forward_only: bool,
) -> list[dict[str, torch.Tensor]]:
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterator,
        model=list(model_chunks),
        num_microbatches=num_microbatches,
        seq_length=shape.seq_length,
        micro_batch_size=shape.micro_batch_size,
        forward_only=forward_only,
    )


def mean_loss(reports: list[dict[str, torch.Tensor]], name: str = "lm loss") -> float | None:
    """Loss per token, or another figure of the reports, over the micro-batches of all data-parallel ranks; ``None`` off the last pipeline stage."""
    if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        return None
    total = torch.stack([report[name] for report in reports]).double().sum(dim=0)
    torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    # No token that counts in the whole batch: the loss is 0, as the schedule's clamp makes the gradient.
    return float(total[0] / total[1].clamp(min=1))


def _reduce(updated: bool, grad_norm: float | None, num_zeros: int | None) -> tuple[bool, float | None, int | None]:
    """Makes all ranks of a replica agree: a stage without trainable parameters knows no norm."""
    known = torch.tensor(
        [float(updated), -1.0 if grad_norm is None else float(grad_norm), -1.0 if num_zeros is None else num_zeros],
        dtype=torch.float64,
        device="cuda",
    )
    group = parallel_state.get_model_parallel_group()
    if group.size() > 1:
        succeeded = known[:1].clone()
        torch.distributed.all_reduce(succeeded, op=torch.distributed.ReduceOp.MIN, group=group)
        torch.distributed.all_reduce(known, op=torch.distributed.ReduceOp.MAX, group=group)
        known[0] = succeeded[0]
    flag, norm, zeros = known.tolist()
    # Written so that a NaN norm is reported as one.
    return bool(flag), None if norm < 0 else norm, None if zeros < 0 else int(zeros)


@torch.no_grad()
def evaluate(
    forward_step: Callable,
    iterator: DataIterator,
    model_chunks: Sequence[torch.nn.Module],
    shape: BatchShape,
    *,
    num_batches: int,
    num_microbatches: int,
    must_leave: Callable[[], bool],
) -> Evaluation:
    """Mean loss per token over ``num_batches`` global batches.

    Args:
        must_leave: asked before every batch, on all ranks together; a loss over a part of the batches is of no use.
    """
    rerun = get_rerun_state_machine()
    mode = rerun.get_mode()
    rerun.set_mode(RerunMode.DISABLED)
    for chunk in model_chunks:
        chunk.eval()
    reports: list[dict[str, torch.Tensor]] = []
    done = 0
    while done < num_batches and not must_leave():
        reports += run_schedule(forward_step, iterator, model_chunks, shape, num_microbatches, True)
        done += 1
    for chunk in model_chunks:
        chunk.train()
    rerun.set_mode(mode)
    return Evaluation(mean_loss(reports) if done == num_batches else None, done)


def parameter_norm(model_chunks: Sequence[torch.nn.Module]) -> float:
    """L2 norm of all parameters, the ones that several ranks hold alike counted once. Collective."""
    from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
    from megatron.core.transformer.module import param_is_not_shared

    squares, of_experts = torch.zeros(2, 1, dtype=torch.float64, device="cuda")
    for chunk in model_chunks:
        for parameter in chunk.parameters():
            if is_of_expert(parameter):
                of_experts += parameter.detach().double().square().sum()
            elif param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter):
                squares += parameter.detach().double().square().sum()
    torch.distributed.all_reduce(squares, group=parallel_state.get_model_parallel_group())
    torch.distributed.all_reduce(of_experts, group=parallel_state.get_expert_tensor_model_pipeline_parallel_group())
    return float((squares + of_experts).sqrt())
