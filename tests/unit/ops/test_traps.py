"""Numerical traps of product-key memories, for every backend that there is."""

import functools

import pytest
import torch

from megatron_midus.ops import reference, select_slots
from megatron_midus.ops.dispatch import BACKENDS

VARIANTS = ("hive", "full", "block")


@pytest.fixture(params=list(BACKENDS))
def memory(request, head_wise_memory_of):
    """``head_wise_memory`` of one backend."""
    if request.param == "numba":
        pytest.importorskip("numba")
    return head_wise_memory_of(request.param)


def fewer(tokens: int, memory) -> int:
    """Triton's kernels may be interpreted, a thousand times slower: a block of 64 tokens and a ragged end will do."""
    return min(tokens, 67) if memory.backend == "triton" else tokens


@pytest.fixture
def make_inputs(memory, make_inputs):
    """Fewer tokens where each costs more."""
    return functools.partial(make_inputs, tokens=9) if memory.backend == "triton" else make_inputs


def check_slots(index: torch.Tensor, num_keys: int) -> None:
    assert index.min() >= 0 and index.max() < num_keys**2
    assert index.sort(-1).values.diff(dim=-1).gt(0).all(), "a slot was selected twice"


@pytest.mark.parametrize("topk, num_keys", [(1, 100), (9, 100), (40, 40)])
def test_all_scores_tied(memory, make_inputs, topk, num_keys):
    """A query of zeros: any K slots will do, but K different ones, the same every time, with weights 1/K."""
    query, rows, cols, values, proj = make_inputs(tokens=5, num_keys=num_keys, topk=topk, gap=0)
    zero = torch.zeros_like(query)
    index, scores = select_slots(zero, rows, cols, topk=topk)
    check_slots(index, num_keys)
    assert torch.equal(index, select_slots(zero, rows, cols, topk=topk)[0])
    assert not scores.any()
    first = memory(zero, rows, cols, values, proj, topk=topk)
    assert first.isfinite().all()
    assert torch.equal(first, memory(zero, rows, cols, values, proj, topk=topk))


def test_duplicated_keys(memory, make_inputs):
    """Every sub-key three times: the nine copies of the best slot share the weight, and none is read twice."""
    query, rows, cols, values, proj = (t.detach() for t in make_inputs(num_keys=7, topk=1))
    rows, cols = rows.repeat(1, 3, 1), cols.repeat(1, 3, 1)
    values = torch.randn(21**2, 5, generator=torch.Generator().manual_seed(2))
    index, scores = select_slots(query, rows, cols, topk=9)
    check_slots(index, 21)
    # One matrix product may round equal columns differently: an ulp of a score of at most about 10.
    torch.testing.assert_close(scores, scores[..., :1].expand_as(scores), rtol=0, atol=2e-6)
    expected = torch.stack([values[index[:, h].long()].mean(1) @ proj[h] for h in range(3)], 1)
    torch.testing.assert_close(memory(query, rows, cols, values, proj, topk=9), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "relu"])
def test_all_scores_negative(memory, make_inputs, slot_scores, activation):
    """Padding or packing that lets a zero win over a negative score shows here."""
    inputs = make_inputs(gap=0)
    query, rows, cols = inputs[0].abs() + 0.1, -inputs[1].abs() - 0.1, -inputs[2].abs() - 0.1
    query, rows, cols = (t.detach().requires_grad_() for t in (query, rows, cols))
    _, scores = select_slots(query, rows, cols, topk=9)
    assert scores.max() < 0
    expected = slot_scores(query.double(), rows.double(), cols.double()).topk(9, dim=-1).values
    torch.testing.assert_close(scores.double(), expected.detach(), rtol=1e-6, atol=0)  # three products in fp32
    out = memory(query, rows, cols, *inputs[3:], topk=9, score_activation=activation)
    assert out.isfinite().all()
    assert bool(out.any()) == (activation != "relu")
    if activation == "relu":
        assert not any(grad.any() for grad in torch.autograd.grad(out.sum(), (query, rows, cols, inputs[3])))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_bad_query_stays_alone(memory, make_inputs, run_with_gradients, variant, bad):
    """One query that is not finite: every other token is bit-equal to the clean run, its gradient too."""
    inputs = make_inputs(variant=variant)
    clean = run_with_gradients(memory, inputs, topk=9, variant=variant)
    with torch.no_grad():
        inputs[0][5, 1, 2] = bad
    check_slots(select_slots(*inputs[:3], topk=9)[0], 100)
    found = run_with_gradients(memory, inputs, topk=9, variant=variant)
    others = torch.arange(len(inputs[0])) != 5
    assert torch.equal(found["out"][others], clean["out"][others])
    assert torch.equal(found["query"][others], clean["query"][others])
    bad_head = 0 if variant == "block" else 1
    assert found["out"][5, bad_head].isnan().any(), "the damage was hidden"


