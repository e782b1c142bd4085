"""Packing: every conversation once an epoch, no sequence too full, another order in each epoch, the same for the same seed."""

from __future__ import annotations

import numpy
import pytest

from megatron_midus.data.packing import Packing, best_fit

LENGTHS = numpy.random.RandomState(5).randint(1, 63, 300)


def epoch(packing: Packing, number: int) -> list[list[int]]:
    start = number * packing.per_epoch
    return [packing[index].tolist() for index in range(start, start + packing.per_epoch)]


def test_every_conversation_once_an_epoch():
    packing = Packing(LENGTHS, 63, seed=3)
    for number in (0, 1, 7):
        sequences = epoch(packing, number)
        assert sorted(sum(sequences, [])) == list(range(300))
        assert all(1 <= LENGTHS[sequence].sum() <= 63 for sequence in sequences)
    # As few as there can be, or one more: no more than that is lost here.
    least = -(-LENGTHS.sum() // 63)
    assert least <= packing.per_epoch <= least + 1
    assert packing.fill == pytest.approx(LENGTHS.sum() / (63 * packing.per_epoch))


def test_the_order_is_of_seed_and_epoch():
    one, same, other = (Packing(LENGTHS, 63, seed=seed) for seed in (3, 3, 4))
    second = epoch(same, 1)  # without the first before it
    assert epoch(one, 0) == epoch(same, 0) and epoch(one, 1) == second
    assert epoch(one, 0) != second and epoch(one, 0) != epoch(other, 0)
    # Not the order alone: conversations of one length meet others.
    assert {frozenset(s) for s in epoch(one, 0)} != {frozenset(s) for s in second}


def test_best_fit_against_a_loop():
    lengths = numpy.sort(numpy.random.RandomState(1).randint(1, 40, 200))[::-1]
    free: list[int] = []
    for length in lengths.tolist():
        fitting = [room for room in free if room >= length]
        if fitting:
            free[free.index(min(fitting))] -= length
        else:
            free.append(40 - length)
    bins = best_fit(lengths, 40)
    assert sorted(40 - lengths[bins == b].sum() for b in range(bins.max() + 1)) == sorted(free)
