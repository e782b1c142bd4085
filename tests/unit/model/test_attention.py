"""The SDPA core attention against Megatron's own, and where Megatron's own cannot follow, against itself."""

from __future__ import annotations

import model_processes
import pytest
import torch
from launcher import launch


@pytest.mark.parametrize(
    ("positions", "groups", "window", "masked"),
    [
        (9, 4, None, False),
        (9, 2, None, False),
        (7, 1, 3, False),
        (9, 2, None, True),
        (1, 2, None, False),
        (5, 2, 9, False),
    ],
)
def test_equals_megatrons(positions: int, groups: int, window: int | None, masked: bool) -> None:
    (pairs,) = launch(model_processes.against_megatron, 1, positions, groups, window, masked)
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape
        # fp32, sums of at most 10 terms of order one in another order.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_packed_sequences_do_not_see_each_other(window: int | None) -> None:
    ((packed, alone),) = launch(model_processes.packed_against_separate, 1, window)
    assert packed.shape == (13, 40)
    torch.testing.assert_close(packed, alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("window", [None, 3])
def test_queries_after_a_cache_are_the_last_positions(window: int | None) -> None:
    ((cached, whole),) = launch(model_processes.cached_against_whole, 1, window)
    torch.testing.assert_close(cached, whole, rtol=1e-5, atol=1e-6)


def test_dropout_acts_in_training_alone() -> None:
    assert launch(model_processes.dropout_is_only_for_training, 1) == [(True, False)]


@pytest.mark.parametrize(("window", "new", "masked"), [(None, 9, False), (4, 9, False), (None, 3, False), (4, 9, True), (3, 1, False)])  # fmt: skip
def test_capped_scores(window: int | None, new: int, masked: bool) -> None:
    (pairs,) = launch(model_processes.capped_attention, 1, window, new, masked)
    for ours, reference in pairs:
        # The softmax is of fp32: 2**-24 of weights of at most one, in sums of nine terms of order one.
        torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-6)


def test_transformer_engine_caps_no_scores() -> None:
    ((chosen, refusal),) = launch(model_processes.backends_of_a_capped_model, 1)
    assert chosen == "SdpaSpecProvider"
    assert refusal.startswith("attention_softcap=50.0 of this model is not in Transformer Engine's attention; choose")
