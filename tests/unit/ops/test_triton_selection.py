"""The fused retrieval finds exactly the K best of all N * N slots, with keys of 32 and of 64 bits."""

import pytest
import torch

pytest.importorskip("triton")

from megatron_midus.ops.triton import selection

NARROW, WIDE = False, True


@pytest.fixture(params=[NARROW, WIDE], ids=["narrow", "wide"])
def select(request, device):
    def run(*tensors, topk, activation="none"):
        moved = [t.to(device) for t in tensors]
        indices, weights = selection.select(*moved, topk=topk, activation=activation, wide=request.param)
        return indices.cpu(), weights.cpu()

    run.wide = request.param
    return run


def draw(tokens, heads, num_keys, channels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, heads, channels), *[(heads, num_keys, channels // 2)] * 2]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def check(select, slot_scores, inputs, topk):
    """Slots are valid, and as good as the best up to the rounding of scores; scores are right and best first."""
    indices, scores = select(*inputs, topk=topk)
    num_keys = inputs[1].shape[1]
    assert indices.dtype == torch.int32 and indices.min() >= 0 and indices.max() < num_keys**2
    assert indices.sort(-1).values.diff(dim=-1).gt(0).all(), "a slot was selected twice"
    everything = slot_scores(*(t.double() for t in inputs))
    expected = everything.topk(topk, dim=-1).values
    # A score sums D products in fp32, and a narrow key's step is 2^-22 of the spread of scores at most: D + 4 units in
    # the last place of the largest score.
    tolerance = (inputs[0].shape[-1] + 4) * torch.finfo(torch.float32).eps * float(everything.abs().max())
    torch.testing.assert_close(everything.gather(-1, indices.long()), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=tolerance)
    assert scores.diff(dim=-1).le(tolerance).all(), "not best first"


@pytest.mark.parametrize(
    "tokens, heads, num_keys, topk, channels",
    [
        (40, 3, 100, 9, 6),
        (65, 1, 100, 4, 70),  # a second block of one token; 35 channels a half
        (1, 2, 8, 8, 32),  # decode, k = n
        (17, 1, 33, 1, 2),
        (3, 1, 1, 1, 4),
        (5, 1, 200, 32, 10),
        (10, 2, 70, 64, 256),
        (9, 2, 1024, 16, 64),
        (9, 2, 512, 16, 128),
    ],
)
def test_the_best_of_all_slots(select, slot_scores, tokens, heads, num_keys, topk, channels):
    check(select, slot_scores, draw(tokens, heads, num_keys, channels), topk)


def test_exact_on_integers_with_ties(select, slot_scores):
    """Small integers have exact scores and many ties: the scores must be those of brute force, bit by bit."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(40, 2, 6), *[(2, 100, 3)] * 2]
    inputs = [torch.randint(-5, 6, shape, generator=generator).float() for shape in shapes]
    indices, scores = select(*inputs, topk=16)
    everything = slot_scores(*inputs)
    expected = everything.topk(16, dim=-1).values
    assert torch.equal(everything.gather(-1, indices.long()), expected)
    assert indices.sort(-1).values.diff(dim=-1).gt(0).all()
    # A narrow key keeps a score to half a step.
    torch.testing.assert_close(scores, expected, rtol=0, atol=0 if select.wide else 150 * 2.0**-23)


def test_one_score_far_below_costs_no_precision(select, slot_scores):
    """The bound that narrow ranks count from is near the K-th best, wherever the worst is."""
    query, rows, cols = draw(20, 1, 100, 6)
    rows[:, 7] = -1e6 * query[0, 0, :3]
    check(select, slot_scores, [query[:1], rows, cols], 9)
    indices, scores = select(query[:1], rows, cols, topk=9)
    everything = slot_scores(query[:1].double(), rows.double(), cols.double())
    torch.testing.assert_close(scores.double(), everything.topk(9, dim=-1).values, rtol=0, atol=1e-5)
    assert not (indices // 100 == 7).any()


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e15])
def test_scores_of_any_size(select, slot_scores, scale):
    query, rows, cols = draw(20, 1, 50, 6)
    check(select, slot_scores, [query * scale, rows, cols], 9)


def test_all_scores_negative(select, slot_scores):
    query, rows, cols = draw(20, 2, 50, 6)
    check(select, slot_scores, [query.abs() + 0.1, -rows.abs() - 0.1, -cols.abs() - 0.1], 9)


def test_ties_take_the_lowest_positions(select):
    _, rows, cols = draw(1, 2, 50, 6)
    indices, scores = select(torch.zeros(3, 2, 6), rows, cols, topk=5)
    assert torch.equal(indices, torch.arange(5, dtype=torch.int32).expand(3, 2, 5)) and not scores.any()


@pytest.mark.parametrize("sign", [1, -1])
def test_nan_of_either_sign_is_selected(select, sign):
    """Damage must not hide. Wide keys put it first, as torch.topk does; narrow ones spoil all scores of the token."""
    query, rows, cols = draw(5, 2, 50, 6)
    rows[1, 40, 0] = torch.nan
    if sign < 0:
        rows = torch.where(rows.isnan(), -rows, rows)
    indices, scores = select(query, rows, cols, topk=4)
    assert scores[:, 1].isnan().all() and not scores[:, 0].isnan().any()
    assert indices.sort(-1).values.diff(dim=-1).gt(0).all() and indices.max() < 2500
    assert indices.min() >= 0 and (not select.wide or (indices[:, 1] // 50 == 40).all())


def test_minus_infinity_is_not_selected(select, slot_scores):
    query, rows, cols = (t.abs() for t in draw(5, 1, 50, 6))
    rows[0, ::3] = -torch.inf
    indices, scores = select(query, rows, cols, topk=9)
    assert scores.isfinite().all() and not (indices // 50 % 3 == 0).any()
    expected = slot_scores(query.double(), rows.double(), cols.double()).topk(9, dim=-1).values
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "relu"])
def test_weights(select, activation):
    from megatron_midus.ops.reference import activate_scores

    inputs = draw(20, 2, 50, 6)
    indices, scores = select(*inputs, topk=5)
    again, weights = select(*inputs, topk=5, activation=activation)
    assert torch.equal(indices, again)
    torch.testing.assert_close(weights, activate_scores(scores, activation), rtol=1e-6, atol=1e-7)


def test_every_element_is_written(select, poisoned_memory):
    indices, scores = select(*draw(67, 2, 50, 6), topk=5)
    assert scores.isfinite().all() and indices.min() >= 0
