"""What midus background says of its counts."""

from pathlib import Path

import torch

from megatron_midus.checkpoint.background import BackgroundHeader, SlotBackground
from megatron_midus.training.background import _describe

HEADER = BackgroundHeader(num_batches=4, batch_size=2, seq_length=8, iteration=0)


def describe(batches):
    batches = torch.tensor(batches, dtype=torch.int32)
    return _describe(HEADER, {3: SlotBackground(batches, 5 * batches)}, Path("counts"))


def test_slots_that_every_batch_reads_have_no_score():
    """tf x log((B + 1) / (b + 1)) is 0 for b = B."""
    assert describe([4, 4, 4, 0]).startswith(
        "WARNING: 3 of 4 slots are read in every batch, and --memory-update-score tfidf updates none of these"
    )


def test_counts_that_tell_slots_apart():
    assert describe([4, 1, 3, 0]) == (
        "4 background batches of 2 samples, 64 tokens, read 3 of 4 slots; the counts are in counts"
    )
