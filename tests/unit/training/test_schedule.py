"""Lengths of the schedule in samples, from steps or from samples."""

from __future__ import annotations

import pytest

from megatron_midus.config.optimizer import OptimizationConfig
from megatron_midus.config.training import TrainingConfig
from megatron_midus.training.schedule import ScheduleLengths, schedule_lengths


def lengths(optimizer: dict, training: dict) -> ScheduleLengths:
    return schedule_lengths(OptimizationConfig(lr=1.0, **optimizer), TrainingConfig(**training), global_batch_size=8)


@pytest.mark.parametrize(
    ("optimizer", "training", "expected"),
    [
        ({"lr_warmup_iters": 2}, {"train_iters": 10}, ScheduleLengths(16, 80, None, 80)),
        ({"lr_warmup_fraction": 0.25, "lr_decay_iters": 8}, {"train_iters": 10}, ScheduleLengths(16, 64, None, 80)),
        ({"lr_warmup_samples": 5}, {"train_samples": 100}, ScheduleLengths(5, 100, None, 100)),
        (
            {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 3, "lr_warmup_iters": 1},
            {"train_iters": 10},
            ScheduleLengths(8, 80, 24, 80),
        ),
    ],
)
def test_lengths(optimizer, training, expected):
    assert lengths(optimizer, training) == expected


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="lr_warmup_iters=10 is not shorter than the decay of 10 iters"):
        lengths({"lr_warmup_iters": 10}, {"train_iters": 10})
    with pytest.raises(ValueError, match="lr_wsd_decay_iters=10 does not fit"):
        lengths({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 10, "lr_warmup_iters": 1}, {"train_iters": 10})
