"""The backward kernels on a real GPU: bfloat16 sums, hot slots, equal bits, and the targets' shape against float64.

Run with ``pytest -m gpu tests/gpu`` on a machine with an NVIDIA GPU of compute capability 8.0 or more.
"""

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def draw(*, tokens, heads, num_keys, topk, latent=64, out=64, used=None):
    """``(grad_out, indices, weights, values, head_proj, latent)`` in bf16 on the GPU; ``used`` slots of all selected."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device="cuda").bfloat16()

    slots = used or num_keys**2
    first = torch.randint(slots, (tokens, heads, 1), generator=generator, device="cuda")
    step = torch.arange(topk, device="cuda") * (slots // topk)
    indices = ((first + step) % slots).int()  # K different ones
    weights = torch.rand(tokens, heads, topk, generator=generator, device="cuda")
    values, proj = normal(num_keys**2, latent), normal(heads, latent, out)
    grad_out = normal(tokens, heads, out)
    sums = torch.cat([
        torch.einsum("thk,thkl->thl", w, values[i.long()].float()) for w, i in zip(weights.split(256), indices.split(256))
    ])  # fmt: skip
    return grad_out, indices, weights, values, proj, sums.bfloat16()


def expected(grad_out, indices, weights, values, proj, latent):
    """Gradients of weights, values and projection in float64, by plain indexing, a few tokens at a time."""
    grad_latent = torch.einsum("tho,hlo->thl", grad_out.double(), proj.double())
    grad_values = torch.zeros(values.shape, dtype=torch.float64, device="cuda")
    grad_weights = []
    for g, i, w in zip(grad_latent.split(128), indices.split(128), weights.split(128)):
        grad_weights.append((values.double()[i.long()] * g[:, :, None]).sum(-1))
        grad_values.index_add_(0, i.flatten().long(), (w[..., None] * g[:, :, None]).flatten(0, 2))
    return torch.cat(grad_weights), grad_values, torch.einsum("thl,tho->hlo", latent.double(), grad_out.double())


SHAPES = {
    "paper": {"tokens": 8192, "heads": 32, "num_keys": 512, "topk": 16},
    "hot": {"tokens": 4096, "heads": 8, "num_keys": 512, "topk": 16, "used": 16},
    "odd": {"tokens": 333, "heads": 3, "num_keys": 100, "topk": 9, "latent": 33, "out": 50},
    "one token": {"tokens": 1, "heads": 32, "num_keys": 256, "topk": 64, "latent": 100, "out": 256},
}


@pytest.mark.parametrize("deterministic", [True, False], ids=["sorted", "atomic"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_backward(shape, deterministic):
    from megatron_midus.ops.triton.values_backward import values_backward

    inputs = draw(**shape)
    first = values_backward(*inputs, variant="hive", deterministic=deterministic)
    for found, truth in zip(first, expected(*inputs)):
        # bf16 gradients of the latent sums and one rounding at the end: four units in the last place (2**-8) of the largest.
        assert (found.double() - truth).abs().max() <= 4 * 2**-8 * truth.abs().max()
    if deterministic:
        second = values_backward(*inputs, variant="hive", deterministic=True)
        assert all(torch.equal(a, b) for a, b in zip(first, second))
    if "used" in shape:
        assert not first[1][shape["used"] :].any()


@pytest.mark.parametrize("shape", [*list(SHAPES.values())[::2], SHAPES["one token"]], ids=["paper", "odd", "one token"])
@pytest.mark.parametrize("channels", [64, 256])
def test_keys_backward(shape, channels):
    from megatron_midus.ops.triton.keys_backward import keys_backward

    sizes = {name: shape[name] for name in ("tokens", "heads", "num_keys", "topk")}
    _, indices, weights, *_ = draw(**sizes)
    heads, num_keys = sizes["heads"], sizes["num_keys"]
    generator = torch.Generator("cuda").manual_seed(1)
    query = torch.randn(sizes["tokens"], heads, channels, generator=generator, device="cuda").bfloat16()
    keys = [
        torch.randn(heads, num_keys, channels // 2, generator=generator, device="cuda").bfloat16() for _ in range(2)
    ]
    found = keys_backward(weights - 0.5, indices, query, *keys)
    again = keys_backward(weights - 0.5, indices, query, *keys)
    assert all(torch.equal(a, b) for a, b in zip(found, again))
    grad_query = torch.zeros(query.shape, dtype=torch.float64, device="cuda")
    for half, number in enumerate((indices // num_keys, indices % num_keys)):
        part = slice(half * channels // 2, (half + 1) * channels // 2)
        dense = torch.zeros(heads, sizes["tokens"], num_keys, device="cuda")
        dense.scatter_add_(2, number.transpose(0, 1).long(), (weights - 0.5).transpose(0, 1).contiguous())
        for h in range(heads):
            scores = dense[h].double()
            grad_query[:, h, part] = scores @ keys[half][h].double()
            truth = scores.T @ query[:, h, part].double()
            error = (found[1 + half][h].double() - truth).abs().max()
            # The scores' gradients and the result are rounded to bf16, four units in the last place of the largest sum of
            # magnitudes: where one token selects one column 64 times, the terms themselves cancel.
            assert error <= 4 * 2**-8 * (scores.abs().T @ query[:, h, part].double().abs()).max()
    assert (found[0].double() - grad_query).abs().max() <= 4 * 2**-8 * grad_query.abs().max()


def test_buffer_of_main_gradients():
    from megatron_midus.ops.triton.values_backward import values_backward

    inputs = draw(**SHAPES["hot"])
    alone = values_backward(*inputs, variant="hive", deterministic=True)[1].float()
    buffer = torch.ones(inputs[3].shape, device="cuda")
    assert values_backward(*inputs, variant="hive", deterministic=True, accumulate_into=buffer)[1] is None
    # The buffer is fp32; the gradient that it is compared with was rounded to bf16.
    torch.testing.assert_close(buffer - 1, alone, rtol=2**-8, atol=1e-4)
