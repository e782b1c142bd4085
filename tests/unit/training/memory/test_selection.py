"""Scores of slots and the highest of them, against loops over plain numbers."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_midus.checkpoint.background import SlotBackground
from megatron_midus.training.memory.selection import highest_slots, slot_scores

BANKS, SLOTS, NUM_BATCHES = 3, 101, 6


def counts(seed: int, high: int) -> torch.Tensor:
    # Few different numbers: ties everywhere, zeros among them.
    return torch.randint(0, high, (BANKS, SLOTS), generator=torch.Generator().manual_seed(seed))


READS = counts(1, 4)
BACKGROUND = SlotBackground(batches=counts(2, NUM_BATCHES + 1).int(), reads=counts(3, 5))


def score(kind: str, bank: int, slot: int) -> float:
    reads = READS[bank].tolist()
    if kind == "tfidf":
        return reads[slot] * math.log((NUM_BATCHES + 1) / (int(BACKGROUND.batches[bank, slot]) + 1))
    p = reads[slot] / sum(reads)
    q = (int(BACKGROUND.reads[bank, slot]) + 1) / (int(BACKGROUND.reads[bank].sum()) + SLOTS)
    return p * math.log(p / q) if p else 0.0


@pytest.mark.parametrize("kind", ["tfidf", "kl"])
def test_scores(kind: str) -> None:
    found = slot_scores(kind, READS, BACKGROUND, NUM_BATCHES)
    assert found.dtype == torch.float64
    for bank in range(BANKS):
        for slot in range(SLOTS):
            assert float(found[bank, slot]) == pytest.approx(score(kind, bank, slot), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("count", [1, 10, 60, SLOTS, 10 * SLOTS])
def test_highest_slots(count: int) -> None:
    """Those that were read alone; of equal scores the first slots."""
    scores = counts(4, 3).double() - 1
    found = highest_slots(scores, READS, count)
    for bank in range(BANKS):
        read = [slot for slot in range(SLOTS) if READS[bank, slot]]
        expected = sorted(read, key=lambda slot, bank=bank: (-float(scores[bank, slot]), slot))[:count]
        assert found[bank].nonzero().flatten().tolist() == sorted(expected)


def test_nothing_was_read() -> None:
    nothing = torch.zeros(SLOTS, dtype=torch.int64)
    background = SlotBackground(BACKGROUND.batches[0], BACKGROUND.reads[0])
    for kind in ("tfidf", "kl"):
        scores = slot_scores(kind, nothing, background, NUM_BATCHES)
        assert torch.equal(scores, torch.zeros(SLOTS, dtype=torch.float64))
        assert not highest_slots(scores, nothing, 5).any()
