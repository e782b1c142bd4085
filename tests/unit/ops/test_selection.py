"""The fast selection is the exact top-k of all N * N slots, whichever way it takes."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from megatron_midus.ops import select_slots, selection


@pytest.fixture(params=["as it is", "torch", "simd sort", "parted rows", "topk", "threads", "small chunks"])
def way(request, monkeypatch):
    """Every path through the selection: few rows, packed sort of whole and of parted rows, torch.topk, several threads,
    ragged chunks."""
    if request.param == "as it is":  # few rows, in numpy
        return
    monkeypatch.setattr(selection, "NUMPY_ROWS", 0)
    if request.param == "torch":
        return
    monkeypatch.setattr(selection, "FEW_ROWS", 0)
    monkeypatch.setattr(selection, "MIN_PACKED", 0)
    monkeypatch.setattr(selection, "MIN_PARTED", 0 if request.param == "parted rows" else 1 << 30)
    if request.param == "topk":
        monkeypatch.setattr(selection, "SIMD_SORT", False)
    elif request.param == "threads":
        monkeypatch.setattr(selection, "MIN_ROWS_PER_THREAD", 5)
        monkeypatch.setattr(selection, "num_threads", lambda: 5)
    elif request.param == "small chunks":
        monkeypatch.setattr(selection, "CHUNK_SCORES", 1000)


SHAPES = [
    (63, 3, 100, 16, 6),
    (63, 3, 8, 8, 32),
    (17, 1, 33, 1, 2),
    (1, 2, 64, 32, 10),
    (5, 2, 1, 1, 4),
    (40, 2, 70, 64, 8),
]


@pytest.mark.parametrize("tokens, heads, num_keys, topk, channels", SHAPES)
def test_exact_on_integers_with_ties(way, slot_scores, tokens, heads, num_keys, topk, channels):
    """Small integers have exact scores and many ties: the scores must equal brute force bit by bit."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, heads, channels), *[(heads, num_keys, channels // 2)] * 2]
    query, rows, cols = (torch.randint(-5, 6, shape, generator=generator).float() for shape in shapes)
    index, scores = select_slots(query, rows, cols, topk=topk)
    everything = slot_scores(query, rows, cols)
    assert torch.equal(scores, everything.topk(topk, dim=-1).values)
    assert torch.equal(everything.gather(-1, index.long()), scores), "a slot has another score than was said"
    assert index.sort(-1).values.diff(dim=-1).gt(0).all(), "a slot was selected twice"
    assert index.dtype == torch.int32 and index.min() >= 0 and index.max() < num_keys**2


@pytest.mark.parametrize("tokens, heads, num_keys, topk, channels", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_slots_are_those_of_brute_force(way, make_inputs, slot_scores, tokens, heads, num_keys, topk, channels, dtype):
    inputs = make_inputs(tokens=tokens, heads=heads, num_keys=num_keys, topk=topk, channels=channels, dtype=dtype)
    query, rows, cols = (t.detach() for t in inputs[:3])
    index, scores = select_slots(query, rows, cols, topk=topk)
    expected = slot_scores(query.double(), rows.double(), cols.double()).topk(topk, dim=-1)
    assert torch.equal(index.sort(-1).values, expected.indices.int().sort(-1).values)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert scores.diff(dim=-1).le(0).all(), "not best first"
    # A score is a sum of `channels` products of size about 1: one ulp of its size for each.
    tolerance = channels * torch.finfo(scores.dtype).eps * float(expected.values.abs().max())
    torch.testing.assert_close(scores.double(), expected.values, rtol=0, atol=tolerance)


def test_pairs_are_the_only_candidates():
    """20, 50 and 119 of the K * K pairs are looked at for K = 8, 16 and 32, and each is one that can win."""
    for topk, count in ((1, 1), (8, 20), (16, 50), (32, 119)):
        first, second = selection._pairs(topk, torch.device("cpu"))
        assert len(first) == count
        assert ((first + 1) * (second + 1)).max() <= topk


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_scores_that_are_not_finite_keep_their_columns(way, bad):
    scores = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    scores[1, 3] = bad
    best, columns = selection.top_columns(scores, 9)
    assert torch.equal(columns.sort(1).values, torch.arange(9).expand(4, 9))
    torch.testing.assert_close(scores.gather(1, columns), best, rtol=0, atol=0, equal_nan=True)


def test_tiny_and_signed_zero_scores(way):
    """Denormals, both zeros and neighbours in the last place survive the packing."""
    one = torch.tensor(1.0)
    scores = torch.tensor([[1e-45, -1e-45, 0.0, -0.0, 1.0, -1.0, 3e38, -3e38, float(torch.nextafter(one, 2 * one))]])
    best, columns = selection.top_columns(scores, 9)
    assert torch.equal(best, scores.sort(descending=True).values)
    assert torch.equal(scores.gather(1, columns), best)


def test_scratch_that_began_in_inference_mode_serves_training_too(monkeypatch):
    """An evaluation is often what a thread does first: what it keeps must not be an inference tensor."""
    monkeypatch.setattr(selection, "NUMPY_ROWS", 0)
    query, keys = torch.randn(64, 4, 16), [torch.randn(4, 63, 8) for _ in range(2)]

    def twice():
        with torch.inference_mode():
            first = select_slots(query, *keys, topk=5)[0].clone()
        return first, select_slots(query, *keys, topk=5)[0]

    with ThreadPoolExecutor(1) as fresh:
        first, second = fresh.submit(twice).result()
    assert torch.equal(first, second)


def test_threads_leave_torchs_number_of_threads_alone(monkeypatch):
    """The threads of the selection use one core each; this thread, and those that begin later, keep what they had."""
    monkeypatch.setattr(selection, "num_threads", lambda: 3)
    monkeypatch.setattr(selection, "MIN_ROWS_PER_THREAD", 5)
    monkeypatch.setattr(selection, "NUMPY_ROWS", 0)
    before = torch.get_num_threads()
    seen = []
    monkeypatch.setattr(selection, "_best_slots", lambda *args: seen.append(torch.get_num_threads()) or (0, 0.0))
    torch.set_num_threads(2)
    try:
        with torch.no_grad():
            select_slots(torch.randn(50, 2, 4), torch.randn(2, 9, 2), torch.randn(2, 9, 2), topk=3)
        later = ThreadPoolExecutor(1).submit(torch.get_num_threads).result()
        assert (set(seen), torch.get_num_threads(), later) == ({1}, 2, 2)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 3e38])
def test_few_rows_with_a_score_that_is_not_finite(bad):
    """The short path hands them on: the other tokens select what they do without their neighbour."""
    generator = torch.Generator().manual_seed(0)
    query, rows, cols = (torch.randn(s, generator=generator) for s in ((5, 2, 6), (2, 9, 3), (2, 9, 3)))
    expected = select_slots(query, rows, cols, topk=4)
    query[2, 1] = bad
    found = select_slots(query, rows, cols, topk=4)
    others = [0, 1, 3, 4]
    assert torch.equal(found[0][others], expected[0][others])
    torch.testing.assert_close(found[1][others], expected[1][others], rtol=1e-6, atol=1e-6)
