"""The comparison of replicas sees one flipped bit of any copied weight, on every rank, and nothing where nothing is."""

from __future__ import annotations

import pytest
import scenarios
from launcher import launch
from scenarios import Layout

MEMORY = "decoder.layers.2.self_attention.linear_proj"
COPIED = [f"{MEMORY}.value_bank", "decoder.final_layernorm.weight", "decoder.layers.0.input_layernorm.weight"]
DIVIDED = ["embedding.word_embeddings.weight", f"{MEMORY}.row_keys", "decoder.layers.0.mlp.linear_fc1.weight"]


@pytest.mark.parametrize(
    ("layout", "copied", "divided"),
    [(Layout(dp=2), COPIED + DIVIDED, []), (Layout(tp=2), COPIED, DIVIDED), (Layout(tp=2, dp=2), COPIED + DIVIDED, [])],
    ids=["dp2", "tp2", "tp2 dp2"],
)
def test_a_flipped_bit_is_named(layout, copied, divided):
    """Under tensor parallelism alone, ranks hold different parts of most weights, and no copy to compare."""
    for whole, *said in launch(scenarios.damaged_replicas, layout.world_size, layout, copied + divided):
        assert whole is None
        for name, message in zip(copied, said):
            # With four ranks, rank 1 is a copy of 3 in one group and of 0 in another: the copies of the first count.
            assert message is not None and name in message, name
            assert message.startswith("after iteration 7 weights differ between replicas (")
        assert said[len(copied) :] == [None] * len(divided)
