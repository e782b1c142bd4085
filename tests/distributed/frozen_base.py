"""What a training step of a frozen base costs beyond its forward pass: counted in a real process, layer by layer."""

from __future__ import annotations

import dataclasses
from typing import Any

import scenarios
import torch
from counting import KeptForBackward
from scenarios import Layout, Setting


@dataclasses.dataclass
class Cost:
    """By position of the block.

    Attributes:
        kept: bytes that its forward pass keeps for the backward pass.
        went_back: whether the backward pass went through it.
        gradients: bytes of gradients of its parameters.
        moments: bytes of the optimizer's state of its parameters.
    """

    kept: list[int]
    went_back: list[bool]
    gradients: list[int]
    moments: list[int]


def cost_of_a_step(setting: Setting) -> Cost:
    """One step at one process, with everything frozen that the setting freezes."""
    chunks, plan = scenarios.build(setting, Layout())
    wrapped, optimizer = scenarios.wrap(chunks, plan, setting)
    layers = list(chunks[0].decoder.layers)
    cost = Cost(*([0] * len(layers) for _ in range(4)))  # type: ignore[arg-type]
    for place, layer in enumerate(layers):
        _count(chunks[0], layer, place, cost)
    scenarios.train_step(wrapped, optimizer, 0)
    state = optimizer.optimizer.state if hasattr(optimizer, "optimizer") else optimizer.state
    for place, layer in enumerate(layers):
        for parameter in layer.parameters():
            gradients = [getattr(parameter, name, None) for name in ("grad", "main_grad")]
            cost.gradients[place] += sum(g.nbytes for g in gradients if g is not None)
            moments = state.get(parameter, {})
            cost.moments[place] += sum(m.nbytes for m in moments.values() if isinstance(m, torch.Tensor) and m.dim())
    return cost


def _count(model: torch.nn.Module, layer: torch.nn.Module, place: int, cost: Cost) -> None:
    kept: list[KeptForBackward] = []

    def before(module: torch.nn.Module, arguments: Any) -> None:
        kept.append(KeptForBackward(model))
        kept[-1].__enter__()

    def after(module: torch.nn.Module, arguments: Any, output: Any) -> None:
        kept[-1].__exit__(None, None, None)
        cost.kept[place] = kept[-1].bytes
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: cost.went_back.__setitem__(place, True))

    cost.went_back[place] = False
    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(after)
