"""Curves: the clock counts steps alone, points lie where they were measured."""

import math

import pytest
from torch.utils.tensorboard import SummaryWriter

from megatron_midus.comparison.curves import Curves, Point, make_curves, read_scalars, thin

SCALARS = {
    "iteration-time": {2: 5.0, 4: 1.0, 6: 2.0},
    "lm loss": {2: 9.0, 4: 8.0, 6: 7.0},
    "lm loss validation": {0: 9.5, 3: 8.5, 6: 6.5},
    "peak-memory-bytes": {2: 10.0, 4: 30.0, 6: 20.0},
}


def test_points_and_figures():
    curves = make_curves(SCALARS, tokens_per_iteration=100)
    # 2 steps of 5 s, 2 of 1 s, 2 of 2 s; the third step lies between two times and counts with the last mean.
    assert curves.training == [Point(200, 10.0, 9.0), Point(400, 12.0, 8.0), Point(600, 16.0, 7.0)]
    assert curves.validation == [Point(0, 0.0, 9.5), Point(300, 12.0, 8.5), Point(600, 16.0, 6.5)]
    assert (curves.seconds_per_iteration, curves.peak_memory_bytes, curves.final_validation) == (1.5, 30, 6.5)


def test_loss_at_a_time():
    curves = make_curves(SCALARS, tokens_per_iteration=100)
    assert curves.validation_at(14.0) == pytest.approx(7.5)
    assert (curves.validation_at(0.0), curves.validation_at(16.0), curves.validation_at(16.1)) == (9.5, 6.5, None)


def test_what_is_missing():
    with pytest.raises(ValueError, match="the run wrote no iteration-time"):
        make_curves({}, tokens_per_iteration=1)
    bare = make_curves({"iteration-time": {1: 3.0}}, tokens_per_iteration=1)
    assert (bare.seconds_per_iteration, bare.peak_memory_bytes, bare.final_validation) == (3.0, None, math.inf)
    assert Curves([], [Point(1, 1.0, math.nan)], 1.0, None).final_validation == math.inf


def test_thin():
    points = [Point(i, float(i), float(i)) for i in range(1, 8)]
    assert thin(points, 7) == points
    thinned = thin(points, 3)
    assert [p.tokens for p in thinned] == [2, 5, 7] and [p.loss for p in thinned] == [1.5, 4.0, 6.5]


def test_a_resumed_run_overwrites(tmp_path):
    for start, loss in ((1, 5.0), (2, 4.0)):
        with SummaryWriter(str(tmp_path), filename_suffix=f".{start}") as writer:
            for step in (start, start + 1):
                writer.add_scalar("lm loss", loss, step)
    assert read_scalars(tmp_path) == {"lm loss": {1: 5.0, 2: 4.0, 3: 4.0}}
