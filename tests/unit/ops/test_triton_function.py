"""Backend "triton" as a whole: parity with the definition, what it keeps, and when it refuses."""

import functools

import pytest
import torch

pytest.importorskip("triton")

from megatron_midus.ops import head_wise_memory, select_slots, unsupported_reason
from megatron_midus.ops.triton import function, selection

VARIANTS = ("hive", "full", "block")


@pytest.fixture
def memory(head_wise_memory_of):
    return head_wise_memory_of("triton")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "relu"])
def test_parity(memory, make_inputs, assert_within_plain_torch, variant, activation):
    inputs = make_inputs(tokens=23, variant=variant)
    assert_within_plain_torch(memory, inputs, topk=9, variant=variant, score_activation=activation)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "shape",
    [
        {"tokens": 1, "heads": 2, "num_keys": 12, "topk": 12, "channels": 32, "latent": 33, "out": 32},  # decode, k = n
        {"tokens": 66, "heads": 1, "num_keys": 20, "topk": 3, "channels": 70, "latent": 64, "out": 20},
        {"tokens": 5, "heads": 1, "num_keys": 40, "topk": 33, "channels": 128, "latent": 16, "out": 130, "gap": 0},
    ],
)
def test_parity_of_other_shapes(memory, make_inputs, assert_within_plain_torch, variant, shape):
    assert_within_plain_torch(memory, make_inputs(variant=variant, **shape), topk=shape["topk"], variant=variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parity_with_narrow_keys(memory, make_inputs, assert_within_plain_torch, monkeypatch, variant):
    """The keys of 16-bit inputs, on fp32 inputs, where their error would show."""
    select = selection.select
    monkeypatch.setattr(selection, "select", lambda *tensors, **settings: select(*tensors, wide=False, **settings))
    assert_within_plain_torch(memory, make_inputs(tokens=23, variant=variant), topk=9, variant=variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parity_in_half_precision(memory, make_inputs, assert_within_plain_torch, variant):
    inputs = make_inputs(tokens=9, variant=variant, dtype=torch.float16)
    assert_within_plain_torch(memory, inputs, topk=9, variant=variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_atomics(memory, make_inputs, assert_within_plain_torch, variant):
    inputs = make_inputs(tokens=9, variant=variant)
    function = functools.partial(memory, deterministic=False)
    assert_within_plain_torch(function, inputs, topk=9, variant=variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_uninitialised_is_read(memory, make_inputs, run_with_gradients, poisoned_memory, variant):
    inputs = make_inputs(tokens=67, num_keys=12, variant=variant)
    for name, value in run_with_gradients(memory, inputs, topk=5, variant=variant).items():
        assert value.isfinite().all(), name


def test_slots_are_those_of_the_torch_backend(make_inputs, device):
    inputs = [t.detach() for t in make_inputs(tokens=23)[:3]]
    indices, scores = function.select_slots(*(t.to(device) for t in inputs), topk=9)
    expected = select_slots(*inputs, topk=9)
    assert torch.equal(indices.cpu().sort(-1).values, expected[0].sort(-1).values)
    torch.testing.assert_close(scores.cpu(), expected[1], rtol=0, atol=2e-6)  # three products of a size of up to 5


def test_recompute_changes_no_bit(memory, make_inputs, run_with_gradients):
    """Under activation recompute the forward pass runs twice: without gradients kept, then with."""
    from torch.utils.checkpoint import checkpoint

    def recomputed(*tensors, **settings):
        return checkpoint(memory, *tensors, use_reentrant=False, **settings)

    inputs = make_inputs(tokens=9, gap=0)
    expected = run_with_gradients(memory, inputs, topk=9)
    for name, value in run_with_gradients(recomputed, inputs, topk=9).items():
        assert torch.equal(value, expected[name]), name
    with torch.no_grad():
        assert torch.equal(memory(*inputs, topk=9), expected["out"])


def test_selection_runs_once(memory, make_inputs, run_with_gradients, monkeypatch):
    calls = []
    select = selection.select
    monkeypatch.setattr(selection, "select", lambda *t, **s: calls.append(1) or select(*t, **s))
    run_with_gradients(memory, make_inputs(tokens=5), topk=9)
    assert calls == [1]


def test_what_is_kept_for_the_backward_pass(make_inputs, device):
    """Slots, weights and latent sums: T * H * (8 * K + L * bytes of a value); 67 MB at T=8192, H=32, K=16, L=64."""
    inputs = [t.detach().half().to(device).requires_grad_() for t in make_inputs(tokens=9)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        head_wise_memory(*inputs, topk=9, backend="triton")
    given = {t.untyped_storage().data_ptr() for t in inputs}
    extra = [t for t in kept if t.untyped_storage().data_ptr() not in given]
    assert sum(t.numel() * t.element_size() for t in extra) == 9 * 3 * (8 * 9 + 5 * 2)


@pytest.mark.parametrize("frozen", [(0, 1, 2), (3,), (0, 1, 2, 4), (1, 2, 3, 4)])
def test_frozen_inputs_get_no_gradient(make_inputs, device, frozen):
    inputs = [t.detach().to(device).requires_grad_(i not in frozen) for i, t in enumerate(make_inputs(tokens=5))]
    head_wise_memory(*inputs, topk=9, backend="triton").square().sum().backward()
    for i, tensor in enumerate(inputs):
        assert (tensor.grad is None) == (i in frozen) and (i in frozen or tensor.grad.any())


def test_inputs_that_are_not_contiguous(make_inputs, device):
    inputs = [t.detach().to(device) for t in make_inputs(tokens=9)]
    strided = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in inputs]
    expected = head_wise_memory(*inputs, topk=9, backend="triton")
    assert not any(t.is_contiguous() for t in strided)
    assert torch.equal(head_wise_memory(*strided, topk=9, backend="triton"), expected)


def test_a_query_narrower_than_its_keys(make_inputs, device):
    """An activation in half precision over parameters in fp32: computed as if the query were fp32."""
    inputs = [t.detach().to(device) for t in make_inputs(tokens=9)]
    half = inputs[0].half()
    found = head_wise_memory(half, *inputs[1:], topk=9, backend="triton")
    assert found.dtype == torch.float16
    assert torch.equal(found, head_wise_memory(half.float(), *inputs[1:], topk=9, backend="triton").half())


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_straight_into_a_buffer(make_inputs, device, variant):
    """Megatron's main_grad: what is there stays, the gradient is added, and autograd sees zeros."""
    inputs = [
        None if t is None else t.detach().to(device).requires_grad_() for t in make_inputs(tokens=9, variant=variant)
    ]
    settings = {"topk": 9, "variant": variant, "backend": "triton"}
    head_wise_memory(*inputs, **settings).square().sum().backward()
    expected = [None if t is None else t.grad for t in inputs]
    before = torch.randn_like(inputs[3])
    buffer = before.detach().clone()
    for tensor in inputs:
        if tensor is not None:
            tensor.grad = None
    head_wise_memory(*inputs, **settings, values_main_grad=buffer).square().sum().backward()
    torch.testing.assert_close(buffer, before + expected[3], rtol=1e-6, atol=1e-6)
    assert expected[3].any() and not inputs[3].grad.any()
    assert all(torch.equal(t.grad, e) for i, (t, e) in enumerate(zip(inputs, expected)) if t is not None and i != 3)


# -- refusals --------------------------------------------------------------------------------------------------------
def reason(query=None, others=(), **settings):
    query = torch.zeros(3, 2, 6) if query is None else query
    return unsupported_reason("triton", query, *others, **{"topk": 1, "variant": "hive"} | settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted only where there is no GPU")
@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"query": torch.zeros(3, 2, 6, dtype=torch.float64)}, "it computes in fp32, bf16 and fp16, not torch.float64"),
        ({"query": torch.zeros(3, 2, 6, dtype=torch.bfloat16)}, "interpreter computes bfloat16 wrongly"),
        ({"topk": 129}, "topk=129 is more than the 128"),
        ({"query": torch.zeros(1, 1, 514)}, "514 channels per head are more than the 512"),
        ({"others": (None, None, torch.zeros(4, 257), None)}, "latent size 257 is more than the 256"),
        ({"query": torch.zeros(3, 2, 6, device="meta")}, "its kernels need CUDA tensors and these are on meta"),
        ({"automatic": True}, "its kernels need CUDA tensors and these are on cpu"),
    ],
)
def test_refusals(arguments, words):
    assert reason() is None
    assert words in reason(**arguments)


def test_without_triton_or_interpreter(monkeypatch, make_inputs):
    inputs = make_inputs(tokens=5)
    monkeypatch.setattr(function, "_installed", lambda: False)
    if not torch.cuda.is_available():
        with pytest.raises(
            ValueError, match="'triton' cannot run: the package triton is not installed; run pip install"
        ):
            head_wise_memory(*inputs, topk=9, backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="'triton' cannot run: its kernels need CUDA tensors and these are on cpu"):
        head_wise_memory(*inputs, topk=9, backend="triton")


def test_importing_the_operators_imports_no_triton():
    import subprocess
    import sys

    program = "import sys, megatron_midus.ops, megatron_midus.ops.triton.function; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
