"""The domain gate: a logistic regression, against its definition and on sets that can and cannot be told apart."""

import pytest
import torch

from megatron_midus.upscaling.domain_gate import _PENALTY, fit_domain_gate


def draw(tokens, shift, seed):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([1.0, 0.1, 10.0, 1.0])
    return torch.randn(tokens, 4, generator=generator) * spread + 3.0 + shift * spread


def test_it_is_the_minimum_of_the_balanced_loss():
    """The gradient of the definition, written out here, vanishes there; the smaller set counts as much as the larger."""
    new, old = draw(400, torch.tensor([0.7, -0.4, 0.0, 0.0]), 1), draw(1000, torch.zeros(4), 2)
    gate = fit_domain_gate(new, old)
    kept = [rows[torch.arange(len(rows)) % 5 != 0].double() for rows in (new, old)]
    mean = (kept[0].mean(0) + kept[1].mean(0)) / 2
    spread = (((kept[0] - mean) ** 2).mean(0) / 2 + ((kept[1] - mean) ** 2).mean(0) / 2).sqrt()
    weight = gate.weight.double() * spread
    bias = gate.bias.double() + gate.weight.double() @ mean
    gradient = 2 * _PENALTY * weight
    for rows, label in zip(kept, (1.0, 0.0)):
        error = torch.sigmoid((rows - mean) / spread @ weight + bias) - label
        gradient = gradient + (error[:, None] * (rows - mean) / spread).mean(0) / 2
    assert gradient.abs().max() < 1e-5 and gate.weight.abs().max() > 0.3
    assert gate.weight.shape == (4,) and gate.bias.shape == (1,)
    assert 0.6 < gate.accuracy < 0.75  # normal distributions whose means are 0.8 apart: 0.66


def test_what_cannot_be_told_apart_leaves_the_gate_half_open():
    new, old = draw(5000, torch.zeros(4), 1), draw(5000, torch.zeros(4), 2)
    gate = fit_domain_gate(new, old)
    assert gate.accuracy == pytest.approx(0.5, abs=0.03)
    assert torch.sigmoid(old @ gate.weight + gate.bias) == pytest.approx(0.5, abs=0.1)


def test_a_channel_that_never_moves_and_a_set_of_one():
    new, old = draw(1, torch.tensor([2.0, 0.0, 0.0, 0.0]), 1), draw(3, torch.zeros(4), 2)
    new[:, 1] = old[:, 1] = 7.0
    gate = fit_domain_gate(new, old)
    assert gate.weight.isfinite().all() and gate.weight[1].abs() < 1e-3 and gate.accuracy == 1.0
