"""OptimizationConfig: AdamW or SGD, the learning-rate schedule, and what the memory values get of their own."""

from __future__ import annotations

import dataclasses
from typing import Literal

from megatron_midus.errors import UserError


@dataclasses.dataclass(frozen=True)
class OptimizationConfig:
    """Optimizer and learning rate"""

    optimizer: Literal["adam", "sgd"] = "adam"
    """adam is AdamW (decoupled weight decay)."""

    lr: float | None = None
    """Largest learning rate. Must be given."""

    min_lr: float = 0.0
    """Smallest learning rate of the decay."""

    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "linear"
    """Shape of the decay from --lr to --min-lr after the warm-up; WSD stays at --lr and decays in a last phase of
    --lr-wsd-decay-iters alone."""

    lr_decay_iters: int | None = None
    """Steps after which the decay has ended; --train-iters when absent."""

    lr_decay_samples: int | None = None
    """Sequences after which the decay has ended; --train-samples when absent."""

    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """Shape of the last phase of WSD (warm-up, stable, decay)."""

    lr_wsd_decay_iters: int | None = None
    """Steps of the last phase of WSD."""

    lr_wsd_decay_samples: int | None = None
    """Sequences of the last phase of WSD."""

    lr_warmup_iters: int = 0
    """Steps of linear warm-up."""

    lr_warmup_samples: int = 0
    """Sequences of linear warm-up."""

    lr_warmup_fraction: float | None = None
    """Share of the decay length that is warm-up, 0 to 1; instead of a count."""

    lr_warmup_init: float = 0.0
    """Learning rate that the warm-up begins with."""

    override_opt_param_scheduler: bool = dataclasses.field(
        default=False, metadata={"aliases": ("--override-opt_param-scheduler",)}
    )
    """On resume take the schedule from these flags, not from the checkpoint."""

    use_checkpoint_opt_param_scheduler: bool = dataclasses.field(
        default=False, metadata={"aliases": ("--use-checkpoint-opt_param-scheduler",)}
    )
    """On resume take the schedule from the checkpoint, whatever these flags say."""

    value_lr_mult: float = 10.0
    """Multiplier on the learning rate for memory values (the value bank of Memory blocks). Values receive gradients
    for the slots that were read only, and this is the strongest setting of short runs."""

    value_weight_decay: float = 0.0
    """Weight decay of memory values. Adam's decay shrinks slots that no token visits."""

    value_clip_grad: float = 0.0
    """Clip the gradient of memory values by a norm of its own; 0 = together with the rest."""

    value_optimizer: Literal["sgd"] | None = None
    """sgd = memory values follow their gradient alone, without momentum and moments, at --lr times --value-lr-mult;
    absent = --optimizer, as the rest."""

    memory_update_slots: int = 0
    """Slots of each value bank that a step updates: those with the highest --memory-update-score among the slots that the
    global batch reads. All others keep values and optimizer state bit by bit. Needs the counts of midus background;
    0 = all slots."""

    memory_update_score: Literal["tfidf", "kl"] = "tfidf"
    """What ranks the slots under --memory-update-slots, from their reads in this batch and in the background: tfidf =
    reads * log((B + 1) / (b + 1)), b of B background batches read the slot; kl = p * log(p / q), p and q the slot's
    shares of all reads here and there."""

    weight_decay: float = 0.01
    """Decoupled weight decay of matrices. Norms, biases and memory values have none."""

    start_weight_decay: float | None = None
    """Weight decay at the first step under an increasing --weight-decay-incr-style."""

    end_weight_decay: float | None = None
    """Weight decay at the last step under an increasing --weight-decay-incr-style."""

    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"
    """How weight decay moves from start to end; constant = --weight-decay throughout."""

    adam_beta1: float = 0.9
    """Decay of Adam's mean of the gradient."""

    adam_beta2: float = 0.999
    """Decay of Adam's mean of the squared gradient."""

    adam_eps: float = 1e-8
    """Term in Adam's denominator."""

    sgd_momentum: float = 0.9
    """Momentum of SGD."""

    clip_grad: float = 1.0
    """Largest global L2 norm of the gradient; 0 = do not clip."""

    ema_decay: float | None = None
    """Keep a moving average of the weights that learn, for instance 0.999: after each step it keeps this share of itself and takes
    the rest from the weights; after step t the share is t / (t + 9) where that is less. It is evaluated beside the weights,
    lies in checkpoints (midus convert --weights ema) and takes 4 bytes a trained weight, which data-parallel ranks share under
    --use-distributed-optimizer; absent = none."""

    l2_to_start: float = 0.0
    """Decoupled decay towards the weights that the run began with, in place of 0 (L2-SP), to hold a model near its base: a step
    first takes away lr * this share of the distance, with lr of the weight's group. Takes memory as --ema-decay does."""

    loss_scale: float | None = None
    """Constant loss scale of fp16; dynamic when absent."""

    initial_loss_scale: float = 2.0**32
    """First value of the dynamic loss scale of fp16."""

    min_loss_scale: float = 1.0
    """Smallest value of the dynamic loss scale of fp16."""

    loss_scale_window: int = 1000
    """Steps without overflow after which the loss scale grows."""

    hysteresis: int = 2
    """Overflows after which the loss scale shrinks."""

    def __post_init__(self) -> None:
        if self.lr is not None and self.lr <= 0:
            raise UserError(f"lr={self.lr} must be above 0")
        if self.lr is not None and not 0 <= self.min_lr <= self.lr:
            raise UserError(f"min_lr={self.min_lr} must lie between 0 and lr={self.lr}")
        if self.lr is not None and not 0 <= self.lr_warmup_init <= self.lr:
            raise UserError(f"lr_warmup_init={self.lr_warmup_init} must lie between 0 and lr={self.lr}")
        if self.lr_warmup_fraction is not None and not 0 <= self.lr_warmup_fraction < 1:
            raise UserError(f"lr_warmup_fraction={self.lr_warmup_fraction} must be at least 0 and below 1")
        if self.lr_warmup_fraction is not None and (self.lr_warmup_iters or self.lr_warmup_samples):
            raise UserError("lr_warmup_fraction replaces --lr-warmup-iters and --lr-warmup-samples; give one")
        for name in (
            "weight_decay",
            "value_weight_decay",
            "clip_grad",
            "value_clip_grad",
            "l2_to_start",
            "lr_warmup_iters",
            "memory_update_slots",
        ):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} must not be negative")
        if self.value_lr_mult <= 0:
            raise UserError(f"value_lr_mult={self.value_lr_mult} must be above 0")
        if self.value_weight_decay and not self.weight_decay:
            raise UserError(
                f"value_weight_decay={self.value_weight_decay} is applied as a share of weight_decay=0; "
                "give --weight-decay as well"
            )
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 0 and below 1")
        check_ema_decay(self.ema_decay)
        if self.l2_to_start and self.memory_update_slots:
            raise UserError(
                f"l2_to_start={self.l2_to_start} moves every slot and memory_update_slots={self.memory_update_slots} leaves most of "
                "them as they are; give one"
            )
        if self.override_opt_param_scheduler and self.use_checkpoint_opt_param_scheduler:
            raise UserError(
                "--override-opt_param-scheduler and --use-checkpoint-opt_param-scheduler exclude each other; give one"
            )
        self._check_increment()

    def _check_increment(self) -> None:
        start, end = self.start_weight_decay, self.end_weight_decay
        if self.weight_decay_incr_style == "constant":
            if start is not None or end is not None:
                raise UserError(
                    f"start_weight_decay={start} and end_weight_decay={end} need "
                    "--weight-decay-incr-style linear or cosine"
                )
        elif start is None or end is None or not 0 <= start <= end:
            raise UserError(
                f"weight_decay_incr_style={self.weight_decay_incr_style} needs "
                f"0 <= --start-weight-decay (here {start}) <= --end-weight-decay (here {end})"
            )


def check_ema_decay(decay: float | None) -> None:
    """Raises ``UserError`` for what is no share of an average; ``None`` passes."""
    if decay is not None and not 0 < decay < 1:
        raise UserError(f"ema_decay={decay} must be above 0 and below 1")
