"""Backends "torch" and "numba" against the definition: outputs and every gradient, and what they may not hold."""

import importlib

import numpy
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_midus.ops import cpu, head_wise_memory, reference, selection
from megatron_midus.ops.dispatch import BACKENDS
from megatron_midus.ops.numba import function as numba_function

VARIANTS = ("hive", "full", "block")
ACTIVATIONS = ("softmax", "sigmoid", "relu")
NAMES = ("query", "row_keys", "col_keys", "values", "head_proj")

SHAPES = [
    {"tokens": 63, "heads": 3, "num_keys": 100, "topk": 16, "channels": 6, "latent": 5, "out": 7},
    {"tokens": 63, "heads": 3, "num_keys": 8, "topk": 8, "channels": 32, "latent": 16, "out": 8},
    {"tokens": 31, "heads": 2, "num_keys": 64, "topk": 8, "channels": 64, "latent": 32, "out": 64},
    {"tokens": 1, "heads": 3, "num_keys": 100, "topk": 9, "channels": 6, "latent": 5, "out": 7},
    {"tokens": 17, "heads": 1, "num_keys": 33, "topk": 1, "channels": 2, "latent": 1, "out": 1},
]


@pytest.fixture(params=["torch", "numba"])
def backend(request):
    """The module of a backend."""
    if request.param == "numba":
        pytest.importorskip("numba")
    return importlib.import_module(BACKENDS[request.param])


@pytest.fixture
def memory(backend):
    return backend.head_wise_memory


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(memory, make_inputs, variant, activation):
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
    settings = {"topk": 3, "variant": variant, "score_activation": activation}
    assert torch.autograd.gradcheck(lambda *x: memory(*x, **settings), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"T{s['tokens']}-H{s['heads']}-n{s['num_keys']}-k{s['topk']}")
def test_error_is_that_of_plain_torch(memory, make_inputs, assert_within_plain_torch, shape, variant, dtype):
    inputs = make_inputs(**shape, variant=variant, dtype=dtype)
    # relu has a gradient everywhere here, as softmax of one score has not.
    activation = "relu" if shape["topk"] == 1 else "softmax"
    settings = {"topk": shape["topk"], "variant": variant, "score_activation": activation}
    assert_within_plain_torch(memory, inputs, **settings)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("activation", ["sigmoid", "relu"])
def test_other_activations(memory, make_inputs, assert_within_plain_torch, variant, activation):
    inputs = make_inputs(variant=variant)
    assert_within_plain_torch(memory, inputs, topk=9, variant=variant, score_activation=activation)


