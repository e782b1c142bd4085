"""--train inserted: what is not trained costs its forward pass, and its input's gradient above the first inserted block."""

from __future__ import annotations

import pytest
from frozen_base import cost_of_a_step
from launcher import launch
from scenarios import Setting


def cost(**changes):
    (found,) = launch(cost_of_a_step, 1, Setting(insert_after=(1, 2), steps=1, **changes))
    return found


@pytest.mark.parametrize("policy", ["interleave", "llama_pro"])
def test_a_frozen_base_costs_what_it_must_and_no_more(policy):
    """Four layers of a base, b; blocks m are inserted behind the second and the third: b b m b m b."""
    frozen, trained = cost(policy=policy, train="inserted"), cost(policy=policy, train="all")
    inserted = [2, 4]
    below, above = [0, 1], [3, 5]
    # Below the first inserted block: no activations, no backward pass.
    assert [frozen.kept[i] for i in below] == [0, 0] and [frozen.went_back[i] for i in below] == [False, False]
    # Above it the gradient goes through, and what only weight gradients need is not kept: inputs of linear layers.
    for i in above:
        assert 0 < frozen.kept[i] < trained.kept[i] and frozen.went_back[i]
    # Gradients and moments of inserted blocks alone.
    for place in range(6):
        assert bool(frozen.gradients[place]) == bool(frozen.moments[place]) == (place in inserted)
    # The check can fail: with everything trained all of it is there.
    assert all(trained.kept) and all(trained.went_back) and all(trained.gradients) and all(trained.moments)
