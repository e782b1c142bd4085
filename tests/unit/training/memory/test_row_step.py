"""A step on some rows: what they become is what a step on everything makes of them, and nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from megatron_midus.platform.fused_adam import FusedAdam
from megatron_midus.training.masters import Master
from megatron_midus.training.memory.row_step import RowStep, elements_of_rows, restricted

ROWS, WIDTH = 11, 3
OPTIMIZERS: dict[str, Callable] = {
    "fused": lambda p: FusedAdam(p, lr=1e-2, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
}
# The whole parameter, and the parts of it that two ranks of a distributed optimizer hold: rows are cut through.
PARTS = {"whole": (0, ROWS * WIDTH), "first": (0, 16), "second": (16, ROWS * WIDTH)}


def parameter(part: str) -> torch.nn.Parameter:
    values = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    begin, end = PARTS[part]
    return torch.nn.Parameter(values if part == "whole" else values.flatten()[begin:end].clone())


def gradients(part: str, number: int) -> torch.Tensor:
    values = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(number + 1))
    begin, end = PARTS[part]
    return values if part == "whole" else values.flatten()[begin:end]


def chosen_rows(number: int) -> torch.Tensor:
    """Step 2 chooses none."""
    rows = torch.zeros(ROWS, dtype=torch.bool)
    if number != 2:
        rows[[number, 2 * number + 1, 5]] = True
    return rows


def snapshot(optimizer: torch.optim.Optimizer, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    state = {n: t for n, t in optimizer.state[weights].items() if isinstance(t, torch.Tensor) and t.dim()}
    return {name: t.detach().clone().flatten() for name, t in {"weights": weights, **state}.items()}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_chosen_rows_take_the_step_and_others_nothing(kind: str, part: str) -> None:
    weights, frozen = parameter(part), torch.nn.Parameter(torch.ones(4))
    optimizer = OPTIMIZERS[kind]([{"params": [frozen]}, {"params": [frozen.clone().detach(), weights]}])
    master = Master(optimizer, optimizer.param_groups[1], 1, PARTS[part][0])
    for number in range(5):
        # The same step on everything, from the same state.
        twin = weights.detach().clone().requires_grad_()
        whole = OPTIMIZERS[kind]([twin])
        whole.load_state_dict(
            {
                "state": {0: copy.deepcopy(optimizer.state_dict()["state"].get(2, {}))},
                "param_groups": [{**whole.state_dict()["param_groups"][0], "step": number}],
            }
        )
        before = snapshot(optimizer, weights)
        twin.grad = gradients(part, number)
        whole.step()
        expected = snapshot(whole, twin)
        weights.grad = gradients(part, number)
        rows = chosen_rows(number)
        with restricted([RowStep(master, elements_of_rows(rows, WIDTH, master))]):
            optimizer.step()
        begin, end = PARTS[part]
        mask = rows.repeat_interleave(WIDTH)[begin:end]
        found = snapshot(optimizer, weights)
        assert found.keys() == expected.keys() and len(optimizer.state) <= 2
        for name, value in found.items():
            old = before.get(name, torch.zeros_like(value))
            assert torch.equal(value[~mask], old[~mask]), name
            assert torch.equal(value[mask], expected[name][mask]), name
            assert not (value[mask] == old[mask]).any(), name
    steps = optimizer.state[weights].get("step", optimizer.param_groups[1].get("step"))
    assert steps is None or int(steps) == 5  # the step without rows, too


@pytest.mark.parametrize("rows", ["some", "all"])
@pytest.mark.parametrize("kind", ["fused", "adamw"])
def test_values_by_sgd_beside_adam(kind: str, rows: str) -> None:
    """``w -= lr (g + d w)``; moments stay as they are, also those of an earlier part of the run."""
    weights = parameter("whole")
    optimizer = OPTIMIZERS[kind]([weights])
    master = Master(optimizer, optimizer.param_groups[0], 0)
    weights.grad = gradients("whole", 0)
    optimizer.step()
    before = snapshot(optimizer, weights)
    mask = chosen_rows(1) if rows == "some" else torch.ones(ROWS, dtype=torch.bool)
    weights.grad = gradients("whole", 1)
    with restricted([RowStep(master, elements_of_rows(mask, WIDTH, master) if rows == "some" else None, by_sgd=True)]):
        optimizer.step()
    found, mask = snapshot(optimizer, weights), mask.repeat_interleave(WIDTH)
    old, gradient = before.pop("weights").double(), gradients("whole", 1).flatten().double()
    expected = torch.where(mask, old - 1e-2 * (gradient + 0.1 * old), old)
    weights_found = found.pop("weights")
    # The rounding of fp32 in two operations.
    torch.testing.assert_close(weights_found.double(), expected, rtol=3e-7, atol=1e-8)
    assert torch.equal(weights_found[~mask], old.float()[~mask])
    assert found.keys() == before.keys() and all(torch.equal(found[name], before[name]) for name in found)


def test_outside_of_it_the_optimizer_is_as_it_was() -> None:
    weights = parameter("whole")
    optimizer = OPTIMIZERS["fused"]([weights])
    master = Master(optimizer, optimizer.param_groups[0], 0)
    with restricted([RowStep(master, elements_of_rows(chosen_rows(0), WIDTH, master))]):
        pass
    weights.grad = gradients("whole", 0)
    before = weights.detach().clone()
    optimizer.step()
    assert not (before == weights).any()