@pytest.mark.parametrize("variant", VARIANTS)
def test_ragged_chunks_split_runs_and_threads(memory, make_inputs, assert_within_plain_torch, monkeypatch, variant):
    """Every loop runs more than once, its last round shorter, and runs of a hot slot are split twice over."""
    monkeypatch.setattr(selection, "CHUNK_SCORES", 3 * 20 * 10)
    monkeypatch.setattr(selection, "MIN_ROWS_PER_THREAD", 5)
    for module in (selection, numba_function):
        monkeypatch.setattr(module, "num_threads", lambda: 5)
    monkeypatch.setattr(numba_function, "CHUNK_SCORES", 70 * 20)
    monkeypatch.setattr(numba_function, "MIN_PER_THREAD", 5)
    monkeypatch.setattr(selection, "NUMPY_ROWS", 0)
    monkeypatch.setattr(selection, "MIN_PACKED", 0)
    monkeypatch.setattr(cpu, "CHUNK_SELECTIONS", 3 * 4 * 50)
    monkeypatch.setattr(cpu, "MAX_SEGMENT", 3)
    monkeypatch.setattr(cpu, "GATHERED_ELEMENTS", 100)
    inputs = make_inputs(tokens=163, num_keys=20, topk=4, variant=variant)
    assert_within_plain_torch(memory, inputs, topk=4, variant=variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("wanted", [(0,), (3,), (1,), (2,), (4,), (1, 2, 3, 4), (0, 3)], ids=str)
def test_frozen_inputs_get_no_gradient_and_change_none(memory, make_inputs, run_with_gradients, variant, wanted):
    inputs = make_inputs(variant=variant)
    wanted = [i for i in wanted if inputs[i] is not None]
    if not wanted:  # head_proj alone, which only hive has
        wanted = [3]
    everything = run_with_gradients(memory, inputs, topk=9, variant=variant)
    leaves = [None if t is None else t.detach().clone().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
    out = memory(*leaves, topk=9, variant=variant)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
    out.backward(grad_out)
    for i, leaf in enumerate(leaves):
        if i in wanted:
            assert torch.equal(leaf.grad, everything[NAMES[i]])
        else:
            assert leaf is None or leaf.grad is None


@pytest.mark.parametrize("variant", VARIANTS)
def test_strided_inputs(memory, make_inputs, run_with_gradients, variant):
    inputs = make_inputs(variant=variant)

    def strided(*leaves, **settings):
        turned = [None if t is None else t.transpose(0, 1).contiguous().transpose(0, 1) for t in leaves]
        assert not turned[0].is_contiguous() and not turned[3].is_contiguous()
        return memory(*turned, **settings)

    expected = run_with_gradients(memory, inputs, topk=9, variant=variant)
    for name, found in run_with_gradients(strided, inputs, topk=9, variant=variant).items():
        # BLAS may take another kernel for another stride, hence rounding: ten ulp of the largest element.
        tolerance = 10 * torch.finfo(torch.float32).eps * float(expected[name].abs().max())
        torch.testing.assert_close(found, expected[name], rtol=0, atol=tolerance)


def test_no_grad_saves_nothing(memory, make_inputs):
    inputs = make_inputs()
    with torch.no_grad():
        out = memory(*inputs, topk=9)
    assert not out.requires_grad
    assert torch.equal(out, memory(*inputs, topk=9).detach())


def test_mixed_precision_inputs(memory, make_inputs):
    """A bf16 query against fp32 parameters: computed in fp32, each gradient in the dtype of its input."""
    inputs = make_inputs(dtype=torch.bfloat16)
    mixed = [t.detach().to(torch.bfloat16 if i == 0 else torch.float32).requires_grad_() for i, t in enumerate(inputs)]
    out = memory(*mixed, topk=9)
    assert torch.equal(out, memory(*inputs, topk=9))
    out.sum().backward()
    assert [t.grad.dtype for t in mixed] == [torch.bfloat16] + 4 * [torch.float32]


def test_few_rows_of_a_narrow_bank_are_widened_alone(memory, make_inputs):
    """Decoding in bf16 must not convert the whole bank: same result, and nothing of the bank's size is made."""
    inputs = make_inputs(tokens=2, dtype=torch.bfloat16)
    log = _Allocations()
    with torch.no_grad(), log:
        found = memory(*inputs, topk=9)
    assert log.largest < inputs[3].numel() * 4
    assert torch.equal(found, memory(*[t.float() for t in inputs], topk=9).bfloat16())


class _Allocations(TorchDispatchMode):
    """Bytes of the largest tensor, and elements of the largest int64 tensor, that any operator returned."""

    def __init__(self):
        super().__init__()
        self.largest = self.largest_int64 = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                owned = tensor.untyped_storage().nbytes()
                self.largest = max(self.largest, owned)
                if tensor.dtype == torch.int64:
                    self.largest_int64 = max(self.largest_int64, owned // 8)
        return out


def test_peak_does_not_grow_with_what_is_looked_at(memory, monkeypatch):
    """No tensor of [T, H, N], of [T, H, K, L], nor an int64 one of more than the selections, forward or backward."""
    monkeypatch.setattr(selection, "CHUNK_SCORES", 1 << 17)  # as many as numba's loops
    monkeypatch.setattr(selection, "_KEPT", selection._Kept())
    tokens, heads, num_keys, topk, latent = 4096, 4, 128, 4, 16
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, heads, 16), *[(heads, num_keys, 8)] * 2, (num_keys**2, latent), (heads, latent, 4)]
    inputs = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    log = _Allocations()
    with log:
        memory(*inputs, topk=topk).sum().backward()
    selections = tokens * heads * topk
    held = max(8 * selection.CHUNK_SCORES, 4 * inputs[3].numel(), 8 * 2 * selections)
    assert log.largest <= held < min(tokens * heads * num_keys, selections * latent) * 4
    assert log.largest_int64 <= max(2 * selections, selection.CHUNK_SCORES)


def test_offsets_beyond_int32(backend):
    """A bank of more than 2**31 elements; numpy's zero pages are never touched, so it takes address space alone."""
    num_keys, width = 4096, 129
    values = torch.from_numpy(numpy.zeros((num_keys**2, width), numpy.float32))
    assert values.numel() > 2**31
    values[-1], values[-2] = 1.0, 2.0
    keys = torch.zeros(1, num_keys, 1)
    keys[0, -1], keys[0, -2] = 2.0, 1.0
    query = torch.tensor([[[1.0, 10.0]]])  # best slots: (n-1, n-1), then (n-2, n-1)
    with torch.no_grad():
        out = backend.head_wise_memory(query, keys, keys, values, torch.eye(width)[None], topk=1)
        assert torch.equal(out, torch.ones(1, 1, width))
        index = torch.tensor([[num_keys**2 - 1, num_keys**2 - 2, 0]], dtype=torch.int32)
        products = backend._row_products(values, index, torch.ones(1, width))
    assert torch.equal(products, torch.tensor([[width, 2.0 * width, 0.0]]))


def test_second_derivative_is_refused(memory, make_inputs):
    query, *others = make_inputs(tokens=2)
    (grad,) = torch.autograd.grad(memory(query, *others, topk=9).square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_gradient_checkpointing_repeats_the_selection(memory, make_inputs, run_with_gradients):
    inputs = make_inputs()

    def recomputed(*leaves, **settings):
        return torch.utils.checkpoint.checkpoint(lambda *x: memory(*x, **settings), *leaves, use_reentrant=False)

    expected = run_with_gradients(memory, inputs, topk=9)
    for name, found in run_with_gradients(recomputed, inputs, topk=9).items():
        assert torch.equal(found, expected[name])


def test_definition_is_untouched_by_the_backend(make_inputs):
    """The public function reaches this backend by name and by default on the CPU."""
    inputs = make_inputs()
    expected = cpu.head_wise_memory(*inputs, topk=9)
    assert torch.equal(head_wise_memory(*inputs, topk=9, backend="torch"), expected)
    assert torch.equal(head_wise_memory(*inputs, topk=9), expected)
    assert not torch.equal(reference.head_wise_memory(*inputs, topk=8), expected)
