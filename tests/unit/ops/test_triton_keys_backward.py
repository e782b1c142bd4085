"""Gradients of queries and sub-keys against float64 autograd of the scores of slots that are given."""

import pytest
import torch

pytest.importorskip("triton")

from megatron_midus.ops.triton import keys_backward

NAMES = ("query", "row_keys", "col_keys")


def draw(*, tokens=13, heads=3, num_keys=20, topk=5, channels=12, dtype=torch.float32):
    """``(grad_scores, indices, query, row_keys, col_keys)``."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    indices = torch.rand(tokens, heads, num_keys**2, generator=generator).topk(topk, dim=-1).indices.int()
    keys = [normal(heads, num_keys, channels // 2) for _ in range(2)]
    grad_scores = torch.randn(tokens, heads, topk, generator=generator)
    return [grad_scores, indices, normal(tokens, heads, channels), *keys]


def gradients_of_autograd(grad_scores, indices, query, row_keys, col_keys, dtype):
    query, row_keys, col_keys = (t.to(dtype).requires_grad_() for t in (query, row_keys, col_keys))
    row_query, col_query = query.chunk(2, dim=-1)
    num_keys = row_keys.shape[1]
    row_scores = torch.einsum("thd,hnd->thn", row_query, row_keys)
    col_scores = torch.einsum("thd,hnd->thn", col_query, col_keys)
    index = indices.long()
    scores = row_scores.gather(2, index // num_keys) + col_scores.gather(2, index % num_keys)
    return dict(zip(NAMES, torch.autograd.grad(scores, (query, row_keys, col_keys), grad_scores.to(dtype))))


def run(inputs, device):
    found = keys_backward.keys_backward(*(t.to(device) for t in inputs))
    return {name: grad.cpu() for name, grad in zip(NAMES, found)}


def assert_within_plain_torch(found, inputs):
    """Error at most twice that of plain torch in fp32, plus four units in the last place of the largest element.

    The unit is that of the dtype; plain torch rounds what it computed in fp32 to that dtype at the end.
    """
    dtype = inputs[2].dtype
    plain = gradients_of_autograd(*inputs, torch.float32)
    for name, truth in gradients_of_autograd(*inputs, torch.float64).items():
        assert found[name].dtype == dtype
        allowed = 2 * (plain[name].to(dtype).double() - truth).abs().max()
        allowed += 4 * torch.finfo(dtype).eps * truth.abs().max()
        error = (found[name].double() - truth).abs().max()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
        assert truth.abs().max() > 0, f"{name} is zero, so the comparison says nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"tokens": 1, "heads": 1, "num_keys": 1, "topk": 1, "channels": 2},
        {"tokens": 3, "heads": 1, "num_keys": 100, "topk": 64, "channels": 64},
        {"tokens": 35, "heads": 2, "num_keys": 8, "topk": 8, "channels": 32},
        {"tokens": 2, "heads": 1, "num_keys": 100, "topk": 7, "channels": 256},
    ],
    ids=str,
)
def test_error_is_that_of_plain_torch(device, poisoned_memory, shape, dtype):
    """fp16 takes the path of bf16, whose arithmetic Triton's interpreter gets wrong."""
    inputs = draw(**shape, dtype=dtype)
    assert_within_plain_torch(run(inputs, device), inputs)


@pytest.fixture
def small_blocks(monkeypatch):
    """Every loop runs more than once, its last round shorter."""
    monkeypatch.setattr(keys_backward, "TOKENS_PER_SPLIT", 20)
    monkeypatch.setattr(keys_backward, "KEYS_ACCUMULATORS", 16 * 16)
    monkeypatch.setattr(keys_backward, "LOW_BITS", 1)
    monkeypatch.setattr(keys_backward, "MAX_BLOCK_D", 16)
    monkeypatch.setattr(keys_backward, "QUERY_TILE", 16 * 16)


def test_many_blocks(device, poisoned_memory, small_blocks):
    inputs = draw(tokens=33, heads=1, num_keys=37, topk=20, channels=40)
    assert_within_plain_torch(run(inputs, device), inputs)


def test_two_runs_are_bit_equal(device, small_blocks):
    inputs = draw(tokens=33, heads=2)
    first, second = (run(inputs, device) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_hot_sub_keys(device, poisoned_memory):
    """Every token selects slots of one row; the gradients of the other row keys are exactly zero."""
    inputs = draw(tokens=40, num_keys=30)
    inputs[1] = 7 * 30 + inputs[1] % 5 + 5 * torch.arange(5, dtype=torch.int32)
    found = run(inputs, device)
    assert_within_plain_torch(found, inputs)
    others = torch.arange(30) != 7
    assert not found["row_keys"][:, others].any()
    assert not found["col_keys"][:, 25:].any() and found["col_keys"][:, :25].any(-1).all()


def test_no_tokens(device, poisoned_memory):
    inputs = draw()
    found = run([*(t[:0] for t in inputs[:3]), *inputs[3:]], device)
    assert found["query"].shape == (0, 3, 12)
    assert not found["row_keys"].any() and not found["col_keys"].any()


def test_strided_query(device):
    inputs = draw()
    expected = run(inputs, device)
    inputs[2] = inputs[2].transpose(0, 1).contiguous().transpose(0, 1)
    found = run(inputs, device)
    assert all(torch.equal(found[name], expected[name]) for name in found)
