"""Triton's kernels on a real GPU: bfloat16, which the interpreter cannot compute, and shapes that it would not live to see.

Run with ``pytest -m gpu tests/gpu`` on a machine with an NVIDIA GPU of compute capability 8.0 or more.
"""

import pytest
import torch

from megatron_midus.ops import aggregate_values, head_wise_memory, reference, weigh_slots
from megatron_midus.ops.dispatch import choose_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NAMES = ("query", "row_keys", "col_keys", "values", "head_proj")
VARIANTS = ("hive", "full", "block")
PAPER = {"tokens": 8192, "heads": 32, "num_keys": 512, "topk": 16, "channels": 64, "latent": 64, "out": 64}
SHAPES = {
    "paper, fewer tokens": PAPER | {"tokens": 515, "heads": 8},
    "odd": {"tokens": 333, "heads": 3, "num_keys": 100, "topk": 9, "channels": 70, "latent": 33, "out": 50},
    "k=8": {"tokens": 130, "heads": 4, "num_keys": 64, "topk": 8, "channels": 32, "latent": 32, "out": 32},
    "k=32": {"tokens": 130, "heads": 4, "num_keys": 256, "topk": 32, "channels": 128, "latent": 64, "out": 128},
    "k=64": {"tokens": 66, "heads": 2, "num_keys": 200, "topk": 64, "channels": 256, "latent": 100, "out": 256},
    "k=n": {"tokens": 66, "heads": 2, "num_keys": 16, "topk": 16, "channels": 64, "latent": 64, "out": 64},
    "many keys": {"tokens": 66, "heads": 2, "num_keys": 1100, "topk": 16, "channels": 64, "latent": 64, "out": 64},
    "decode": PAPER | {"tokens": 1, "heads": 8},  # full and block have a bank per head: in float64 1 GB
}


