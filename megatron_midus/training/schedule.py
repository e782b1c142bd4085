"""How long warm-up, decay and the whole run are, in samples. Imports no torch."""

from __future__ import annotations

import dataclasses

from megatron_midus.config.optimizer import OptimizerSettings
from megatron_midus.config.training import TrainingConfig
from megatron_midus.errors import UserError


@dataclasses.dataclass(frozen=True)
class ScheduleLengths:
    """Lengths of the schedule, in samples."""

    warmup: int
    decay: int
    wsd_decay: int | None
    total: int


def schedule_lengths(settings: OptimizerSettings, training: TrainingConfig, global_batch_size: int) -> ScheduleLengths:
    """Turns counts of steps into counts of samples.

    Raises:
        ValueError: a warm-up that is not shorter than the decay.
    """
    unit = 1 if training.train_samples is not None else global_batch_size
    if training.train_samples is not None:
        total = training.train_samples
        decay = settings.lr_decay_samples or total
        warmup, wsd_decay = settings.lr_warmup_samples, settings.lr_wsd_decay_samples
    else:
        assert training.train_iters is not None
        total = training.train_iters
        decay = settings.lr_decay_iters or total
        warmup, wsd_decay = settings.lr_warmup_iters, settings.lr_wsd_decay_iters
    name = "samples" if training.train_samples is not None else "iters"
    if settings.lr_warmup_fraction is not None:
        warmup = int(settings.lr_warmup_fraction * decay)
    if warmup >= decay:
        raise UserError(
            f"lr_warmup_{name}={warmup} is not shorter than the decay of {decay} {name}; shorten the warm-up or "
            f"raise --lr-decay-{name}"
        )
    if settings.lr_decay_style != "WSD":
        wsd_decay = None
    elif wsd_decay is not None and not 0 < wsd_decay <= decay - warmup:
        raise UserError(f"lr_wsd_decay_{name}={wsd_decay} does not fit between warm-up {warmup} and end {decay}")
    return ScheduleLengths(warmup * unit, decay * unit, None if wsd_decay is None else wsd_decay * unit, total * unit)