@pytest.mark.parametrize("variant", ["hive", "full"])
def test_a_bad_key_spoils_its_own_head_alone(memory, make_inputs, run_with_gradients, variant):
    inputs = make_inputs(variant=variant)
    clean = run_with_gradients(memory, inputs, topk=9, variant=variant)
    with torch.no_grad():
        inputs[1][1, 40, 0] = torch.nan
    index, _ = select_slots(*inputs[:3], topk=9)
    check_slots(index, 100)
    found = run_with_gradients(memory, inputs, topk=9, variant=variant)
    assert found["out"][:, 1].isnan().all()
    assert torch.equal(found["out"][:, ::2], clean["out"][:, ::2])
    assert torch.equal(found["query"][:, ::2], clean["query"][:, ::2])


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_token_reads_the_same_slots(memory, make_inputs, run_with_gradients, variant):
    """Collapsed usage: K rows get the gradient of all tokens. fp32 sums of 3001 * 3 terms stay close to float64."""
    inputs = make_inputs(tokens=1, variant=variant)
    inputs[0] = inputs[0].detach().expand(fewer(3001, memory), -1, -1)
    found = run_with_gradients(memory, inputs, topk=9, variant=variant)
    exact = run_with_gradients(
        reference.head_wise_memory, [None if t is None else t.double() for t in inputs], topk=9, variant=variant
    )
    for name, truth in exact.items():
        # Sums of about 10^4 terms of mixed sign: 100 ulp of the largest element is the square root of their number.
        tolerance = 100 * torch.finfo(torch.float32).eps * float(truth.abs().max())
        torch.testing.assert_close(found[name].double(), truth, rtol=0, atol=tolerance)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_are_equal_bit_by_bit(memory, make_inputs, run_with_gradients, variant, dtype):
    if memory.backend == "triton" and dtype == torch.bfloat16:
        dtype = torch.float16  # the interpreter has no bfloat16
    inputs = make_inputs(tokens=fewer(701, memory), num_keys=12, variant=variant, dtype=dtype)
    first = run_with_gradients(memory, inputs, topk=9, variant=variant)
    second = run_with_gradients(memory, inputs, topk=9, variant=variant)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_slots_nobody_read_get_exactly_zero(memory, make_inputs, run_with_gradients, variant):
    inputs = make_inputs(variant=variant)
    index, _ = select_slots(*inputs[:3], topk=9)
    found = run_with_gradients(memory, inputs, topk=9, variant=variant)
    touched = torch.zeros(3, 100**2, dtype=torch.bool)
    for head in range(3):
        touched[head, index[:, head].flatten().long()] = True
    moved = found["values"].ne(0).any(-1)
    assert torch.equal(moved, touched if variant == "full" else touched.any(0))
    for name, key in (("row_keys", index // 100), ("col_keys", index % 100)):
        counts = torch.zeros(len(index), 3, 100, dtype=torch.long)  # slots of a token and head, by sub-key
        counts.scatter_add_(2, key.long(), torch.ones_like(key, dtype=torch.long))
        moved = found[name].ne(0).any(-1)
        assert not moved[~counts.any(0)].any()
        # Where all K slots share a sub-key the softmax does not depend on its score: the gradient is rounding, or zero.
        assert moved[((counts > 0) & (counts < 9)).any(0)].all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tokens", [1, 2, 64, 65])
def test_any_number_of_tokens(memory, make_inputs, run_with_gradients, variant, tokens):
    """A token's output does not hang on how many there are (up to the rounding of another matrix shape)."""
    inputs = make_inputs(tokens=65, variant=variant)
    whole = memory(*inputs, topk=9, variant=variant)
    part = memory(inputs[0][:tokens], *inputs[1:], topk=9, variant=variant)
    torch.testing.assert_close(part, whole[:tokens], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_tokens(memory, make_inputs, variant):
    inputs = make_inputs(variant=variant)
    query = inputs[0][:0].detach().requires_grad_()
    out = memory(query, *inputs[1:], topk=9, variant=variant)
    assert out.shape == ((0, 1, 21) if variant == "block" else (0, 3, 7))
    out.sum().backward()
    assert query.grad.shape == query.shape
    for parameter in inputs[1:]:
        assert parameter is None or (parameter.grad.shape == parameter.shape and not parameter.grad.any())


def test_zero_values_give_zero_and_move_the_values_alone(memory, make_inputs, run_with_gradients):
    """The start of training: the block is the identity, and only the bank has a gradient."""
    inputs = make_inputs()
    with torch.no_grad():
        inputs[3].zero_()
    found = run_with_gradients(memory, inputs, topk=9)
    assert [name for name, value in found.items() if value.any()] == ["values"]


def test_autocast_does_not_apply(memory, make_inputs, run_with_gradients):
    inputs = make_inputs()

    def under_autocast(*leaves, **settings):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return memory(*leaves, **settings)

    expected = run_with_gradients(memory, inputs, topk=9)
    for name, found in run_with_gradients(under_autocast, inputs, topk=9).items():
        assert found.dtype == torch.float32 and torch.equal(found, expected[name]), name
