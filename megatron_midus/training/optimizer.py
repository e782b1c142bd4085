"""Parameter groups, the Megatron optimizer and the schedule.

Every group must differ from every other in ``wd_mult``, ``lr_mult`` or ``is_decoupled_lr``: Megatron-Core tells the groups
of a checkpoint apart by these, and two that agree in all of them would reload as one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32, get_grad_norm_fp32
from megatron.core.optimizer.optimizer_config import ParamPredicate, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from megatron_midus.config.optimizer import OptimizationConfig
from megatron_midus.config.parallel import ParallelConfig
from megatron_midus.config.training import TrainingConfig
from megatron_midus.training.schedule import schedule_lengths


def is_memory_value(parameter: torch.Tensor) -> bool:
    """Whether ``parameter`` is a value bank of a Memory block."""
    return getattr(parameter, "is_memory_value", False)


def has_weight_decay(parameter: torch.Tensor, name: str) -> bool:
    """Whether the ordinary weight decay applies: to matrices, not to norms, biases and memory values."""
    # query_norm is a norm per head, [heads, channels], so its two axes do not make it a matrix.
    is_vector = parameter.dim() < 2 or name.endswith((".bias", ".query_norm"))
    return not is_vector and not is_memory_value(parameter)


def param_group_overrides(settings: OptimizationConfig) -> dict[ParamKey, dict[str, Any]]:
    """What sets parameters apart from the default group, as Megatron-Core's ``config_overrides``."""
    no_decay = ParamKey(
        with_name_predicate=ParamWithNamePredicate(
            "no_weight_decay", lambda p, name: not has_weight_decay(p, name) and not is_memory_value(p)
        )
    )
    values = ParamKey(predicate=ParamPredicate("memory_value", is_memory_value))
    # is_decoupled_lr is part of a group's identity in checkpoints, so values never merge with other undecayed groups.
    value_override: dict[str, Any] = {"is_memory_values": True, "is_decoupled_lr": True, "wd_mult": 0.0}
    if settings.value_weight_decay:
        value_override["wd_mult"] = settings.value_weight_decay / settings.weight_decay
    if settings.value_lr_mult != 1.0:
        assert settings.lr is not None
        value_override["lr_mult"] = settings.value_lr_mult
        value_override["max_lr"] = settings.lr * settings.value_lr_mult
        value_override["min_lr"] = settings.min_lr * settings.value_lr_mult
    return {no_decay: {"wd_mult": 0.0}, values: value_override}


def build_optimizer(
    model_chunks: Sequence[torch.nn.Module],
    settings: OptimizationConfig,
    training: TrainingConfig,
    parallel: ParallelConfig,
    *,
    timers: Any = None,
    log_num_zeros: bool = False,
) -> MegatronOptimizer:
    """The optimizer of the trainable parameters of ``model_chunks`` (already wrapped in DDP)."""
    half = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
    config = OptimizerConfig(
        optimizer=settings.optimizer,
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        bf16=training.bf16,
        fp16=training.fp16,
        params_dtype=half,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        sgd_momentum=settings.sgd_momentum,
        clip_grad=settings.clip_grad,
        loss_scale=settings.loss_scale,
        initial_loss_scale=settings.initial_loss_scale,
        min_loss_scale=settings.min_loss_scale,
        loss_scale_window=settings.loss_scale_window,
        hysteresis=settings.hysteresis,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
        log_num_zeros_in_grad=log_num_zeros,
        timers=timers,
    )
    return get_megatron_optimizer(config, list(model_chunks), config_overrides=param_group_overrides(settings))


def optimizer_step(optimizer: MegatronOptimizer, settings: OptimizationConfig) -> tuple[bool, float | None, int | None]:
    """One step; returns (whether it was made, gradient norm, zeros in the gradient).

    With ``value_clip_grad`` the values and the rest are clipped by norms of their own, and the norm returned is the
    rest's.
    """
    if not settings.value_clip_grad:
        return optimizer.step()
    assert isinstance(optimizer, ChainedOptimizer)
    if optimizer.prepare_grads():
        return False, None, None
    norms = []
    for part in optimizer.chained_optimizers:
        values, rest = _split_values(part)
        _clip(values, settings.value_clip_grad, _norm(part, values))
        norms.append(_norm(part, rest))
    norm = math.hypot(*norms)  # experts are a part of their own
    for part in optimizer.chained_optimizers:
        _clip(_split_values(part)[1], settings.clip_grad, norm)
    zeros = optimizer.count_zeros() if optimizer.config.log_num_zeros_in_grad else None
    return optimizer.step_with_ready_grads(), norm, zeros


def _split_values(part: MegatronOptimizer) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Parameters of an optimizer: the value group, and all others. Master copies carry no mark, so groups decide."""
    values, rest = [], []
    for group in part.param_groups:
        (values if group.get("is_memory_values") else rest).extend(group["params"])
    return values, rest


def _norm(part: MegatronOptimizer, parameters: list[torch.Tensor]) -> float:
    """Common norm of the gradients of ``parameters`` over all ranks. Collective, also without parameters."""
    tp_group = getattr(part, "tp_group", None)
    counted = [
        p.grad
        for p in parameters
        if p.grad is not None and param_is_not_shared(p) and param_is_not_tensor_parallel_duplicate(p, tp_group)
    ]
    return get_grad_norm_fp32(counted, grad_stats_parallel_group=part.get_grad_stats_parallel_group())


def _clip(parameters: list[torch.Tensor], limit: float, norm: float) -> None:
    """Clips the gradients of ``parameters``, whose common norm is known."""
    if parameters and limit > 0:
        clip_grad_by_total_norm_fp32(parameters, limit, norm)


def build_scheduler(
    optimizer: MegatronOptimizer, settings: OptimizationConfig, training: TrainingConfig, global_batch_size: int
) -> OptimizerParamScheduler:
    """The schedule of learning rate and weight decay, counted in samples."""
    lengths = schedule_lengths(settings, training, global_batch_size)
    increases = settings.weight_decay_incr_style != "constant"
    return OptimizerParamScheduler(
        optimizer,
        init_lr=settings.lr_warmup_init,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=lengths.warmup,
        lr_decay_steps=lengths.decay,
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.start_weight_decay if increases else settings.weight_decay,
        end_wd=settings.end_weight_decay if increases else settings.weight_decay,
        wd_incr_steps=lengths.total,
        wd_incr_style=settings.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=settings.use_checkpoint_opt_param_scheduler,
        override_opt_param_scheduler=settings.override_opt_param_scheduler,
        wsd_decay_steps=lengths.wsd_decay,
        lr_wsd_decay_style=settings.lr_wsd_decay_style,
    )


def learning_rates(optimizer: MegatronOptimizer) -> tuple[float | None, float | None]:
    """Learning rate of the default group and of the value group, where there is one."""
    default = next((g["lr"] for g in optimizer.param_groups if g.get("default_config")), None)
    values = next((g["lr"] for g in optimizer.param_groups if g.get("is_memory_values")), None)
    return default, values
