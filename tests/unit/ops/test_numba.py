"""What backend "numba" alone has: its selection, its share of threads, when it is chosen. Parity: test_cpu, test_traps."""

import logging

import pytest
import torch

numba = pytest.importorskip("numba")
import numpy  # noqa: E402

from megatron_midus.ops import dispatch, head_wise_memory, reference, selection  # noqa: E402
from megatron_midus.ops.numba import function, loops  # noqa: E402


def swapped(elements: numpy.ndarray, comparators: numpy.ndarray) -> numpy.ndarray:
    """The greater of two elements goes to the first place of a comparator."""
    for high, low in comparators:
        pair = elements[[high, low]]
        elements[high], elements[low] = pair.max(0), pair.min(0)
    return elements


@pytest.mark.parametrize("size", [8, 16, 64, 256])
def test_sorting_network(size):
    """Zeros and ones in every order where they are few: what sorts them sorts everything (Knuth 5.3.4, theorem Z)."""
    generator = numpy.random.default_rng(0)
    if size <= 16:
        columns = ((numpy.arange(1 << size)[None] >> numpy.arange(size)[:, None]) & 1).astype(numpy.int8)
    else:
        columns = generator.integers(0, 2, (size, 5000)).astype(numpy.int8)
    columns = swapped(columns, loops.sorting_network(size))
    assert (columns[:-1] >= columns[1:]).all()


@pytest.mark.parametrize(("size", "width"), [(4, 4), (8, 4), (20, 4), (64, 8), (104, 8), (256, 128)])
def test_selection_network(size, width):
    scores = numpy.random.default_rng(0).integers(0, 9, (size, 999))
    best = numpy.sort(scores, 0)[::-1][:width]
    assert numpy.array_equal(swapped(scores, loops.selection_network(size, width))[:width], best)


@pytest.mark.parametrize("topk", [1, 2, 3, 5, 8, 9, 16, 33, 128])
def test_pairs_network(topk):
    """The best of all sums are among the pairs that it looks at."""
    generator = numpy.random.default_rng(0)
    rows, cols = (numpy.sort(generator.integers(0, 99, (topk, 200)), 0)[::-1] for _ in range(2))
    best = numpy.sort((rows[:, None] + cols).reshape(topk**2, -1), 0)[::-1][:topk]
    ranks, comparators, places = loops.pairs_network(topk)
    assert numpy.array_equal(swapped(rows[ranks[:, 0]] + cols[ranks[:, 1]], comparators)[places], best)


SIZES = [
    (1, 1),
    (5, 3),
    (7, 7),
    (8, 2),
    (33, 1),
    (40, 16),
    (63, 8),
    (64, 8),
    (100, 9),
    (256, 16),
    (300, 64),
    (128, 128),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("num_keys", "topk"), SIZES)
