"""Inputs of a head-wise memory whose best slots do not hang on rounding."""

from __future__ import annotations

import functools

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("query", "row_keys", "col_keys", "values", "head_proj")


def slot_scores(query: torch.Tensor, row_keys: torch.Tensor, col_keys: torch.Tensor) -> torch.Tensor:
    """Scores of all N * N slots, ``[T, H, N * N]``: brute force, no product-key search."""
    row_query, col_query = query.chunk(2, dim=-1)
    rows = torch.einsum("thd,hnd->thn", row_query, row_keys)
    cols = torch.einsum("thd,hnd->thn", col_query, col_keys)
    return (rows[..., :, None] + cols[..., None, :]).flatten(-2)


def separated(query: torch.Tensor, row_keys: torch.Tensor, col_keys: torch.Tensor, topk: int, gap: float):
    """Tokens at which score K of every head is ``gap`` above score K + 1, and none of the first K is near zero."""
    scores = slot_scores(query.double(), row_keys.double(), col_keys.double())
    scores = scores.topk(min(topk + 1, scores.shape[-1]), dim=-1).values
    clear = scores[..., :topk].abs().amin(-1) > gap
    if scores.shape[-1] > topk:
        clear &= scores[..., topk - 1] - scores[..., topk] > gap
    return clear.all(-1)


def make_inputs(**settings) -> list[torch.Tensor | None]:
    """A fresh copy of ``_drawn_inputs``: leaves that all require a gradient."""
    return [None if t is None else t.clone().requires_grad_() for t in _drawn_inputs(**settings)]


@functools.lru_cache(maxsize=64)
def _drawn_inputs(
    *, tokens=63, heads=3, num_keys=100, topk=9, channels=6, latent=5, out=7, variant="hive", dtype=torch.float32,
    gap=1e-4, seed=0,
) -> list[torch.Tensor | None]:  # fmt: skip
    """``[query, row_keys, col_keys, values, head_proj]``, random.

    Score K and K + 1 differ by ``gap``, far above fp32 rounding (about 1e-6 here), so all precisions select alike.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    keys = [draw(heads, num_keys, channels // 2) for _ in range(2)]
    slots = num_keys**2
    values = draw(*{"hive": (slots, latent), "full": (heads, slots, out), "block": (slots, heads * out)}[variant])
    proj = draw(heads, latent, out) if variant == "hive" else None
    query = torch.empty(0, heads, channels, dtype=dtype)
    while len(query) < tokens:
        drawn = draw(max(2 * tokens, 8), heads, channels)
        query = torch.cat([query, drawn[separated(drawn, *keys, topk, gap)]])
    return [query[:tokens], *keys, values, proj]


def run_with_gradients(function, inputs, **settings):
    """Output and the gradient of every input, by name, for one fixed random gradient of the output."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves, **settings)
    generator = torch.Generator().manual_seed(1)
    grad_out = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    given = {name: leaf for name, leaf in zip(NAMES, leaves) if leaf is not None}
    grads = torch.autograd.grad(out, list(given.values()), grad_out)
    return {"out": out.detach(), **dict(zip(given, grads))}


def head_wise_memory_of(backend: str):
    """``head_wise_memory`` of one backend for tensors of the CPU; Triton's runs on the GPU where there is one."""
    from megatron_midus.ops import head_wise_memory

    def run(*tensors, **settings):
        if backend != "triton":
            return head_wise_memory(*tensors, backend=backend, **settings)
        moved = [None if t is None else t.to(DEVICE) for t in tensors]
        return head_wise_memory(*moved, backend=backend, **settings).cpu()

    run.backend = backend
    return run


@pytest.fixture
def device():
    """Where Triton's kernels run: the GPU, or the CPU when they are interpreted."""
    return DEVICE


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Memory that is handed out uninitialised holds NaN, integers their lowest number."""

    def poisoned(make):
        def run(*args, **kwargs):
            tensor = make(*args, **kwargs)
            lowest = torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min
            return tensor.fill_(lowest)

        return run

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture(name="head_wise_memory_of")
def _head_wise_memory_of():
    return head_wise_memory_of


@pytest.fixture(name="make_inputs")
def _make_inputs():
    return make_inputs


@pytest.fixture(name="run_with_gradients")
def _run_with_gradients():
    return run_with_gradients


@pytest.fixture(name="slot_scores")
def _slot_scores():
    return slot_scores


@pytest.fixture
def assert_within_plain_torch(run_with_gradients):
    """Error against float64 at most twice that of the definition at the same precision, plus a floor.

    The floor is four units in the last place of the largest element: what two different orders of summation may
    differ by when plain torch happens to be exact.
    """
    from megatron_midus.ops import reference

    def check(function, inputs, **settings):
        exact = run_with_gradients(
            reference.head_wise_memory, [None if t is None else t.double() for t in inputs], **settings
        )
        plain = run_with_gradients(reference.head_wise_memory, inputs, **settings)
        found = run_with_gradients(function, inputs, **settings)
        for name, truth in exact.items():
            assert found[name].dtype == inputs[0].dtype
            allowed = 2 * (plain[name].double() - truth).abs().max()
            allowed += 4 * torch.finfo(inputs[0].dtype).eps * truth.abs().max()
            error = (found[name].double() - truth).abs().max()
            assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
            assert truth.abs().max() > 0, f"{name} is zero, so the comparison says nothing"

    return check
