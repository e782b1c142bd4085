"""Sizes in words, and ranks that hold the same in one line."""

from __future__ import annotations

import pytest

from megatron_midus.training.dry_run import RankUse, describe_ranks, size


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (12_345, "12.3 kB"),
        (123_456_789, "123 MB"),
        (4 * 10**11, "400 GB"),
    ],
)
def test_size(num_bytes, text):
    assert size(num_bytes) == text


def test_neighbours_that_hold_the_same_share_a_line():
    small = RankUse(parameters=10, trainable=2, weights=40, gradients=8, optimizer=16, peak=1000)
    large = RankUse(parameters=20, trainable=2, weights=80, gradients=8, optimizer=16, peak=1000, average=8, start=4)
    other_peak = RankUse(**{**vars(small), "peak": 3000})
    lines = describe_ranks([small, other_peak, large, small])
    assert [line.split(":")[0] for line in lines] == ["ranks 0-1, each", "rank 2", "rank 3"]
    assert "10 parameters, 2 trainable; weights 40 B, gradients 8 B, optimizer 16 B, together 64 B" in lines[0]
    assert "optimizer 16 B, average of weights 8 B, weights of the start 4 B, together 116 B" in lines[1]
    assert "peak of a pass 3.00 kB" in lines[0] and "peak of a pass 1.00 kB" in lines[2]