@pytest.mark.parametrize("scores", ["random", "few rows", "ties", "huge", "rising"])
def test_selection(num_keys, topk, scores, dtype):
    """The very scores of the definition, best first, at slots that have them; however they are spread over columns."""
    generator = torch.Generator().manual_seed(num_keys)
    tokens, heads, width = (1 if scores == "few rows" else 131), 2, 4
    # Small whole numbers: every sum is exact in any order.
    query, rows, cols = (
        torch.randint(-9, 10, shape, generator=generator).to(dtype)
        for shape in [(tokens, heads, 2 * width), (heads, num_keys, width), (heads, num_keys, width)]
    )
    if scores == "ties":
        query.sign_()
    if scores == "huge":  # infinite scores of some rows, from one channel alone: where two meet the order decides
        query[::3] *= torch.finfo(dtype).max / 100
        query[::3, :, 1:width] = query[::3, :, width + 1 :] = 0
        rows[:, :: max(2, num_keys // 5)] *= 1000
    if scores == "rising":  # the best columns stand side by side, hence in different groups, or in one
        rows, cols = rows.sort(1).values, cols.sort(1, descending=True).values
    index, found = function._select_slots(query, rows, cols, topk=topk, dtype=dtype)
    _, expected = reference.select_slots(query, rows, cols, topk=topk)
    expected = expected.transpose(0, 1)
    assert torch.equal(found, expected)
    assert index.dtype == torch.int32 and index.min() >= 0 and index.max() < num_keys**2
    assert all(len(set(slots)) == topk for slots in index.flatten(0, 1).tolist())
    assert expected.isinf().any() == (scores == "huge")
    if scores != "huge":
        row, col = (index // num_keys).long(), (index % num_keys).long()
        row_query, col_query = query.transpose(0, 1)[:, :, None].chunk(2, dim=-1)  # [H, T, 1, D/2]
        head = torch.arange(heads)[:, None, None]
        assert torch.equal(((rows[head, row] * row_query) + (cols[head, col] * col_query)).sum(-1), found)


@pytest.mark.parametrize("variant", ["hive", "full", "block"])
def test_threads_change_no_bit(make_inputs, run_with_gradients, monkeypatch, variant):
    """The order of every sum is that of the tokens, however many threads share the work."""
    monkeypatch.setattr(function, "MIN_PER_THREAD", 5)
    inputs = make_inputs(tokens=301, variant=variant)
    found = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(function, "num_threads", lambda threads=threads: threads)
        found.append(run_with_gradients(function.head_wise_memory, inputs, topk=9, variant=variant))
    for other in found[1:]:
        for name, tensor in found[0].items():
            assert torch.equal(tensor, other[name]), name


def many(tokens=2048) -> dict:
    draw = torch.Generator().manual_seed(0)
    shapes = [(tokens, 2, 6), (2, 9, 3), (2, 9, 3), (81, 4), (2, 4, 5)]
    names = ("query_THD", "row_keys_HND", "col_keys_HND", "values", "head_proj")
    return {name: torch.randn(shape, generator=draw) for name, shape in zip(names, shapes)} | {"topk": 3}


def test_chosen_where_it_is_worth_compiling(caplog):
    dispatch._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger=dispatch.__name__):
        head_wise_memory(**many())
        head_wise_memory(**many(tokens=2047))
    first, second = (record.getMessage() for record in caplog.records)
    assert "backend numba (" in first
    assert "backend torch (" in second and "not numba: it is compiled for 4096 look-ups and more at a time" in second


def test_what_it_cannot_do(monkeypatch):
    inputs = [torch.zeros(3, 2, 6), torch.zeros(2, 200, 3), torch.zeros(2, 200, 3)]
    assert function.unsupported_reason(*inputs, topk=128, variant="hive") is None
    assert "topk=129 is more than the 128" in function.unsupported_reason(*inputs, topk=129, variant="hive")
    assert "are on meta" in function.unsupported_reason(inputs[0].to("meta"), topk=1, variant="hive")
    monkeypatch.setattr(function, "_installed", lambda: False)
    with pytest.raises(
        ValueError, match="'numba' cannot run: the package numba is not installed; run pip install numba"
    ):
        head_wise_memory(**many(), backend="numba")
    expected = head_wise_memory(**many(), backend="torch")
    assert torch.equal(head_wise_memory(**many()), expected)


def test_nowhere_to_keep_compiled_code(monkeypatch):
    """In a read-only installation and a read-only home it is compiled anew in every process."""
    make = numba.njit

    def refuse(**options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available for file")
        return make(**options)

    monkeypatch.setattr(loops.numba, "njit", refuse)
    assert loops._compiled(lambda x: x + 1)(2) == 3


def test_its_threads_use_one_core_each(monkeypatch):
    seen = []
    monkeypatch.setattr(function, "num_threads", lambda: 2)
    function._share(lambda items: seen.append((torch.get_num_threads(), items)), [1, 2, 3], num_lookups=5000)
    assert sorted(seen) == [(1, [1, 3]), (1, [2])]
    assert selection.num_threads() == torch.get_num_threads()
