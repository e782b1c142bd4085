"""The divergence against torch in float64: values, gradients, padding, chunks, 16 bits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_midus.training import kl_to_base
from megatron_midus.training.kl_to_base import kl_divergence

SHAPE = (5, 2, 11)


def random_logits(seed: int, scale: float = 3.0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return (torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def by_torch(logits: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    pair = (x.double().log_softmax(-1) for x in (logits, base))
    return F.kl_div(*pair, reduction="none", log_target=True).sum(-1)


@pytest.fixture(params=[2**18, 44, 1])
def _chunks(request, monkeypatch):
    """All tokens at once, two positions, one."""
    monkeypatch.setitem(kl_to_base._CHUNK, "cpu", request.param)


@pytest.mark.usefixtures("_chunks")
def test_values_and_gradients():
    logits, base = random_logits(1).requires_grad_(), random_logits(2)
    found = kl_divergence(logits, base.clone())
    torch.testing.assert_close(found, by_torch(logits, base), rtol=1e-12, atol=1e-14)
    weights = torch.rand(SHAPE[:2], dtype=torch.float64)
    (gradient,) = torch.autograd.grad((found * weights).sum(), logits)
    (expected,) = torch.autograd.grad((by_torch(logits, base) * weights).sum(), logits)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(lambda x: kl_divergence(x, base.clone()), (logits,))


def test_equal_distributions_have_none():
    logits = random_logits(1, scale=30, dtype=torch.float32).requires_grad_()
    found = kl_divergence(logits, logits.detach().clone())
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert not found.any() and not gradient.any()


def test_small_divergences_survive_fp32():
    """About 1e-6 nats. Log-probabilities of 30 are off by 2e-6 each; what is left are roundings of probabilities, 6e-8."""
    logits = random_logits(1, scale=10).float()
    base = logits + random_logits(2, scale=2e-3).float()
    expected = by_torch(logits, base)
    assert expected.median() < 2e-6
    torch.testing.assert_close(kl_divergence(logits, base).double(), expected, rtol=1e-3, atol=1.2e-7)


def test_rows_of_padding_have_no_part():
    logits, base = random_logits(1, dtype=torch.float32), random_logits(2, dtype=torch.float32)
    expected = kl_divergence(logits[..., :7].contiguous(), base[..., :7].clone())
    padded = [x.clone() for x in (logits, base)]
    for x in padded:
        x[..., 7:] = torch.finfo(x.dtype).min
    padded[0].requires_grad_()
    found = kl_divergence(*padded)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found.sum(), padded[0])
    assert not gradient[..., 7:].any() and gradient[..., :7].all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype):
    logits, base = random_logits(1, dtype=dtype), random_logits(2, dtype=dtype)
    logits[..., 3] = base[..., 3] = -13  # probabilities that fp16 has no number for
    base[..., 3] = -12
    logits.requires_grad_()
    found = kl_divergence(logits, base.clone())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), by_torch(logits, base), rtol=1e-5, atol=1e-6)
    scale = 2.0**14  # of the loss, in fp16
    (gradient,) = torch.autograd.grad(found.sum() * scale, logits)
    (expected,) = torch.autograd.grad(by_torch(logits, base).sum() * scale, logits)
    # Rounded twice: the difference of the distributions, and its product with the gradient.
    torch.testing.assert_close(gradient, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
