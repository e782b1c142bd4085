"""Gradients of the values, the head projection and the weights against float64 autograd of the definition's sums."""

import numpy
import pytest
import torch

pytest.importorskip("triton")

from megatron_midus.ops.triton import projection_backward, values_backward

VARIANTS = ("hive", "full", "block")
NAMES = ("weights", "values", "head_proj")


def aggregate(weights, indices, values, head_proj, variant):
    """The sums of ops/reference.py for slots that are given."""
    if variant == "hive":
        return torch.einsum("thk,thkl,hlo->tho", weights, values[indices], head_proj)
    if variant == "full":
        head = torch.arange(values.shape[0])[:, None]
        return torch.einsum("thk,thko->tho", weights, values[head, indices])
    return torch.einsum("thk,thkd->td", weights, values[indices])[:, None]


def draw(*, tokens=13, heads=3, topk=5, slots=100, latent=24, out=17, variant="hive", dtype=torch.float32, used=None):
    """``(grad_out, indices, weights, values, head_proj)``; ``used`` slots of all are selected, each once per token."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    scores = torch.rand(tokens, heads, slots if used is None else used, generator=generator)
    indices = scores.topk(topk, dim=-1).indices.int()
    values = normal(*{"hive": (slots, latent), "full": (heads, slots, out), "block": (slots, heads * out)}[variant])
    grad_out = normal(tokens, 1, heads * out) if variant == "block" else normal(tokens, heads, out)
    weights = torch.randn(tokens, heads, topk, generator=generator)
    return grad_out, indices, weights, values, normal(heads, latent, out) if variant == "hive" else None


def gradients_of_autograd(grad_out, indices, weights, values, head_proj, variant, dtype):
    given = [t.to(dtype).requires_grad_() for t in (weights, values, head_proj) if t is not None]
    out = aggregate(given[0], indices.long(), given[1], given[2] if len(given) > 2 else None, variant)
    return dict(zip(NAMES, torch.autograd.grad(out, given, grad_out.to(dtype))))


def latent_of(indices, weights, values, head_proj):
    if head_proj is None:
        return None
    return torch.einsum("thk,thkl->thl", weights.double(), values.double()[indices.long()]).to(values.dtype)


def run(inputs, variant, device, *, deterministic=True, accumulate_into=None):
    grad_out, indices, weights, values, head_proj = inputs
    latent = latent_of(indices, weights, values, head_proj)
    moved = [None if t is None else t.to(device) for t in (*inputs, latent)]
    found = values_backward.values_backward(
        *moved, variant=variant, deterministic=deterministic, accumulate_into=accumulate_into
    )
    return {name: grad.cpu() for name, grad in zip(NAMES, found) if grad is not None}


def assert_within_plain_torch(found, inputs, variant):
    """Error at most twice that of plain torch in fp32, plus four units in the last place of the largest element.

    The unit is that of the dtype; plain torch rounds what it computed in fp32 to that dtype at the end.
    """
    exact = gradients_of_autograd(*inputs, variant, torch.float64)
    plain = gradients_of_autograd(*inputs, variant, torch.float32)
    assert list(found) == list(exact)
    for name, truth in exact.items():
        dtype = torch.float32 if name == "weights" else inputs[3].dtype
        assert found[name].dtype == dtype
        allowed = 2 * (plain[name].to(dtype).double() - truth).abs().max()
        allowed += 4 * torch.finfo(inputs[3].dtype).eps * truth.abs().max()
        error = (found[name].double() - truth).abs().max()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
        assert truth.abs().max() > 0, f"{name} is zero, so the comparison says nothing"


@pytest.fixture
def small_chunks(monkeypatch):
    """Runs cross many chunks, and programs hold several, the last of them incomplete."""
    monkeypatch.setattr(values_backward, "CHUNK", 8)
    monkeypatch.setattr(values_backward, "CUT_TILE", 2)
    monkeypatch.setattr(values_backward, "TILE_ELEMENTS", 512)
    monkeypatch.setattr(values_backward, "MAX_BLOCK_W", 32)
    monkeypatch.setattr(projection_backward, "TOKENS_PER_SPLIT", 5)
    monkeypatch.setattr(projection_backward, "BLOCK_T", 32)
    monkeypatch.setattr(projection_backward, "MAX_BLOCK_L", 16)


@pytest.mark.parametrize("deterministic", [True, False], ids=["sorted", "atomic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_error_is_that_of_plain_torch(device, poisoned_memory, variant, dtype, deterministic):
    """fp16 takes the path of bf16, whose arithmetic Triton's interpreter gets wrong."""
    inputs = draw(variant=variant, dtype=dtype)
    assert_within_plain_torch(run(inputs, variant, device, deterministic=deterministic), inputs, variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_runs_across_chunks_and_ragged_ends(device, poisoned_memory, small_chunks, variant):
    inputs = draw(tokens=23, slots=30, out=16, latent=40, variant=variant)
    assert_within_plain_torch(run(inputs, variant, device), inputs, variant)


@pytest.mark.parametrize(
    "shape",
    [
        {"tokens": 1, "heads": 1, "topk": 1, "slots": 1, "latent": 1, "out": 1},
        {"tokens": 2, "heads": 2, "topk": 64, "slots": 64, "latent": 16, "out": 32},
        {"tokens": 5, "heads": 1, "topk": 2, "slots": 9, "latent": 64, "out": 128},
        {"tokens": 3, "heads": 1, "topk": 2, "slots": 9, "latent": 100, "out": 300},
    ],
    ids=str,
)
def test_extreme_shapes(device, poisoned_memory, shape):
    inputs = draw(**shape)
    assert_within_plain_torch(run(inputs, "hive", device), inputs, "hive")


def test_chunks_that_are_all_full(device, poisoned_memory, monkeypatch):
    """The kernel that needs no masks: the entries fill every chunk of every program."""
    monkeypatch.setattr(values_backward, "CHUNK", 4)
    inputs = draw(tokens=16, heads=2, topk=4, latent=64)
    assert 16 * 2 * 4 % (4 * values_backward.TILE_ELEMENTS // 64) == 0
    assert_within_plain_torch(run(inputs, "hive", device), inputs, "hive")


@pytest.mark.parametrize("used", [5, 6])
@pytest.mark.parametrize("deterministic", [True, False], ids=["sorted", "atomic"])
def test_hot_slots(device, poisoned_memory, small_chunks, deterministic, used):
    """Every token selects the same slots; one run fills many chunks, and all other rows are exactly zero."""
    inputs = draw(tokens=41, heads=2, topk=5, used=used)
    found = run(inputs, "hive", device, deterministic=deterministic)
    assert_within_plain_torch(found, inputs, "hive")
    assert not found["values"][used:].any()
    assert found["values"][:used].any(1).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_runs_are_bit_equal_and_rows_that_none_selected_zero(device, small_chunks, variant):
    inputs = draw(tokens=11, variant=variant, used=50)
    first, second = (run(inputs, variant, device) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    unused = first["values"][:, 50:] if variant == "full" else first["values"][50:]
    assert unused.numel() and not unused.any()


@pytest.mark.parametrize("deterministic", [True, False], ids=["sorted", "atomic"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_accumulation_into_a_buffer(device, small_chunks, variant, deterministic):
    inputs = draw(variant=variant, slots=30)
    alone = run(inputs, variant, device)
    buffer = torch.randn(inputs[3].shape, generator=torch.Generator().manual_seed(3)).to(device)
    before = buffer.cpu().clone()
    found = run(inputs, variant, device, deterministic=deterministic, accumulate_into=buffer)
    assert "values" not in found
    # One more addition in fp32, and for atomics another order of a few: two ulp of numbers of at most about 20.
    torch.testing.assert_close(buffer.cpu(), before + alone["values"], rtol=0, atol=5e-6)


@pytest.mark.parametrize("shape, dtype", [((100, 23), torch.float32), ((100, 24), torch.float64)])
def test_buffers_that_do_not_fit(device, shape, dtype):
    with pytest.raises(ValueError, match="accumulate_into is .* give a contiguous torch.float32 tensor"):
        run(draw(), "hive", device, accumulate_into=torch.zeros(shape, dtype=dtype, device=device))


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_tokens(device, poisoned_memory, variant):
    inputs = draw(variant=variant)
    found = run([*(t[:0] for t in inputs[:3]), *inputs[3:]], variant, device)
    assert found["weights"].shape == (0, 3, 5) and not found["values"].any()
    assert variant != "hive" or not found["head_proj"].any()


def test_mixed_precision(device, poisoned_memory):
    """fp32 parameters under a narrower gradient: everything in fp32, each gradient in the dtype of its tensor."""
    grad_out, *others = draw()
    found = run([grad_out.half(), *others], "hive", device)
    exact = run([grad_out.half().float(), *others], "hive", device)
    assert all(torch.equal(found[name], exact[name]) for name in exact)


def test_a_value_that_is_not_finite_stays_with_its_slot(device, small_chunks):
    grad_out, indices, weights, values, _ = draw(variant="full")
    clean = run([grad_out, indices, weights, values, None], "full", device)
    grad_out[4, 1, 3] = torch.nan
    found = run([grad_out, indices, weights, values, None], "full", device)
    spoiled = torch.zeros(3, 100, dtype=torch.bool)
    spoiled[1, indices[4, 1].long()] = True
    assert found["values"][spoiled][:, 3].isnan().all()
    assert torch.equal(found["values"][~spoiled], clean["values"][~spoiled])
    others = torch.arange(13) != 4
    assert torch.equal(found["weights"][others], clean["weights"][others])


def test_int64_offsets_give_the_same_bits(device, small_chunks, monkeypatch):
    import triton.language as tl

    inputs = draw()
    narrow = run(inputs, "hive", device)
    monkeypatch.setattr(values_backward, "_offset_type", lambda *tensors: tl.int64)
    wide = run(inputs, "hive", device)
    assert all(torch.equal(narrow[name], wide[name]) for name in narrow)


@pytest.mark.skipif(torch.cuda.is_available(), reason="pages that are never touched cost nothing on the CPU alone")
def test_bank_beyond_int32():
    """A bank of more than 2**31 elements; numpy's zero pages are never touched, so it takes address space alone."""
    slots, width = 1 << 24, 129
    values = torch.from_numpy(numpy.zeros((slots, width), numpy.float32))
    assert values.numel() > 2**31
    indices = torch.tensor([[[slots - 1, 3]], [[slots - 1, slots - 2]]], dtype=torch.int32)
    values[slots - 1] = 2.0
    weights = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
    grad_out = torch.ones(2, 1, width)
    buffer = torch.from_numpy(numpy.zeros((slots, width), numpy.float32))
    grad_weights, _, _ = values_backward.values_backward(
        grad_out, indices, weights, values, None, None, variant="block", deterministic=True, accumulate_into=buffer
    )
    assert grad_weights.flatten().tolist() == [2.0 * width, 0, 2.0 * width, 0]
    assert torch.equal(buffer[[slots - 1, slots - 2, 3, 4]], torch.tensor([4.0, 4, 2, 0])[:, None].expand(4, width))
