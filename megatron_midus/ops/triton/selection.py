"""Fused product-key retrieval: scores in tiles, exact running top-k in registers, merge of the halves, activation.

One program handles BLOCK_T tokens of one head. Scores never leave the registers; only K slots and weights are written.

A candidate is one unsigned integer, its *key*: rank of the score above, complement of the position below, so that keys
are distinct and the lower position wins a tie. The best K are taken by ``m += max(key - m)``: modulo 2^32 the keys below
m wrap round to the top, so the maximum is the greatest key below m, and neither masks nor writes are needed. Up to K = 16
with narrow keys sorting networks do it: a tile of scores is taken as K tensors that are sorted against each other, which
makes every column a sorted list; the lists of all tiles are merged, then those of all columns. Minima, maxima and bit
operations wait for the integer units, which are half as many as those for multiply-adds, so half of the comparators take
the lesser of two keys as their sum less the greater, and the keys themselves are made by multiply-adds.

* wide, 64 bits: the rank is the score's own 32 bits, ordered. Exact for any fp32 scores.
* narrow, 32 bits, a quarter of the work, for 16-bit inputs: the rank is the score's distance from a lower bound of the
  K-th best, in steps of 2^-23 (1024 sub-keys: 2^-22) of the way to the best. The bound: of K groups of scores take
  the best; K scores are no less than the least of these. So what ties is what fp32 sums of this size round away, far
  below what 16-bit queries and keys resolve.

Shapes: T tokens, H heads, D channels of a query, N sub-keys per half, K top-k (TOPK_PADDED: to a power of two).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_T = 64  # tokens of a program: the height of Hopper's matrix instructions
NARROW_KEYS = 1024  # up to here 22 bits are left for the rank in a narrow key

# In [2^23, 2^24) a float's mantissa is an integer: ranks are made by float arithmetic and their bits used as they are.
# No key is 0, which stands for "none". What is below the bound has the lowest rank, what is at the bound the next.
LOWEST = tl.constexpr(8388609.0)
BOUND = tl.constexpr(8388612.0)
MAX_NETWORK = tl.constexpr(16)  # of 32 tensors, two lists no longer fit the registers
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
FAR = tl.constexpr(1e37)  # infinite scores count as this far, so that distances stay finite


@triton.jit
def _scores(query, keys, start, N: tl.constexpr, HALF: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """``[BLOCK_T, BLOCK_N]`` products of a tile of queries with sub-keys ``start``…; beyond N they are zero."""
    position = start + tl.arange(0, BLOCK_N)
    channel = tl.arange(0, BLOCK_D)
    inside = (position < N)[None, :] & (channel < HALF)[:, None]
    tile = tl.load(keys + position[None, :] * HALF + channel[:, None], mask=inside, other=0.0)  # [BLOCK_D, BLOCK_N]
    return tl.dot(query, tile, input_precision="ieee")


# -- keys ------------------------------------------------------------------------------------------------------------
@triton.jit
def _greater(x, y):
    """The greater number, NaN where either is."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _lesser(x, y):
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _lower_bound(
    query, keys, N: tl.constexpr, HALF: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``(low, top) [BLOCK_T]``: at least K scores are no less than ``low``, no finite one is above ``top``.

    Both are NaN when a score is.
    """
    best = tl.full([BLOCK_T, BLOCK_N], -FAR, tl.float32)
    for start in tl.range(0, N, BLOCK_N):
        scores = _scores(query, keys, start, N, HALF, BLOCK_N, BLOCK_D)
        if N % BLOCK_N != 0:
            scores = tl.where((start + tl.arange(0, BLOCK_N) < N)[None, :], scores, -FAR)
        best = _greater(scores, best)
    best = _reduce(tl.reshape(best, [BLOCK_T, BLOCK_N // GROUPS, GROUPS]), True)  # [BLOCK_T, GROUPS]
    best = _lesser(best, FAR)
    low = tl.where((tl.arange(0, GROUPS) < N)[None, :], best, FAR)  # but groups of padding alone
    return _reduce(low, False), _reduce(best, True)


@triton.jit
def _reduce(x, GREATEST: tl.constexpr):
    """The greatest or the least along dimension 1, NaN where there is one."""
    if INTERPRETED:  # which passes over NaN, and takes an age with functions
        found = tl.max(x, 1) if GREATEST else tl.min(x, 1)
        return tl.where(tl.sum(tl.where(x == x, 0, 1), 1) > 0, float("nan"), found)
    elif GREATEST:
        return tl.reduce(x, 1, _greater)
    else:
        return tl.reduce(x, 1, _lesser)


@triton.constexpr_function
def _span(bits):
    """Ranks between the lowest and the highest that a narrow key has room for, when the position takes ``bits``."""
    return 2.0 ** (32 - bits if bits > 9 else 23) - 2.0


@triton.jit
def _narrow_keys(scores, low, step, position, unit, BITS: tl.constexpr):
    """uint32 keys; infinity comes first, all that is below ``low`` last. ``low``, ``step`` ``[BLOCK_T]``; NaN: any keys.

    Multiply-adds alone, of which the second saturates for nothing: what compares would wait for the integer units.
    """
    SPAN: tl.constexpr = _span(BITS)
    AT_BOUND: tl.constexpr = (BOUND - LOWEST) / SPAN
    share = tl.clamp((scores - low[:, None]) * (1.0 / (step * SPAN))[:, None] + AT_BOUND, 0.0, 1.0)
    rank = share * SPAN + LOWEST
    complement = ((1 << BITS) - 1 - position).to(tl.uint32)
    return rank.to(tl.uint32, bitcast=True) * unit + complement[None, :]  # the exponent drops out at the top


@triton.jit
def _read_narrow(key, low, step, BITS: tl.constexpr):
    """``(position int32, score fp32)`` of a narrow key; what stood at the highest rank was not finite: NaN."""
    HIGHEST: tl.constexpr = LOWEST + _span(BITS)
    mantissa = (key >> BITS) & 0x7FFFFF
    if BITS > 9:
        mantissa = key >> BITS
    rank = mantissa.to(tl.float32) + 8388608.0
    score = (rank - BOUND) * step[:, None] + low[:, None]
    position = (1 << BITS) - 1 - (key & ((1 << BITS) - 1)).to(tl.int32)
    return position, tl.where(rank < HIGHEST, score, float("nan"))


@triton.jit
def _wide_keys(scores, position):
    """uint64 keys: the order of floats, NaN of either sign above all, then the complement of the position."""
    bits = scores.to(tl.int32, bitcast=True)
    bits = tl.where(scores == scores, bits, 0x7FC00000)
    rank = (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)
    return (rank.to(tl.uint64) << 32) | (0x7FFFFFFF - position).to(tl.uint64)[None, :]


@triton.jit
def _read_wide(key):
    """``(position int32, score fp32)`` of a wide key."""
    rank = (key >> 32).to(tl.uint32).to(tl.int32, bitcast=True)
    score = (rank ^ ((~rank >> 31) | -2147483648)).to(tl.float32, bitcast=True)
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32), score


# -- top-k -----------------------------------------------------------------------------------------------------------
@triton.jit
def _merge_best(keys, best, TOPK: tl.constexpr):
    """The greatest TOPK of ``keys [BLOCK_T, *]`` and ``best [BLOCK_T, TOPK_PADDED]``, in falling order, then zeros."""
    rank = tl.arange(0, best.shape[1])
    found = tl.zeros_like(best)
    last = tl.max(found, 1)
    for i in tl.range(0, TOPK):
        last += tl.maximum(tl.max(keys - last[:, None], 1), tl.max(best - last[:, None], 1))
        found = tl.where((rank == i)[None, :], last[:, None], found)
    return found


# -- sorting networks across tensors ---------------------------------------------------------------------------------
@triton.constexpr_function
def _sorting_network(size):
    """Comparators (i, j), i < j, that sort ``size`` elements, a power of two (Batcher's odd-even merge sort, 1968)."""
    pairs, part = [], 1
    while part < size:
        step = part
        while step >= 1:
            for begin in range(step % part, size - step, 2 * step):
                for i in range(begin, min(begin + step, size - step)):
                    if i // (2 * part) == (i + step) // (2 * part):
                        pairs.append((i, i + step))
            step //= 2
        part *= 2
    return tuple(pairs)


@triton.constexpr_function
def _merging_network(size):
    """Comparators that sort ``size`` elements which first rise and then fall, or the other way round."""
    steps = [size >> i for i in range(1, size.bit_length())]
    return tuple((i, i + step) for step in steps for i in range(size) if not i & step)


@triton.jit
def _exchange(lists, one, A: tl.constexpr, B: tl.constexpr, ADD: tl.constexpr):
    """``ADD``: the lesser by a multiply-add; times a ``one`` that the compiler does not know, or it would add twice."""
    high = tl.maximum(lists[A], lists[B])
    if ADD:
        low = lists[A] * one + (lists[B] - high)
    else:
        low = tl.minimum(lists[A], lists[B])
    return lists[:A] + (high,) + lists[A + 1 : B] + (low,) + lists[B + 1 :]


@triton.jit
def _run_network(lists, one, PAIRS: tl.constexpr):
    """Brings the greater of each pair of tensors to the front, element by element."""
    for c in tl.static_range(len(PAIRS)):
        lists = _exchange(lists, one, PAIRS[c][0], PAIRS[c][1], c % 2 == 1)
    return lists


@triton.jit
def _merge_lists(first, second, one):
    """The greater half of two falling lists of tensors, in falling order; ``one`` is 1."""
    merged = ()
    for i in tl.static_range(len(first)):
        merged = merged + (tl.maximum(first[i], second[len(first) - 1 - i]),)
    return _run_network(merged, one, _merging_network(len(first)))


@triton.jit
def _take_apart(keys, DEPTH: tl.constexpr):
    """``[BLOCK_T, C]`` -> DEPTH tensors ``[BLOCK_T, C / DEPTH]``, by registers of a matrix product's result."""
    if DEPTH == 1:
        return (keys,)
    else:
        left, right = tl.split(tl.permute(tl.reshape(keys, [keys.shape[0], 2, keys.shape[1] // 2]), (0, 2, 1)))
        return _take_apart(left, DEPTH // 2) + _take_apart(right, DEPTH // 2)


@triton.jit
def _put_together(lists):
    """Inverse of ``_take_apart``."""
    if len(lists) == 1:
        return lists[0]
    else:
        left, right = _put_together(lists[: len(lists) // 2]), _put_together(lists[len(lists) // 2 :])
        return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), [left.shape[0], 2 * left.shape[1]])


@triton.jit
def _fold_columns(lists, one):
    """Merges the lists of two columns that one thread holds: ``[BLOCK_T, C]`` -> ``[BLOCK_T, C / 2]``.

    Of a matrix product's result a thread holds columns 2 c and 2 c + 1 of every eight.
    """
    COLUMNS: tl.constexpr = lists[0].shape[1]
    first, second = (), ()
    for i in tl.static_range(len(lists)):
        if COLUMNS > 8:
            parts = tl.permute(tl.reshape(lists[i], [lists[i].shape[0], 2, COLUMNS // 2]), (0, 2, 1))
        else:
            parts = tl.reshape(lists[i], [lists[i].shape[0], COLUMNS // 2, 2])
        left, right = tl.split(parts)
        first, second = first + (left,), second + (right,)
    return _merge_lists(first, second, one)


@triton.jit
def _merge_columns(lists, best, one, TOPK: tl.constexpr):
    """``[BLOCK_T, C]`` lists of all columns -> ``[BLOCK_T, depth]``, one list."""
    if lists[0].shape[1] > 4:
        return _merge_columns(_fold_columns(lists, one), best, one, TOPK)
    elif len(lists) < 4:
        return _merge_best(_put_together(lists), best, TOPK)
    else:
        return _share(_merge_across(_merge_across(lists, one, 1), one, 2))


@triton.jit
def _merge_across(lists, one, DISTANCE: tl.constexpr):
    """Merges the lists of two columns DISTANCE apart, which different threads hold; both get what comes out."""
    return _merge_lists(lists, _other_columns(lists, DISTANCE), one)


@triton.jit
def _other_columns(lists, DISTANCE: tl.constexpr):
    if len(lists) == 1:
        return (_other_column(lists[0], DISTANCE),)
    else:
        return _other_columns(lists[:1], DISTANCE) + _other_columns(lists[1:], DISTANCE)


@triton.jit
def _other_column(x, DISTANCE: tl.constexpr):
    """Column ``c ^ DISTANCE`` in place of column c: both added up, less the own one."""
    pairs = tl.reshape(x, [x.shape[0], x.shape[1] // (2 * DISTANCE), 2, DISTANCE])
    both = tl.broadcast_to(tl.sum(pairs, 2, keep_dims=True), pairs.shape)
    return tl.reshape(both - pairs, x.shape)


@triton.jit
def _share(lists):
    """Equal lists in all four columns -> ``[BLOCK_T, depth]``; each column gives a quarter of them."""
    QUARTER: tl.constexpr = len(lists) // 4
    column = tl.broadcast_to(tl.arange(0, 4)[None, :], lists[0].shape)
    parts = ()
    for i in tl.static_range(QUARTER):
        low = tl.where(column == 0, lists[i], lists[QUARTER + i])
        high = tl.where(column == 2, lists[2 * QUARTER + i], lists[3 * QUARTER + i])
        parts = parts + (tl.where(column < 2, low, high),)
    return tl.reshape(_join_all(parts), [lists[0].shape[0], len(lists)])


@triton.jit
def _join_all(parts):
    """``[BLOCK_T, C]`` tensors -> ``[BLOCK_T, C, 2, 2, ...]``, their number in the last dimensions."""
    if len(parts) == 1:
        return parts[0]
    else:
        return tl.join(_join_all(parts[0::2]), _join_all(parts[1::2]))


@triton.jit
def _best_of_half(
    query_ptr, keys, inside_token, unit,
    N: tl.constexpr, HALF: tl.constexpr, TOPK: tl.constexpr, TOPK_PADDED: tl.constexpr, WIDE: tl.constexpr,
    BITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The K best sub-keys of one half: ``(position int32, score fp32)``, ``[BLOCK_T, TOPK_PADDED]``, best first."""
    channel = tl.arange(0, BLOCK_D)
    inside = inside_token[:, None] & (channel < HALF)[None, :]
    query = tl.load(query_ptr[:, None] + channel[None, :], mask=inside, other=0.0)
    if WIDE:
        best = tl.zeros([BLOCK_T, TOPK_PADDED], tl.uint64)
        for start in tl.range(0, N, BLOCK_N):
            scores = _scores(query, keys, start, N, HALF, BLOCK_N, BLOCK_D)
            position = start + tl.arange(0, BLOCK_N)
            best = _merge_best(_blank(_wide_keys(scores, position), position, N, BLOCK_N), best, TOPK)
        return _read_wide(best)
    else:
        low, top = _lower_bound(query, keys, N, HALF, TOPK_PADDED, BLOCK_T, BLOCK_N, BLOCK_D)
        step = tl.maximum(top - low, 1e-28) / (_span(BITS) - 6.0)  # the highest rank is for what is not finite
        best = tl.zeros([BLOCK_T, TOPK_PADDED], tl.uint32)
        if TOPK_PADDED <= MAX_NETWORK:
            one = unit >> BITS
            lists = _sorted_tile(query, keys, low, step, 0, unit, one, N, HALF, TOPK_PADDED, BITS, BLOCK_N, BLOCK_D)
            for start in tl.range(BLOCK_N, N, BLOCK_N):
                found = _sorted_tile(
                    query, keys, low, step, start, unit, one, N, HALF, TOPK_PADDED, BITS, BLOCK_N, BLOCK_D
                )
                lists = _merge_lists(lists, found, one)
            best = _merge_columns(lists, best, one, TOPK)
        else:
            for start in tl.range(0, N, BLOCK_N):
                packed = _tile(query, keys, low, step, start, unit, N, HALF, BITS, BLOCK_N, BLOCK_D)
                best = _merge_best(packed, best, TOPK)
        return _read_narrow(best, low, step, BITS)


@triton.jit
def _tile(
    query, keys, low, step, start, unit,
    N: tl.constexpr, HALF: tl.constexpr, BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Narrow keys ``[BLOCK_T, BLOCK_N]`` of a tile of scores."""
    scores = _scores(query, keys, start, N, HALF, BLOCK_N, BLOCK_D)
    position = start + tl.arange(0, BLOCK_N)
    return _blank(_narrow_keys(scores, low, step, position, unit, BITS), position, N, BLOCK_N)


@triton.jit
def _sorted_tile(
    query, keys, low, step, start, unit, one,
    N: tl.constexpr, HALF: tl.constexpr, DEPTH: tl.constexpr, BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The same as DEPTH tensors ``[BLOCK_T, BLOCK_N / DEPTH]`` in falling order: each column is a sorted list."""
    lists = _take_apart(_tile(query, keys, low, step, start, unit, N, HALF, BITS, BLOCK_N, BLOCK_D), DEPTH)
    return _run_network(lists, one, _sorting_network(DEPTH))


@triton.jit
def _blank(keys, position, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """Zero, which stands for "none", beyond N."""
    if N % BLOCK_N == 0:
        return keys
    else:
        return tl.where((position < N)[None, :], keys, tl.zeros_like(keys))


@triton.jit
def _merge_halves(row, row_score, col, col_score, N: tl.constexpr, TOPK: tl.constexpr):
    """The K best sums of a row and a column: ``(slot int32, score fp32)``, ``[BLOCK_T, TOPK_PADDED]``, best first.

    Each row holds out its best column that is not yet taken; the best of these sums is next. So only the pairs (i, j)
    with (i + 1) * (j + 1) <= K are ever taken, and no more than 2 * K looked at. NaN and infinity come before
    everything, as NaN.
    """
    rank = tl.broadcast_to(tl.arange(0, row.shape[1])[None, :], row.shape)
    code = rank * 256  # the row's rank, and below it the rank of the column that it holds out
    held = tl.broadcast_to(tl.sum(tl.where(rank == 0, col_score, 0.0), 1)[:, None], row.shape)
    codes = tl.zeros_like(row)
    scores = tl.zeros_like(row_score)
    for i in tl.range(0, TOPK):
        sums = row_score + held
        order = tl.where(sums == sums, sums, float("inf"))
        order = tl.where(rank < TOPK, order, float("-inf"))
        best = tl.max(order, 1)[:, None]  # [BLOCK_T, 1]
        winner = tl.min(tl.where(order == best, code, 0x7FFFFFFF), 1)[:, None]
        codes = tl.where(rank == i, winner, codes)
        scores = tl.where(rank == i, tl.where(best < float("inf"), best, float("nan")), scores)
        following = tl.sum(tl.where(rank == (winner & 255) + 1, col_score, 0.0), 1)[:, None]
        held = tl.where(code == winner, following, held)
        code = tl.where(code == winner, code + 1, code)
    slots = tl.gather(row, codes // 256, 1) * N + tl.gather(col, codes & 255, 1)
    return slots, scores


@triton.jit
def _activate(scores, inside, ACTIVATION: tl.constexpr):
    if ACTIVATION == "softmax":
        scores = tl.where(inside, scores, float("-inf"))
        powers = tl.exp(scores - tl.max(scores, 1)[:, None])
        return powers / tl.sum(powers, 1)[:, None]
    elif ACTIVATION == "sigmoid":
        return 1.0 / (1.0 + tl.exp(-scores))
    elif ACTIVATION == "relu":
        return tl.where(scores < 0, 0.0, scores)  # NaN stays
    else:
        return scores


@triton.jit(do_not_specialize=["unit"])
def select_kernel(
    query, row_keys, col_keys, indices, weights, num_tokens, num_heads, unit,
    N: tl.constexpr, HALF: tl.constexpr, TOPK: tl.constexpr, TOPK_PADDED: tl.constexpr, ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr, BITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (t, h): query ``[T, H, D]``, keys ``[H, N, D/2]`` -> indices int32, weights fp32 ``[T, H, K]``."""
    head = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside_token = token < num_tokens
    line = token.to(tl.int64) * num_heads + head  # of T * H lines; times D or K it passes 2^31
    unit = unit.to(tl.uint32)  # 2^BITS, unknown to the compiler: it would make a shift of the multiply-add
    row, row_score = _best_of_half(
        query + line * (2 * HALF), row_keys + head * (N * HALF), inside_token, unit,
        N, HALF, TOPK, TOPK_PADDED, WIDE, BITS, BLOCK_T, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    col, col_score = _best_of_half(
        query + line * (2 * HALF) + HALF, col_keys + head * (N * HALF), inside_token, unit,
        N, HALF, TOPK, TOPK_PADDED, WIDE, BITS, BLOCK_T, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    slots, scores = _merge_halves(row, row_score, col, col_score, N, TOPK)
    rank = tl.arange(0, TOPK_PADDED)
    inside = (rank < TOPK)[None, :]
    place = line[:, None] * TOPK + rank[None, :]
    stored = inside_token[:, None] & inside
    tl.store(indices + place, slots, mask=stored)
    tl.store(weights + place, _activate(scores, inside, ACTIVATION), mask=stored)


# -- launch ----------------------------------------------------------------------------------------------------------
def select(
    query_THD: torch.Tensor,
    row_keys_HND: torch.Tensor,
    col_keys_HND: torch.Tensor,
    *,
    topk: int,
    activation: str,
    wide: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots and weights of every token and head.

    Args:
        query_THD: contiguous ``[T, H, D]``.
        row_keys_HND, col_keys_HND: contiguous ``[H, N, D/2]``, of the dtype of the query.
        topk: K.
        activation: ``softmax``, ``sigmoid``, ``relu``, or ``none`` for the scores themselves.
        wide: 64-bit keys; by default wherever 32 bits are not as good as exact.

    Returns:
        ``(indices int32, weights fp32)``, both contiguous ``[T, H, K]``, best first.
    """
    tokens, heads, channels = query_THD.shape
    num_keys = row_keys_HND.shape[1]
    indices = torch.empty(tokens, heads, topk, dtype=torch.int32, device=query_THD.device)
    weights = torch.empty(tokens, heads, topk, dtype=torch.float32, device=query_THD.device)
    if wide is None:
        wide = query_THD.dtype == torch.float32 or num_keys > NARROW_KEYS
    block_t = BLOCK_T // 2 if wide else BLOCK_T
    if tokens > 0:
        select_kernel[(triton.cdiv(tokens, block_t), heads)](
            query_THD, row_keys_HND, col_keys_HND, indices, weights, tokens, heads, 1 << (num_keys - 1).bit_length(),
            N=num_keys, HALF=channels // 2, TOPK=topk, TOPK_PADDED=triton.next_power_of_2(topk),
            ACTIVATION=activation, WIDE=wide, BITS=(num_keys - 1).bit_length(),
            BLOCK_T=block_t, BLOCK_N=max(64 if wide else 128, triton.next_power_of_2(topk)),
            BLOCK_D=max(16, triton.next_power_of_2(channels // 2)),
            num_warps=4, num_stages=2,
        )  # fmt: skip
    return indices, weights
