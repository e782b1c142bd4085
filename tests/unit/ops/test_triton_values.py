"""Sums of selected rows against plain indexing in float64, at sizes that fill no block."""

import math

import pytest
import torch

pytest.importorskip("triton")

from megatron_midus.ops.triton import selection, values


def draw(*, tokens, heads, topk, slots, device, shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(slots, (tokens, heads, topk), generator=generator, dtype=torch.int32)
    weights = torch.randn(tokens, heads, topk, generator=generator)
    others = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [t.to(device) for t in (indices, weights, *others)]


def assert_close(found, expected):
    # Sums of up to 100 products of size about 1 in fp32.
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    "tokens, heads, topk, latent, out_width",
    [(40, 2, 9, 5, 7), (33, 1, 3, 64, 64), (1, 3, 64, 100, 130), (7, 2, 1, 256, 17)],
)
def test_project(device, poisoned_memory, tokens, heads, topk, latent, out_width):
    indices, weights, bank, proj = draw(
        tokens=tokens,
        heads=heads,
        topk=topk,
        slots=50,
        device=device,
        shapes=[(50, latent), (heads, latent, out_width)],
    )
    out, saved = values.project(indices, weights, bank, proj, dtype=torch.float32, save_latent=True)
    expected = torch.einsum("thk,thkl->thl", weights.double(), bank.double()[indices.long()])
    assert_close(saved, expected)
    torch.testing.assert_close(
        out.double(), torch.einsum("thl,hlo->tho", expected, proj.double()), rtol=1e-4, atol=1e-4 * latent**0.5
    )
    again, nothing = values.project(indices, weights, bank, proj, dtype=torch.float32, save_latent=False)
    assert nothing is None and torch.equal(again, out)


@pytest.mark.parametrize("tokens, heads, topk, width", [(40, 2, 9, 7), (1, 3, 64, 130), (33, 1, 1, 64)])
def test_sum_full(device, poisoned_memory, tokens, heads, topk, width):
    indices, weights, bank = draw(
        tokens=tokens, heads=heads, topk=topk, slots=50, device=device, shapes=[(heads, 50, width)]
    )
    out = values.sum_values(indices, weights, bank, variant="full", dtype=torch.float32)
    rows = bank.double()[torch.arange(heads)[:, None], indices.long()]
    assert_close(out, torch.einsum("thk,thko->tho", weights.double(), rows))


@pytest.mark.parametrize("tokens, heads, topk, width", [(40, 2, 9, 7), (1, 3, 33, 300)])
def test_sum_block(device, poisoned_memory, tokens, heads, topk, width):
    indices, weights, bank = draw(tokens=tokens, heads=heads, topk=topk, slots=50, device=device, shapes=[(50, width)])
    out = values.sum_values(indices, weights, bank, variant="block", dtype=torch.float32)
    assert_close(out, torch.einsum("thk,thkd->td", weights.double(), bank.double()[indices.long()])[:, None])


@pytest.fixture
def large(tmp_path, device):
    """Makes tensors larger than memory: sparse files, of which only the pages that are touched exist."""

    def make(*shape, dtype):
        if device == "cuda":
            return torch.empty(shape, dtype=dtype, device=device)
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype).view(shape)

    return make


def test_a_bank_past_int32_elements(large, device):
    """Rows behind element 2^31 are read where they lie (4.3 GB of address space, a few pages of memory)."""
    slots = 2**31 // 64 + 9
    bank = large(slots, 64, dtype=torch.float16)
    bank[-9:] = torch.randn(9, 64).to(bank)
    indices = torch.arange(slots - 9, slots, dtype=torch.int32, device=device).view(3, 1, 3)
    weights = torch.rand(3, 1, 3, device=device)
    out = values.sum_values(indices, weights, bank, variant="block", dtype=torch.float32)
    expected = torch.einsum("tk,tkl->tl", weights[:, 0], bank[-9:].float().view(3, 3, 64))
    torch.testing.assert_close(out[:, 0], expected, rtol=1e-5, atol=1e-6)


def test_activations_past_int32_elements(large, device):
    """T * H * D, T * H * K and T * H * L beyond 2^31: three tokens of 2^28 heads, of which one is computed."""
    heads, generator = 2**28, torch.Generator().manual_seed(0)

    def draw_half(*shape):
        return torch.randn(shape, generator=generator).to(device, torch.float16)

    query = large(3, heads, 4, dtype=torch.float16)
    indices = large(3, heads, 4, dtype=torch.int32)
    weights = large(3, heads, 4, dtype=torch.float32)
    out = large(3, heads, 4, dtype=torch.float16)
    latent = large(3, heads, 4, dtype=torch.float16)
    query[:, 0] = draw_half(3, 4)
    rows, cols = (draw_half(1, 20, 2) for _ in range(2))
    bank = draw_half(400, 4)
    proj = draw_half(1, 4, 4)
    selection.select_kernel[(1, 1)](
        query, rows, cols, indices, weights, 3, heads, 32,
        N=20, HALF=2, TOPK=4, TOPK_PADDED=4, ACTIVATION="softmax", WIDE=True, BITS=5, BLOCK_T=64, BLOCK_N=64, BLOCK_D=16,
    )  # fmt: skip
    values.project_kernel[(1, 1)](
        bank, proj, indices, weights, out, latent, 3, heads,
        W=4, OUT=4, TOPK=4, SAVE_LATENT=True, BLOCK_T=32, BLOCK_W=16, BLOCK_O=16,
    )  # fmt: skip
    small = selection.select(query[:, :1].contiguous(), rows, cols, topk=4, activation="softmax", wide=True)
    assert torch.equal(indices[:, :1], small[0]) and torch.equal(weights[:, :1], small[1])
    expected = values.project(*small, bank, proj, dtype=torch.float16, save_latent=True)
    assert torch.equal(out[:, :1], expected[0]) and torch.equal(latent[:, :1], expected[1]) and out[2, 0].any()
