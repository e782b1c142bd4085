"""Selecting and reading in two steps gives what head_wise_memory gives, gradients included, also column by column."""

import itertools

import pytest
import torch

from megatron_midus.ops import aggregate_values, cpu, head_wise_memory, weigh_slots

ACTIVATIONS = ("softmax", "sigmoid", "relu")
CASES = [
    *itertools.product(("hive", "block"), ACTIVATIONS, ("torch", "numba", "reference")),
    ("hive", "softmax", "triton"),  # interpreted, a thousand times slower
    ("block", "relu", "triton"),
]


def two_steps(query, row_keys, col_keys, values, head_proj, *, topk, variant, score_activation, backend, columns=1):
    """``head_wise_memory`` as ranks compute it that hold a part of the value columns each."""
    index, weights = weigh_slots(
        query, row_keys, col_keys, topk=topk, score_activation=score_activation, backend=backend
    )
    tokens, heads, _ = index.shape
    bags = tokens if variant == "block" else tokens * heads
    parts = values.tensor_split(columns, dim=1)
    found = torch.cat(
        [aggregate_values(v, index.view(bags, -1), weights.view(bags, -1), backend=backend) for v in parts], dim=1
    )
    if variant == "block":
        return found[:, None].to(query.dtype)
    wide = head_proj.to(found.dtype)
    return torch.einsum("thl,hlo->tho", found.view(tokens, heads, -1), wide).to(query.dtype)


@pytest.mark.parametrize(("variant", "activation", "backend"), CASES)
def test_equals_the_whole_operator(make_inputs, run_with_gradients, variant, activation, backend):
    if backend == "numba":
        pytest.importorskip("numba")
    few = {"tokens": 2, "num_keys": 12} if backend == "triton" else {}
    inputs = make_inputs(variant=variant, **few)
    settings = {"topk": 9, "variant": variant, "score_activation": activation, "backend": backend}
    expected = run_with_gradients(head_wise_memory, inputs, **settings)
    found = run_with_gradients(two_steps, inputs, **settings, columns=3)
    for name, tensor in expected.items():
        # fp32, the same sums in another order: a few units in the last place of the largest element.
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-6 * float(tensor.abs().max()), msg=name)
        assert tensor.abs().max() > 0


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(make_inputs, activation):
    # gap 1e-2: gradcheck moves an input by 1e-6, which moves a score by about 1e-5.
    inputs = make_inputs(
        tokens=3, heads=2, num_keys=5, topk=3, channels=6, latent=3, out=2, dtype=torch.float64, gap=1e-2
    )
    settings = {"topk": 3, "variant": "hive", "score_activation": activation, "backend": "torch"}
    assert torch.autograd.gradcheck(lambda *x: two_steps(*x, **settings, columns=2), inputs)


def test_chunks_and_narrow_values(make_inputs, run_with_gradients, monkeypatch):
    """Several chunks, the last one shorter; a bank in bfloat16 is widened before it is read, whole or by rows."""
    inputs = make_inputs(tokens=101, num_keys=20, topk=4)
    settings = {"topk": 4, "variant": "hive", "score_activation": "softmax"}
    whole = run_with_gradients(two_steps, inputs, **settings, backend="torch")
    monkeypatch.setattr(cpu, "CHUNK_SELECTIONS", 4 * 50)
    chunked = run_with_gradients(two_steps, inputs, **settings, backend="torch")
    for name, tensor in whole.items():
        torch.testing.assert_close(chunked[name], tensor, rtol=0, atol=2e-6 * float(tensor.abs().max()), msg=name)
    for tokens in (101, 2):
        narrow = [t.detach()[:tokens] if i == 0 else t.detach() for i, t in enumerate(inputs)]
        narrow[3] = narrow[3].bfloat16()
        expected = run_with_gradients(two_steps, narrow, **settings, backend="reference")
        found = run_with_gradients(two_steps, narrow, **settings, backend="torch")
        for name, tensor in expected.items():
            # A sum next to a rounding boundary may round to the neighbouring bfloat16: one unit of its 8 bits.
            bound = 2**-7 if tensor.dtype == torch.bfloat16 else 2e-6
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=bound * float(tensor.abs().max()), msg=name)


@pytest.mark.parametrize("frozen", ["values", "keys"])
def test_what_is_frozen_gets_no_gradient(make_inputs, frozen):
    query, rows, cols, values, _ = (t.detach() for t in make_inputs())
    trained = [values] if frozen == "keys" else [query, rows, cols]
    for tensor in trained:
        tensor.requires_grad_()
    index, weights = weigh_slots(query, rows, cols, topk=9)
    assert weights.requires_grad == (frozen == "values") and not index.is_floating_point()
    out = aggregate_values(values, index.view(-1, 9), weights.view(-1, 9))
    out.square().sum().backward()
    for tensor in (query, rows, cols, values):
        assert (tensor.grad is not None) == any(tensor is t for t in trained)


def test_mistakes_are_named(make_inputs):
    query, rows, cols, values, _ = make_inputs()
    with pytest.raises(ValueError, match="memory backend 'nonsense' cannot run: it is not known"):
        weigh_slots(query, rows, cols, topk=9, backend="nonsense")
    with pytest.raises(ValueError, match="score_activation='max' is not known"):
        weigh_slots(query, rows, cols, topk=9, score_activation="max")
    index, weights = weigh_slots(query, rows, cols, topk=9)
    with pytest.raises(ValueError, match=r"do not fit; give \[slots, width\]"):
        aggregate_values(values, index, weights)
