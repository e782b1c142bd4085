"""How long warm-up, decay and the whole run are, in samples, and which flags changed a schedule. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_midus.config.optimizer import OptimizationConfig
from megatron_midus.config.training import TrainingConfig
from megatron_midus.errors import UserError


@dataclasses.dataclass(frozen=True)
class ScheduleLengths:
    """Lengths of the schedule, in samples."""

    warmup: int
    decay: int
    wsd_decay: int | None
    total: int


def schedule_lengths(settings: OptimizationConfig, training: TrainingConfig, global_batch_size: int) -> ScheduleLengths:
    """Turns counts of steps into counts of samples; ``training`` has a length, an epoch among its samples.

    Raises:
        ValueError: a warm-up that is not shorter than the decay.
    """
    unit = 1 if training.total_samples is not None else global_batch_size
    if training.total_samples is not None:
        total = training.total_samples
        decay = settings.lr_decay_samples or total
        warmup, wsd_decay = settings.lr_warmup_samples, settings.lr_wsd_decay_samples
    else:
        assert training.train_iters is not None
        total = training.train_iters
        decay = settings.lr_decay_iters or total
        warmup, wsd_decay = settings.lr_warmup_iters, settings.lr_wsd_decay_iters
    name = "samples" if training.total_samples is not None else "iters"
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


# Flags that make what Megatron-Core's schedule keeps.
_LENGTH = ("--train-iters", "--train-samples", "--train-epochs", "--global-batch-size")
_FLAGS = {
    "max_lr": ("--lr",),
    "min_lr": ("--min-lr",),
    "init_lr": ("--lr-warmup-init",),
    "lr_warmup_steps": ("--lr-warmup-iters", "--lr-warmup-samples", "--lr-warmup-fraction", *_LENGTH),
    "lr_decay_steps": ("--lr-decay-iters", "--lr-decay-samples", *_LENGTH),
    "lr_decay_style": ("--lr-decay-style",),
    "wsd_decay_steps": ("--lr-wsd-decay-iters", "--lr-wsd-decay-samples", "--global-batch-size"),
    "lr_wsd_decay_style": ("--lr-wsd-decay-style",),
    "start_wd": ("--weight-decay", "--start-weight-decay"),
    "end_wd": ("--weight-decay", "--end-weight-decay"),
    "wd_incr_style": ("--weight-decay-incr-style",),
    "wd_incr_steps": _LENGTH,
}


def schedule_flags(settings: OptimizationConfig, training: TrainingConfig, global_batch_size: int) -> dict[str, Any]:
    """``{flag: value}`` of all that makes a schedule, as a user types them; ``None`` = absent."""
    values = {**dataclasses.asdict(settings), **dataclasses.asdict(training)}
    # Steps become samples by it, so it counts where steps are counted, and there also when it was not typed.
    values["global_batch_size"] = global_batch_size if training.total_samples is None else None
    names = dict.fromkeys(flag for flags in _FLAGS.values() for flag in flags)
    return {flag: values[flag.removeprefix("--").replace("-", "_")] for flag in names}


def without_effect(mine: Mapping[str, Any], stored: Mapping[str, Any]) -> set[str]:
    """What two schedules may differ in without another learning rate or weight decay from ``stored["num_steps"]`` on.

    Args:
        mine, stored: states of Megatron-Core's schedules, lengths in samples.
    """
    free: set[str] = set()
    styles = {mine["lr_decay_style"], stored["lr_decay_style"]}
    if stored["num_steps"] >= max(mine["lr_warmup_steps"], stored["lr_warmup_steps"]):
        free.add("init_lr")
        if styles in ({"constant"}, {"WSD"}):
            free.add("lr_warmup_steps")
    if styles == {"constant"}:
        free |= {"lr_decay_steps", "min_lr"}
    if "WSD" not in styles:
        free |= {"wsd_decay_steps", "lr_wsd_decay_style"}
    if {mine["wd_incr_style"], stored["wd_incr_style"]} == {"constant"}:
        free.add("wd_incr_steps")
    return free


def describe_change(
    names: set[str], flags: Mapping[str, Any], stored_flags: Mapping[str, Any] | None
) -> tuple[str, str] | None:
    """Flags behind entries of a schedule that differ: as they were and as they are; ``None`` where nothing is known.

    Args:
        names: of the entries.
        flags, stored_flags: of ``schedule_flags``; checkpoints of earlier versions have none.
    """
    if stored_flags is None:
        return None
    suspects = dict.fromkeys(flag for name in _FLAGS if name in names for flag in _FLAGS[name])
    changed = [flag for flag in suspects if flags.get(flag) != stored_flags.get(flag)]
    if not changed:
        return None
    before, now = (
        " and ".join(f"{flag} {values[flag]}" if values.get(flag) is not None else f"no {flag}" for flag in changed)
        for values in (stored_flags, flags)
    )
    return before, now


def flags_of(names: set[str]) -> str:
    """The flags that may be behind entries of a schedule."""
    return ", ".join(dict.fromkeys(flag for name in _FLAGS if name in names for flag in _FLAGS[name]))
