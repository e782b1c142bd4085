"""The domain gate of a memory: a logistic regression between a new and an old text on what the block's norm puts out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from megatron_midus.upscaling.plan import UpscalePlan
from megatron_midus.upscaling.tensors import layer_name

_PENALTY = 1e-3  # of the squared weights of standardised channels, beside a mean loss in nats
_HELD_OUT = 5  # every fifth token is kept out of the fit, for the accuracy


@dataclasses.dataclass(frozen=True)
class DomainGate:
    """``sigmoid(weight . y + bias)`` of a block's normed input ``y`` is the probability of the new domain.

    Attributes:
        weight: ``[d]``, fp32.
        bias: ``[1]``, fp32.
        accuracy: share of tokens kept out of the fit that it puts on the right side, both domains counting alike.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    accuracy: float


def collect_normed_inputs(model: Any, sequences: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
    """``{layer index: norm(x) [T, d]}`` of every Memory block.

    Args:
        model: a ``MidusForCausalLM`` in evaluation mode.
        sequences: token ids ``[1, S]``.
    """
    seen: dict[int, list[torch.Tensor]] = {}
    layers = {index: layer for index, layer in enumerate(model.model.layers) if hasattr(layer, "memory")}
    hooks = [
        layer.memory.register_forward_pre_hook(
            lambda module, inputs, index=index: seen.setdefault(index, []).append(inputs[1][0].detach().float())
        )
        for index, layer in layers.items()
    ]
    try:
        with torch.no_grad():
            for ids in sequences:
                model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {index: torch.cat(parts) for index, parts in seen.items()}


def fit_domain_gate(new_Td: torch.Tensor, old_Td: torch.Tensor) -> DomainGate:
    """The classifier between two sets of vectors, both counting alike however many there are.

    Args:
        new_Td: ``[T, d]`` of the new domain, T >= 1.
        old_Td: ``[T', d]`` of the old domain, T' >= 1.
    """
    sets = [(new_Td.double(), 1.0), (old_Td.double(), 0.0)]
    fitted = [(_without_held_out(rows), label) for rows, label in sets]
    mean = torch.stack([rows.mean(0) for rows, _ in fitted]).mean(0)
    spread = torch.stack([(rows - mean).square().mean(0) for rows, _ in fitted]).mean(0).sqrt().clamp_min(1e-12)
    parts = [((rows - mean) / spread, label) for rows, label in fitted]
    weight, bias = _logistic_regression(parts)
    weight = weight / spread
    bias = bias - weight @ mean
    accuracy = sum(_accuracy(rows[::_HELD_OUT], label, weight, bias) for rows, label in sets) / 2
    return DomainGate(weight.float(), bias.float().reshape(1), accuracy)


def _without_held_out(rows: torch.Tensor) -> torch.Tensor:
    if len(rows) <= _HELD_OUT:
        return rows
    return rows[torch.arange(len(rows)) % _HELD_OUT != 0]


def _logistic_regression(parts: list[tuple[torch.Tensor, float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """``(weight [d], bias [])`` in fp64 at the minimum of a convex loss, so that nothing is drawn at random."""
    channels = parts[0][0].shape[1]
    solution = torch.zeros(channels + 1, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([solution], max_iter=200, line_search_fn="strong_wolfe", tolerance_change=1e-12)

    def loss() -> torch.Tensor:
        search.zero_grad()
        total = _PENALTY * solution[:-1].square().sum()
        for rows, label in parts:
            score = rows @ solution[:-1] + solution[-1]
            target = torch.full_like(score, label)
            total = total + torch.nn.functional.binary_cross_entropy_with_logits(score, target) / 2
        total.backward()
        return total

    with torch.enable_grad():
        search.step(loss)
    found = solution.detach()
    return found[:-1], found[-1]


def _accuracy(rows: torch.Tensor, label: float, weight: torch.Tensor, bias: torch.Tensor) -> float:
    return float((((rows @ weight + bias) > 0).double() == label).double().mean())


def gate_tensors(
    new: dict[int, torch.Tensor], old: dict[int, torch.Tensor], plan: UpscalePlan
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Canonical name -> tensor of every new Memory block's gate, and the gates' accuracies in the order of the blocks."""
    tensors: dict[str, torch.Tensor] = {}
    accuracies = []
    for index in plan.new_memory_indices:
        gate = fit_domain_gate(new[index], old[index])
        tensors[layer_name(index, "memory.domain_gate")] = gate.weight
        tensors[layer_name(index, "memory.domain_gate_bias")] = gate.bias
        accuracies.append(gate.accuracy)
    return tensors, accuracies
