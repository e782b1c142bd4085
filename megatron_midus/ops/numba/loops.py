"""The loops of backend "numba", compiled at their first use for the CPU that runs them and kept on disk after that.

Inner loops run over `lanes` or over channels, side by side in memory, and hold no branch, so that LLVM makes vector
instructions of them. Indices are unsigned: numba reads a negative one from the end, which costs a comparison each time.
Shapes: R rows of scores (tokens of one head), N sub-keys per half, K top-k, B bags of J entries, W width of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy

LANES = 64  # rows that are sorted side by side
INFINITY = numpy.float32(numpy.inf)
ZERO = numpy.float32(0)


def _compiled(function: Callable) -> Any:
    # Sums in any order, but infinities and NaN as they are.
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither beside this file nor in the user's cache can anything be written
        return numba.njit(**options)(function)


# -- sorting networks --------------------------------------------------------------------------------------------------
# Comparators are pairs of places, int32 [C, 2]; the greater of two elements goes to the first place of a pair.
def sorting_network(size: int) -> numpy.ndarray:
    """Sorts ``size`` elements, a power of two (Batcher 1968, odd-even merge sort)."""
    comparators = []
    run = 1
    while run < size:
        step = run
        while step:
            for begin in range(step % run, size - step, 2 * step):
                for low in range(begin, begin + min(step, size - begin - step)):
                    if low // (2 * run) == (low + step) // (2 * run):
                        comparators.append((low, low + step))
            step //= 2
        run *= 2
    return _as_array(comparators)


def selection_network(size: int, width: int) -> numpy.ndarray:
    """Sorts the best ``width`` of ``size`` elements to the front: a power of two, and a multiple of it."""
    runs: list[list[int | None]] = []
    comparators = []
    for begin in range(0, size, width):
        comparators += [(begin + high, begin + low) for high, low in sorting_network(width).tolist()]
        runs.append(list(range(begin, begin + width)))
    while len(runs) > 1:
        runs = [_merge(first, second, width, comparators) for first, second in zip(runs[::2], runs[1::2])] + (
            runs[-1:] if len(runs) % 2 else []
        )
    return _as_array(comparators)


def pairs_network(topk: int) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """The best K of all sums of one of K sorted rows and one of K sorted columns.

    Row rank i and column rank j can be among them only if ``(i + 1) * (j + 1) <= K``: so many sums are at least as great.

    Returns:
        Ranks of rows and columns ``int32 [P, 2]``, comparators of these P pairs, and places of the best K ``int32 [K]``.
    """
    pairs: list[tuple[int, int]] = []
    runs: list[list[int]] = []
    for row in range(topk):
        columns = topk // (row + 1)
        places = list(range(len(pairs), len(pairs) + columns))
        pairs += [(row, column) for column in range(columns)]
        if columns == 1 and row > topk // 2:
            runs[-1] += places  # rows with their first column alone are sorted among themselves
        else:
            runs.append(places)
    width = 1 << (topk - 1).bit_length()
    comparators: list[tuple[int, int]] = []
    runs.sort(key=len)
    while len(runs) > 1:
        runs = sorted([*runs[2:], _merge(runs[0], runs[1], width, comparators)], key=len)
    return _as_array(pairs), _as_array(comparators), numpy.array(runs[0][:topk], numpy.int32)


def _merge(first: list, second: list, width: int, comparators: list) -> list:
    """Merges two sorted runs, places best first, and drops what comes after the first ``width``, a power of two.

    One run before the other upside down is bitonic. Missing elements, ``None``, are less than all others.
    """
    length = 1 << (max(len(first), len(second)) - 1).bit_length()
    first, second = ([*run, *[None] * (length - len(run))] for run in (first, second))
    places = first + second[::-1]
    step = length
    while step:
        for high in range(len(places)):
            if not high & step:
                _compare(places, high, high + step, comparators)
        places = places[:width]
        step //= 2
    return [place for place in places if place is not None]


def _compare(places: list, high: int, low: int, comparators: list) -> None:
    if places[high] is None:
        places[high], places[low] = places[low], None
    elif places[low] is not None:
        comparators.append((places[high], places[low]))


def _as_array(pairs: list) -> numpy.ndarray:
    return numpy.array(pairs, numpy.int32).reshape(-1, 2)


# -- selection -------------------------------------------------------------------------------------------------------
@_compiled
def select_slots(row_scores_RN, col_scores_RN, is_clean_R, topk, size, network, pairs, index_RK, scores_RK):
    """The best ``topk`` sums of a row score and a column score, best first, and their slots.

    ``network`` brings the best K of ``size`` elements to the front, ``pairs`` is ``pairs_network(topk)``. Rows that are not
    clean may hold NaN, which counts as the greatest score, as in ``torch.topk``.
    """
    ranks, pair_network, places = pairs
    rows, columns = row_scores_RN.shape
    dtype = row_scores_RN.dtype
    maxima = numpy.empty((LANES, size), dtype)
    sorted_maxima = numpy.empty((size, LANES), dtype)
    groups = numpy.empty(size + 1, numpy.uint32)
    room = max(columns, len(ranks)) + 1
    scores, found = numpy.empty(room, dtype), numpy.empty(room, numpy.int32)
    row_best, row_column = numpy.empty((size, LANES), dtype), numpy.empty((size, LANES), numpy.int32)
    col_best, col_column = numpy.empty((size, LANES), dtype), numpy.empty((size, LANES), numpy.int32)
    sums, slots = numpy.empty((len(ranks), LANES), dtype), numpy.empty((len(ranks), LANES), numpy.int32)
    for begin in range(0, rows, LANES):
        lanes = min(LANES, rows - begin)
        _best_columns(
            row_scores_RN, is_clean_R, begin, lanes, topk, network, maxima, sorted_maxima, groups, scores, found,
            row_best, row_column,
        )  # fmt: skip
        _best_columns(
            col_scores_RN, is_clean_R, begin, lanes, topk, network, maxima, sorted_maxima, groups, scores, found,
            col_best, col_column,
        )  # fmt: skip
        for pair in range(len(ranks)):
            row, col = numba.uint32(ranks[pair, 0]), numba.uint32(ranks[pair, 1])
            for lane in range(lanes):
                sums[pair, lane] = row_best[row, lane] + col_best[col, lane]
                slots[pair, lane] = row_column[row, lane] * columns + col_column[col, lane]
        _sort_pairs(sums, slots, pair_network, lanes)
        for k in range(topk):
            place = numba.uint32(places[k])
            for lane in range(lanes):
                index_RK[begin + lane, k] = slots[place, lane]
                scores_RK[begin + lane, k] = sums[place, lane]
        for lane in range(lanes):
            if not is_clean_R[begin + lane]:  # the network does not move NaN
                for pair in range(len(ranks)):
                    scores[pair] = sums[pair, lane]
                    found[pair] = slots[pair, lane]
                _insert(scores, found, len(ranks), topk, lane, row_best, row_column)
                for k in range(topk):
                    index_RK[begin + lane, k] = row_column[k, lane]
                    scores_RK[begin + lane, k] = row_best[k, lane]


@_compiled
def _best_columns(
    scores_RN, is_clean_R, begin, lanes, topk, network, maxima, sorted_maxima, groups, scores, found, best, column
):
    """Leaves the best K columns of row ``begin + lane`` in ``best[:K, lane]`` and ``column[:K, lane]``.

    Few columns are sorted whole. Many are split into groups: the K-th best of the groups' maxima is a bound that at least K
    columns reach, and few more do: those are sorted.
    """
    columns = scores_RN.shape[1]
    size = len(best)
    per_group = columns // size if columns > size else 0
    if per_group > 0:
        _maxima_of_groups(scores_RN, begin, lanes, per_group, maxima, sorted_maxima)
        _sort_values(sorted_maxima, network, lanes)
    for rank in range(size):
        for lane in range(lanes):
            best[rank, lane] = -INFINITY
            column[rank, lane] = 0
    if per_group == 0:
        for c in range(columns):
            for lane in range(lanes):
                column[c, lane] = c
    for lane in range(lanes):
        row = begin + lane
        if per_group == 0 and is_clean_R[row]:
            for c in range(columns):
                best[c, lane] = scores_RN[row, c]
            continue
        if is_clean_R[row]:
            bound = sorted_maxima[topk - 1, lane]
            count = _columns_above(scores_RN, row, per_group, maxima, lane, bound, groups, scores, found)
        else:
            count = numba.uint32(columns)
            for c in range(columns):
                scores[c] = scores_RN[row, c]
                found[c] = c
        if count <= size and is_clean_R[row]:
            for i in range(count):
                best[i, lane] = scores[i]
                column[i, lane] = found[i]
        else:  # ties, or a few rows whose scores are very uneven
            _insert(scores, found, count, topk, lane, best, column)
    _sort_pairs(best, column, network, lanes)


@_compiled
def _maxima_of_groups(scores_RN, begin, lanes, per_group, maxima, sorted_maxima):
    """Column c belongs to group c % size; the last columns, fewer than groups, belong to none."""
    size = maxima.shape[1]
    for lane in range(lanes):
        row = begin + lane
        for group in range(size):
            maxima[lane, group] = scores_RN[row, group]
        for first in range(size, per_group * size, size):
            for group in range(size):
                before = maxima[lane, group]
                score = scores_RN[row, first + group]
                maxima[lane, group] = score if score > before else before
        for group in range(size):
            sorted_maxima[group, lane] = maxima[lane, group]


@_compiled
def _columns_above(scores_RN, row, per_group, maxima, lane, bound, groups, scores, found):
    """The scores that reach ``bound`` and their columns; how many there are."""
    size = maxima.shape[1]
    # Every candidate is written and the next one overwrites it unless it counts: no branch to be guessed wrongly.
    num_groups = numba.uint32(0)
    for group in range(size):
        groups[num_groups] = group
        num_groups += numba.uint32(maxima[lane, group] >= bound)
    count = numba.uint32(0)
    for i in range(num_groups):
        for c in range(groups[i], per_group * size, size):
            score = scores_RN[row, c]
            scores[count] = score
            found[count] = c
            count += numba.uint32(score >= bound)
    for c in range(per_group * size, scores_RN.shape[1]):
        score = scores_RN[row, c]
        scores[count] = score
        found[count] = c
        count += numba.uint32(score >= bound)
    return count


@_compiled
def _insert(scores, found, count, topk, lane, best, column):
    """Keeps the best K of ``scores[:count]`` in order; NaN is the greatest."""
    kept = 0
    for i in range(count):
        score = scores[i]
        place = kept if kept < topk else topk - 1
        if kept == topk and not _is_greater(score, best[place, lane]):
            continue
        while place > 0 and _is_greater(score, best[place - 1, lane]):
            best[place, lane] = best[place - 1, lane]
            column[place, lane] = column[place - 1, lane]
            place -= 1
        best[place, lane] = score
        column[place, lane] = found[i]
        kept = min(kept + 1, topk)


@_compiled
def _is_greater(left, right):
    return left > right or (left != left and right == right)


@_compiled
def _sort_values(values, network, lanes):
    for comparator in range(len(network)):
        high, low = numba.uint32(network[comparator, 0]), numba.uint32(network[comparator, 1])
        for lane in range(lanes):
            x, y = values[high, lane], values[low, lane]
            values[high, lane] = y if y > x else x
            values[low, lane] = x if y > x else y


@_compiled
def _sort_pairs(values, labels, network, lanes):
    for comparator in range(len(network)):
        high, low = numba.uint32(network[comparator, 0]), numba.uint32(network[comparator, 1])
        for lane in range(lanes):
            x, y = values[high, lane], values[low, lane]
            a, b = labels[high, lane], labels[low, lane]
            values[high, lane] = y if y > x else x
            values[low, lane] = x if y > x else y
            labels[high, lane] = b if y > x else a
            labels[low, lane] = a if y > x else b


# -- values ----------------------------------------------------------------------------------------------------------
@_compiled
def row_products(bank, index_BJ, rows_BW, out_BJ):
    """``out[b, j] = <rows[b], bank[index[b, j]]>``."""
    bags, entries = index_BJ.shape
    width = bank.shape[1]
    whole = entries - entries % 4
    for b in range(bags):
        for j in range(0, whole, 4):  # four rows of the bank are on their way at a time
            slot_0, slot_1 = numba.uint64(index_BJ[b, j]), numba.uint64(index_BJ[b, j + 1])
            slot_2, slot_3 = numba.uint64(index_BJ[b, j + 2]), numba.uint64(index_BJ[b, j + 3])
            sum_0 = sum_1 = sum_2 = sum_3 = ZERO
            for w in range(width):
                element = rows_BW[b, w]
                sum_0 += element * bank[slot_0, w]
                sum_1 += element * bank[slot_1, w]
                sum_2 += element * bank[slot_2, w]
                sum_3 += element * bank[slot_3, w]
            out_BJ[b, j], out_BJ[b, j + 1], out_BJ[b, j + 2], out_BJ[b, j + 3] = sum_0, sum_1, sum_2, sum_3
        for j in range(whole, entries):
            slot = numba.uint64(index_BJ[b, j])
            product = ZERO
            for w in range(width):
                product += rows_BW[b, w] * bank[slot, w]
            out_BJ[b, j] = product


@_compiled
def scatter_rows(index_BJ, weights_BJ, rows_BW, begin, end, out):
    """``out[index[b, j]] += weights[b, j] * rows[b]`` for the slots from ``begin`` to ``end``, in the order of (b, j)."""
    bags, entries = index_BJ.shape
    width = rows_BW.shape[1]
    for b in range(bags):
        for j in range(entries):
            if begin <= index_BJ[b, j] < end:
                slot = numba.uint64(index_BJ[b, j])
                weight = weights_BJ[b, j]
                for w in range(width):
                    out[slot, w] += weight * rows_BW[b, w]


# -- sub-keys --------------------------------------------------------------------------------------------------------
@_compiled
def keys_backward(grad_scores_TK, index_TK, query_TD, row_keys, col_keys, grad_query_TD, grad_row_keys, grad_col_keys):
    """Gradients of one head's queries, written, and of its sub-keys ``[N, D/2]``, added.

    The K slots of a token lie on fewer rows and columns, whose gradients are added up before they meet a vector.
    """
    tokens, topk = index_TK.shape
    num_keys, width = row_keys.shape
    grads = numpy.empty((2, num_keys), grad_scores_TK.dtype)
    last_token = numpy.full((2, num_keys), -1, numpy.int64)
    used = numpy.empty((2, topk), numpy.uint32)
    for t in range(tokens):
        num_rows, num_cols = numba.uint32(0), numba.uint32(0)
        for k in range(topk):
            slot = numba.uint32(index_TK[t, k])
            row = slot // numba.uint32(num_keys)
            col = slot - row * numba.uint32(num_keys)
            num_rows = _add_up(grads[0], last_token[0], used[0], num_rows, row, t, grad_scores_TK[t, k])
            num_cols = _add_up(grads[1], last_token[1], used[1], num_cols, col, t, grad_scores_TK[t, k])
        for w in range(2 * width):
            grad_query_TD[t, w] = 0
        for i in range(num_rows):
            row = used[0, i]
            grad = grads[0, row]
            for w in range(width):
                grad_query_TD[t, w] += grad * row_keys[row, w]
                grad_row_keys[row, w] += grad * query_TD[t, w]
        for i in range(num_cols):
            col = used[1, i]
            grad = grads[1, col]
            for w in range(width):
                grad_query_TD[t, width + w] += grad * col_keys[col, w]
                grad_col_keys[col, w] += grad * query_TD[t, width + w]


@_compiled
def _add_up(grads, last_token, used, count, key, token, grad):
    if last_token[key] == token:
        grads[key] += grad
        return count
    last_token[key] = token
    grads[key] = grad
    used[count] = key
    return numba.uint32(count + 1)
