"""Exact product-key top-k without a gradient, fast on the CPU: chunked scores, SIMD sort of packed keys, pruned pairs.

Shapes: T tokens, H memory heads, D channels of one head's query, N sub-keys per half, K top-k, R = H * tokens rows.
"""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor

import torch

try:  # torch works without numpy, and before 2.0 its sort of doubles is scalar on many machines
    import numpy

    SIMD_SORT = int(numpy.__version__.split(".")[0]) >= 2
except ImportError:
    SIMD_SORT = False

# A double has 53 bits of mantissa and a float 24: a column of up to 28 bits fits below a score, and rounding the double
# to a float gives the score back.
COLUMN_MASK = (1 << 28) - 1
CHUNK_SCORES = 1 << 19  # scores of one half held at a time; packed they take 4 MiB, about a cache
FEW_ROWS = 16
MIN_PACKED = 1 << 12  # scores; below, torch.topk is done before the packing is
MIN_THREADS = 4  # with two, OpenMP's idle thread spins on the core that the second one wants: no gain was measured
MIN_ROWS_PER_THREAD = 512  # below, handing rows to a thread costs more than it saves


def select_slots(
    query_THD: torch.Tensor, row_keys_HND: torch.Tensor, col_keys_HND: torch.Tensor, *, topk: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(indices int32 [H, T, K], scores dtype [H, T, K])``, best first. ``dtype`` is fp32 or fp64."""
    tokens, heads, _ = query_THD.shape
    num_keys = row_keys_HND.shape[1]
    keys = [half.to(dtype).transpose(1, 2) for half in (row_keys_HND, col_keys_HND)]  # [H, D/2, N]
    step = max(1, CHUNK_SCORES // (heads * num_keys))
    if tokens <= step:
        return _best_slots(query_THD.to(dtype).transpose(0, 1), keys, topk)
    keys = [half.contiguous() for half in keys]
    indices = torch.empty(heads, tokens, topk, dtype=torch.int32, device=query_THD.device)
    scores = torch.empty(heads, tokens, topk, dtype=dtype, device=query_THD.device)
    scratch = torch.empty(heads * step * num_keys, dtype=torch.float64, device=query_THD.device)
    for begin in range(0, tokens, step):
        chunk = slice(begin, begin + step)
        query = query_THD[chunk].to(dtype).transpose(0, 1)
        indices[:, chunk], scores[:, chunk] = _best_slots(query, keys, topk, scratch)
    return indices, scores


def _best_slots(
    query_HTD: torch.Tensor, keys: list[torch.Tensor], topk: int, scratch: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots and scores ``[H, T, K]`` of one chunk."""
    heads, tokens, _ = query_HTD.shape
    num_keys = keys[0].shape[2]
    row_query, col_query = query_HTD.chunk(2, dim=-1)
    row_best, row_index = top_columns(torch.bmm(row_query, keys[0]).view(-1, num_keys), topk, scratch)  # [R, K]
    col_best, col_index = top_columns(torch.bmm(col_query, keys[1]).view(-1, num_keys), topk, scratch)
    if len(row_best) <= FEW_ROWS:  # each operator costs more than all of its work: take all pairs in fewer operators
        sums = (row_best[:, :, None] + col_best[:, None, :]).flatten(1)
        scores, pair = sums.topk(topk, dim=1)
        slots = (row_index[:, :, None] * num_keys + col_index[:, None, :]).flatten(1).gather(1, pair).int()
    else:
        first, second = _pairs(topk, query_HTD.device)
        scores, pair = top_columns(row_best.index_select(1, first) + col_best.index_select(1, second), topk)
        row = row_index.gather(1, first.index_select(0, pair.flatten()).view_as(pair))
        col = col_index.gather(1, second.index_select(0, pair.flatten()).view_as(pair))
        slots = row.mul_(num_keys).add_(col).int()
    return slots.view(heads, tokens, topk), scores.view(heads, tokens, topk)


def top_columns(
    scores_RN: torch.Tensor, topk: int, scratch: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``scores_RN.topk(topk)``, exact, best first; on ties the columns may be others, but always the same.

    On the CPU each fp32 score becomes a double that carries its column in the low bits, and numpy's SIMD sort of whole
    rows is several times faster than ``torch.topk``. Scores that are not finite have no room for a column, so rows with
    such scores go through ``torch.topk``. ``scratch`` is fp64 room for all scores: fresh pages cost as much as a sort.
    """
    worth_it = SIMD_SORT and scores_RN.numel() >= MIN_PACKED
    if worth_it and scores_RN.dtype == torch.float32 and scores_RN.device.type == "cpu":
        if scratch is None:
            packed = scores_RN.double()
        else:
            packed = scratch[: scores_RN.numel()].view_as(scores_RN).copy_(scores_RN)
        packed.view(torch.int64).bitwise_or_(torch.arange(scores_RN.shape[1]))
        _sort_rows(packed)
        best = packed[:, -topk:].flip(1)
        # inf or NaN with a column is NaN, which sorts last; -inf with the column 0 is still -inf.
        if best[:, 0].sum().isfinite():
            return best.float(), best.view(torch.int64) & COLUMN_MASK
    return scores_RN.topk(topk, dim=1)


def _sort_rows(rows: torch.Tensor) -> None:
    """Sorts each row of a contiguous CPU matrix in place, with as many threads as torch uses (numpy frees the GIL)."""
    array = rows.numpy()
    threads = min(torch.get_num_threads(), len(array) // MIN_ROWS_PER_THREAD)
    if threads < MIN_THREADS:
        array.sort(axis=1)
        return
    bounds = [len(array) * i // threads for i in range(threads + 1)]
    parts = [array[begin:end] for begin, end in zip(bounds, bounds[1:])]
    pending = [_pool(threads - 1, os.getpid()).submit(part.sort, axis=1) for part in parts[1:]]
    parts[0].sort(axis=1)
    for done in pending:
        done.result()


@functools.lru_cache(maxsize=4)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """``process`` is in the key because threads do not survive a fork."""
    return ThreadPoolExecutor(threads, thread_name_prefix="memory-sort")


@functools.lru_cache(maxsize=64)
def _pairs(topk: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ranks (a, b) in the two sorted halves whose sum can be among the best K.

    (a + 1) * (b + 1) pairs score at least as much as the pair (a, b), itself included, so that product is at most K.
    """
    pairs = [(a, b) for a in range(topk) for b in range(topk // (a + 1))]
    first, second = torch.tensor(pairs, device=device).T.contiguous()
    return first, second
