"""The balance loss against its formula, sub-key by sub-key, and its gradient against finite differences."""

from __future__ import annotations

import pytest
import torch

from megatron_midus.ops import balance, balance_loss, select_slots

TOKENS, HEADS, CHANNELS, KEYS, TOPK = 11, 3, 6, 7, 3


def tensors(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((TOKENS, HEADS, CHANNELS), (HEADS, KEYS, CHANNELS // 2), (HEADS, KEYS, CHANNELS // 2))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def by_hand(query: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor, index: torch.Tensor) -> list[float]:
    losses = []
    for h in range(HEADS):
        halves = []
        for half, keys in ((0, rows), (1, cols)):
            total = 0.0
            scores = query[:, h].chunk(2, -1)[half] @ keys[h].T  # [T, N]
            for i in range(KEYS):
                chosen = sum((int(slot) // KEYS, int(slot) % KEYS)[half] == i for slot in index[:, h].flatten())
                mean = sum(float(scores[t].softmax(0)[i]) for t in range(TOKENS)) / TOKENS
                total += KEYS * chosen / (TOKENS * TOPK) * mean
            halves.append(total)
        losses.append(sum(halves) / 2)
    return losses


@pytest.mark.parametrize("chunk", [1 << 22, 2 * HEADS * KEYS], ids=["one chunk", "chunks of 2 tokens"])
def test_loss_is_the_formula_and_its_gradient_the_derivative(chunk, monkeypatch):
    monkeypatch.setattr(balance, "CHUNK_SCORES", chunk)
    query, rows, cols = tensors()
    index = select_slots(query, rows, cols, topk=TOPK)[0]
    expected = torch.tensor(by_hand(query, rows, cols, index), dtype=torch.float64)
    torch.testing.assert_close(balance_loss(query, rows, cols, index), expected, rtol=1e-12, atol=0)
    inputs = [tensor.requires_grad_() for tensor in (query, rows, cols)]
    assert torch.autograd.gradcheck(lambda *args: balance_loss(*args, index), inputs)


def test_extremes():
    query, rows, cols = tensors()
    index = select_slots(query, rows, cols, topk=TOPK)[0]
    zero = torch.zeros_like(rows)  # equal scores: the probability is uniform, whatever was selected
    torch.testing.assert_close(balance_loss(query, zero, zero, index), torch.ones(HEADS, dtype=torch.float64))
    one_row = zero.clone()
    one_row[:, 4] = 1000.0
    ones = torch.ones_like(query)
    in_row_4 = torch.tensor([4 * KEYS + 4, 4 * KEYS + 4, 4 * KEYS + 4]).expand(TOKENS, HEADS, TOPK)
    collapsed = balance_loss(ones, one_row, one_row, in_row_4)
    torch.testing.assert_close(collapsed, torch.full((HEADS,), float(KEYS), dtype=torch.float64))


def test_descent_spreads_the_look_ups():
    """Queries with a strong common mean select the same sub-keys; following the gradient of the keys ends that."""
    query, rows, cols = tensors(torch.float32)
    query = query + 3
    rows, cols = rows.requires_grad_(), cols.requires_grad_()

    def used() -> int:
        return sum(len(slots.unique()) for slots in select_slots(query, rows, cols, topk=TOPK)[0].unbind(1))

    before = used()
    for _ in range(60):
        loss = balance_loss(query, rows, cols, select_slots(query, rows, cols, topk=TOPK)[0]).sum()
        for keys, gradient in zip((rows, cols), torch.autograd.grad(loss, (rows, cols))):
            keys.data -= 0.5 * gradient
    assert used() > before + HEADS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_have_the_dtypes_of_their_tensors(dtype):
    inputs = [tensor.requires_grad_() for tensor in tensors(dtype)]
    index = select_slots(*(tensor.detach().float() for tensor in inputs), topk=TOPK)[0]
    loss = balance_loss(*inputs, index)
    assert loss.dtype == torch.float32
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = torch.autograd.grad(balance_loss(*exact, index).sum(), exact)
    found = torch.autograd.grad(loss.sum(), inputs)
    for tensor, gradient, wanted in zip(inputs, found, expected):
        assert gradient.dtype == tensor.dtype
        # Rounded once to the dtype, on top of fp32 sums of a few dozen terms.
        eps = torch.finfo(dtype).eps + 32 * torch.finfo(torch.float32).eps
        torch.testing.assert_close(gradient.double(), wanted, rtol=eps, atol=eps * float(wanted.abs().max()))


def test_no_tokens():
    query, rows, cols = tensors()
    index = torch.zeros(0, HEADS, TOPK, dtype=torch.int32)
    assert not balance_loss(query[:0], rows, cols, index).any()