def draw(*, tokens, heads, num_keys, topk, channels, latent, out, variant="hive", dtype=torch.bfloat16, gap=1e-4):
    """``[query, row_keys, col_keys, values, head_proj]`` on the GPU.

    Scores K and K + 1 of every query differ by ``gap``, above fp32 rounding (about 1e-5 for 128 products), so that all
    precisions of the same inputs select alike.
    """
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    keys = [normal(heads, num_keys, channels // 2) for _ in range(2)]
    slots = num_keys**2
    values = normal(*{"hive": (slots, latent), "full": (heads, slots, out), "block": (slots, heads * out)}[variant])
    proj = normal(heads, latent, out) if variant == "hive" else None
    query = normal(tokens, heads, channels)
    while gap and topk < num_keys:
        scores = reference.select_slots(query.double(), *(k.double() for k in keys), topk=topk + 1)[1]
        close = (scores[..., topk - 1] - scores[..., topk]) < gap  # [T, H]
        if not close.any():
            break
        query[close] = normal(int(close.sum()), channels)
    return [query, *keys, values, proj]


def run(function, inputs, **settings):
    """Output and all gradients, by name."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves, **settings)
    grad_out = torch.randn(out.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda").to(out.dtype)
    given = {name: leaf for name, leaf in zip(NAMES, leaves) if leaf is not None}
    return {"out": out.detach(), **dict(zip(given, torch.autograd.grad(out, list(given.values()), grad_out)))}


def triton(*tensors, **settings):
    return head_wise_memory(*tensors, backend="triton", **settings)


def assert_parity(function, inputs, **settings):
    """Error against float64 at most twice that of plain torch at the same precision, plus four units in the last place."""
    exact = run(reference.head_wise_memory, [None if t is None else t.double() for t in inputs], **settings)
    plain = run(reference.head_wise_memory, inputs, **settings)
    found = run(function, inputs, **settings)
    for name, truth in exact.items():
        allowed = 2 * (plain[name].double() - truth).abs().max()
        allowed += 4 * torch.finfo(inputs[0].dtype).eps * truth.abs().max()
        error = (found[name].double() - truth).abs().max()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
        assert truth.abs().max() > 0


@pytest.fixture(autouse=True)
def full_precision():
    """Plain torch in fp32 is the yardstick, so it may not use TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_parity(shape, variant, dtype):
    settings = SHAPES[shape]
    assert_parity(triton, draw(**settings, variant=variant, dtype=dtype), topk=settings["topk"], variant=variant)


@pytest.mark.parametrize("activation", ["sigmoid", "relu"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_parity_of_activations(variant, activation):
    inputs = draw(**SHAPES["odd"], variant=variant)
    assert_parity(triton, inputs, topk=9, variant=variant, score_activation=activation)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parity_of_atomics(variant):
    def atomics(*tensors, **settings):
        return triton(*tensors, deterministic=False, **settings)

    assert_parity(atomics, draw(**SHAPES["odd"], variant=variant), topk=9, variant=variant)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_keys", [512, 1024, 2048])
def test_selection_is_exact(num_keys, dtype):
    """The slots of all of 8192 * 8 queries are as good as float64's best, up to the rounding of 32 products."""
    from megatron_midus.ops.triton.function import select_slots

    query, rows, cols, *_ = draw(**PAPER | {"heads": 8, "num_keys": num_keys, "latent": 1}, dtype=dtype, gap=0)
    indices, _ = select_slots(query, rows, cols, topk=16)
    assert indices.sort(-1).values.diff(dim=-1).gt(0).all() and indices.min() >= 0 and indices.max() < num_keys**2
    for head in range(8):
        row_query, col_query = query[:, head].double().chunk(2, -1)
        row_scores, col_scores = row_query @ rows[head].double().T, col_query @ cols[head].double().T
        chosen = indices[:, head].long()
        found = row_scores.gather(1, chosen // num_keys) + col_scores.gather(1, chosen % num_keys)
        best = row_scores.topk(16).values[:, :, None] + col_scores.topk(16).values[:, None, :]
        expected = best.flatten(1).topk(16).values
        tolerance = 32 * torch.finfo(torch.float32).eps * float(expected.abs().max())
        torch.testing.assert_close(found.sort(-1, descending=True).values, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("variant", VARIANTS)
def test_skewed_usage_is_repeatable_and_right(variant):
    """Every token reads the same slots: thousands of terms per row, in the same order every time."""
    inputs = draw(**SHAPES["odd"] | {"tokens": 1}, variant=variant)
    inputs[0] = inputs[0].expand(20001, -1, -1).contiguous()
    first, second = (run(triton, inputs, topk=9, variant=variant) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert_parity(triton, inputs, topk=9, variant=variant)


def test_a_bad_query_stays_alone():
    inputs = draw(**SHAPES["odd"])
    clean = run(triton, inputs, topk=9)
    for bad in (torch.nan, torch.inf, -torch.inf):
        inputs[0][5, 1, 2] = bad
        found = run(triton, inputs, topk=9)
        others = torch.arange(333, device="cuda") != 5
        assert found["out"][5, 1].isnan().any()
        assert torch.equal(found["out"][others], clean["out"][others])
        assert torch.equal(found["query"][others], clean["query"][others])


def test_a_bad_key_spoils_its_own_head_alone():
    inputs = draw(**SHAPES["odd"])
    clean = run(triton, inputs, topk=9)
    inputs[1][1, 40, 0] = torch.nan
    found = run(triton, inputs, topk=9)
    assert found["out"][:, 1].isnan().all() and torch.equal(found["out"][:, ::2], clean["out"][:, ::2])


def test_ties():
    inputs = draw(**SHAPES["odd"])
    inputs[0].zero_()
    first, second = (run(triton, inputs, topk=9) for _ in range(2))
    assert all(value.isfinite().all() and torch.equal(value, second[name]) for name, value in first.items())


def test_65536_tokens():
    inputs = draw(**PAPER | {"tokens": 65536}, gap=0)
    whole = triton(*inputs, topk=16)
    for begin in (0, 30000, 65500):
        part = triton(inputs[0][begin : begin + 36], *inputs[1:], topk=16)
        assert torch.equal(whole[begin : begin + 36], part)


def test_memory_kept_for_the_backward_pass():
    """At most 70 MB a layer at the paper's shape, besides the query, which is the attention's output."""
    inputs = [t.requires_grad_() for t in draw(**PAPER, gap=0)]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = triton(*inputs, topk=16)
    kept = torch.cuda.memory_allocated() - before - out.numel() * out.element_size()
    assert kept <= 70e6, f"{kept / 1e6:.1f} MB"


@pytest.mark.parametrize("variant", ["hive", "block"])
def test_two_steps_over_columns_equal_the_whole(variant):
    """What ranks compute that hold a part of the columns of a bank each."""

    def two_steps(query, rows, cols, values, proj, *, topk, variant):
        index, weights = weigh_slots(query, rows, cols, topk=topk, backend="triton")
        bags = len(query) * (1 if variant == "block" else query.shape[1])
        entries = index.view(bags, -1), weights.view(bags, -1)
        found = torch.cat([aggregate_values(v, *entries, backend="triton") for v in values.tensor_split(2, 1)], 1)
        if variant == "block":
            return found[:, None].to(query.dtype)
        return torch.einsum("thl,hlo->tho", found.view(*query.shape[:2], -1).to(proj.dtype), proj)

    assert_parity(two_steps, draw(**SHAPES["odd"], variant=variant), topk=9, variant=variant)


def test_auto_takes_triton():
    inputs = draw(**SHAPES["odd"])
    assert choose_backend("auto", *inputs, topk=9, variant="hive") == "triton"
    assert torch.equal(head_wise_memory(*inputs, topk=9), triton(*inputs, topk=9))
