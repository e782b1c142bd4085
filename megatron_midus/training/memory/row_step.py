"""An optimizer's step on some rows of a parameter. Nothing of the others changes: no momentum, no decay, no moments.

Adam moves a parameter whose gradient is zero, by its momentum. So during the step a small tensor of the chosen elements
stands in for the whole master weights, with its part of the state. Steps are elementwise, so what the chosen ones become is
what a step on everything would have made of them, bit by bit. State keeps its layout, and the count of steps is the
optimizer's, as in ``torch.optim.SparseAdam``.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megatron_midus.training.masters import Master


@dataclasses.dataclass(frozen=True)
class RowStep:
    """What one step does to one parameter.

    Attributes:
        master: of the parameter, or of a part of it.
        elements: int64, positions in the flattened master that are updated; ``None`` = all.
        by_sgd: update them by ``w -= lr * (g + weight_decay * w)``, whatever the optimizer is, and no state.
    """

    master: Master
    elements: torch.Tensor | None
    by_sgd: bool = False


def elements_of_rows(chosen: torch.Tensor, width: int, master: Master) -> torch.Tensor:
    """Positions in the flattened master of the rows of the parameter that are ``chosen``, bool ``[R]``, of ``width`` each."""
    begin, size = master.begin, master.tensor.numel()
    rows = chosen.nonzero().flatten()
    positions = (rows[:, None] * width + torch.arange(width, device=rows.device)).flatten() - begin
    return positions[(positions >= 0) & (positions < size)]


@contextlib.contextmanager
def restricted(steps: Sequence[RowStep]) -> Iterator[None]:
    """While it lasts, a step of the optimizers of ``steps`` does what those say to their parameters."""
    handles = []
    for optimizer in {id(step.master.optimizer): step.master.optimizer for step in steps}.values():
        stand_ins = [_StandIn(step) for step in steps if step.master.optimizer is optimizer]
        handles += [
            optimizer.register_step_pre_hook(_call(stand_ins, _StandIn.enter)),
            optimizer.register_step_post_hook(_call(stand_ins, _StandIn.leave)),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _call(stand_ins: Sequence[_StandIn], method: Any) -> Any:
    def hook(optimizer: Any, arguments: Any, keywords: Any) -> None:
        with torch.no_grad():
            for each in stand_ins:
                method(each)

    return hook


class _StandIn:
    """Takes the place of master weights for one step."""

    def __init__(self, step: RowStep) -> None:
        self.step = step

    def enter(self) -> None:
        master, elements = self.step.master, self.step.elements
        self.whole = master.tensor
        state = master.state
        values, gradient = self.whole.detach().view(-1), self.whole.grad
        assert gradient is not None, "a value bank without a gradient"
        gradient = gradient.reshape(-1)
        if self.step.by_sgd:
            self._step_by_sgd(values, gradient)
            elements = values.new_empty(0, dtype=torch.int64)
        assert elements is not None
        self.elements = elements
        # Not empty, for fused kernels and so that the optimizer counts the step: an element that nobody gets back.
        self.part = _at_least_one(values[elements])
        self.part.grad = _at_least_one(gradient[elements])
        master.optimizer.state[self.part] = {
            name: _at_least_one(value.view(-1)[elements]) if self._is_elementwise(value) else value
            for name, value in state.items()
        }
        master.group["params"][master.position] = self.part

    def leave(self) -> None:
        master, number = self.step.master, len(self.elements)
        master.group["params"][master.position] = self.whole
        state, stepped = master.state, master.optimizer.state.pop(self.part)
        for name, value in stepped.items():
            if state.get(name) is None and isinstance(value, torch.Tensor) and value.shape == self.part.shape:
                state[name] = torch.zeros_like(self.whole, dtype=value.dtype)
            if self._is_elementwise(state.get(name)):
                state[name].view(-1)[self.elements] = value[:number]
            else:
                state[name] = value
        self.whole.detach().view(-1)[self.elements] = self.part[:number]

    def _step_by_sgd(self, values: torch.Tensor, gradient: torch.Tensor) -> None:
        group, elements = self.step.master.group, self.step.elements
        chosen = slice(None) if elements is None else elements
        change = gradient[chosen].add(values[chosen], alpha=group["weight_decay"])
        values[chosen] = values[chosen].sub(change, alpha=group["lr"])

    def _is_elementwise(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.shape == self.whole.shape


def _at_least_one(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.numel() else tensor.new_zeros(1)
