"""The definition: its gradient in float64, its selection against brute force, its formulas by hand."""

import pytest
import torch

from megatron_midus.ops import transform_query
from megatron_midus.ops.reference import head_wise_memory, select_slots

VARIANTS = ("hive", "full", "block")
ACTIVATIONS = ("softmax", "sigmoid", "relu")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(make_inputs, variant, activation):
    # gap 1e-2: gradcheck moves an input by 1e-6, which moves a score by about 1e-5.
    inputs = make_inputs(
        tokens=3,
        heads=2,
        num_keys=5,
        topk=3,
        channels=6,
        latent=3,
        out=2,
        variant=variant,
        dtype=torch.float64,
        gap=1e-2,
    )
    assert torch.autograd.gradcheck(
        lambda *x: head_wise_memory(*x, topk=3, variant=variant, score_activation=activation), inputs
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_is_the_dense_formula(make_inputs, slot_scores, variant, activation):
    """Weights over all N * N slots, zero outside the K best, times the bank: the maths without any search."""
    query, rows, cols, values, proj = inputs = make_inputs(
        tokens=7, num_keys=6, topk=4, variant=variant, dtype=torch.float64
    )
    scores = slot_scores(query, rows, cols)
    outside = scores < scores.topk(4, dim=-1).values[..., -1:]
    if activation == "softmax":
        weights = scores.masked_fill(outside, -torch.inf).softmax(-1)
    else:
        weights = getattr(scores, activation)().masked_fill(outside, 0)
    if variant == "hive":
        expected = torch.stack([weights[:, h] @ values @ proj[h] for h in range(3)], 1)
    elif variant == "full":
        expected = torch.stack([weights[:, h] @ values[h] for h in range(3)], 1)
    else:
        expected = (weights.sum(1) @ values)[:, None]
    found = head_wise_memory(*inputs, topk=4, variant=variant, score_activation=activation)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)  # float64: about 1e4 ulp


def test_slots_are_those_of_brute_force(make_inputs, slot_scores):
    query, rows, cols, *_ = make_inputs(dtype=torch.float64)
    index, scores = select_slots(query, rows, cols, topk=9)
    expected = slot_scores(query, rows, cols).topk(9, dim=-1)
    assert torch.equal(index, expected.indices)
    torch.testing.assert_close(scores, expected.values, rtol=1e-13, atol=1e-13)  # float64 rounding


def test_bf16_computes_in_fp32(make_inputs):
    inputs = make_inputs(dtype=torch.bfloat16)
    wide = head_wise_memory(*(t.float() for t in inputs), topk=9)
    assert torch.equal(head_wise_memory(*inputs, topk=9), wide.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_transform_query(dtype):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(5, 3, 6, generator=generator).to(dtype)
    norm, temperature = torch.randn(3, 6, generator=generator), torch.randn(3, generator=generator)
    assert transform_query(query) is query
    wide = query.double()
    rms = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    tolerance = {"rtol": 4 * torch.finfo(dtype if dtype != torch.float64 else torch.float32).eps, "atol": 1e-6}
    scale = temperature.double().exp()[:, None]
    for found, expected in (
        (transform_query(query, norm), rms * norm.double()),
        (transform_query(query, None, temperature), wide * scale),
        (transform_query(query, norm, temperature), rms * norm.double() * scale),
    ):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, **tolerance)


def test_transform_query_of_zeros_is_zero_and_has_a_gradient():
    query = torch.zeros(2, 1, 4, requires_grad=True)
    out = transform_query(query, torch.ones(1, 4))
    out.sum().backward()
    assert not out.any() and query.grad.isfinite().all()
