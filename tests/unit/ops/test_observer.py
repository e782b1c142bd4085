"""Whoever watches a look-up sees what it read, in every backend, and changes nothing."""

from __future__ import annotations

import pytest
import torch

from megatron_midus.ops import head_wise_memory, weigh_slots

TOKENS, HEADS, CHANNELS, KEYS, TOPK, LATENT = 9, 2, 6, 8, 3, 4


def arguments() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((TOKENS, HEADS, CHANNELS), (HEADS, KEYS, 3), (HEADS, KEYS, 3), (KEYS**2, LATENT), (HEADS, LATENT, 5))
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def run(backend: str, observer=None) -> tuple[torch.Tensor, ...]:
    tensors = arguments()
    out = head_wise_memory(*tensors, topk=TOPK, backend=backend, observer=observer)
    return (out.detach(), *torch.autograd.grad(out.square().sum(), tensors))


@pytest.mark.parametrize("backend", ["reference", "torch", "numba", "triton"])
def test_an_observer_sees_the_look_up_and_changes_nothing(backend, monkeypatch):
    if backend in ("numba", "triton"):
        pytest.importorskip(backend)
    if backend == "triton":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    seen = []
    found = run(backend, lambda indices, weights: seen.append((indices, weights)))
    assert all(map(torch.equal, found, run(backend)))
    ((indices, weights),) = seen  # once: the backward pass selects nothing
    assert indices.dtype == torch.int32 and not weights.requires_grad
    assert indices.shape == weights.shape == (TOKENS, HEADS, TOPK)
    expected_indices, expected_weights = weigh_slots(*arguments()[:3], topk=TOPK, backend="reference")
    assert torch.equal(indices, expected_indices)
    torch.testing.assert_close(weights, expected_weights.detach(), rtol=1e-5, atol=1e-6)  # fp32 sums in another order
