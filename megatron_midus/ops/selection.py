"""Exact product-key top-k without a gradient, fast on the CPU: chunked scores, SIMD sort of packed keys, pruned pairs.

Shapes: T tokens, H memory heads, D channels of one head's query, N sub-keys per half, K top-k, R = H * tokens rows.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

try:  # torch works without numpy, and before 2.0 its sort of doubles is scalar on many machines
    import numpy

    SIMD_SORT = int(numpy.__version__.split(".")[0]) >= 2
except ImportError:
    SIMD_SORT = False

# A double has 53 bits of mantissa and a float 24: a column of up to 28 bits fits below a score, and rounding the double
# to a float gives the score back.
COLUMN_MASK = (1 << 28) - 1
# From here on numpy parts a row before it sorts the best; with AVX-512 whole rows are sorted faster than they are parted.
MIN_PARTED = 96 if torch.backends.cpu.get_cpu_capability() != "AVX512" else 1 << 30
CHUNK_SCORES = 1 << 19  # scores of one half held at a time; packed they take 4 MiB, about a cache
FEW_ROWS = 16
NUMPY_ROWS = 512  # up to here numpy's smaller cost per operator counts for more than torch's vectors
MIN_PACKED = 1 << 12  # scores; below, torch.topk is done before the packing is
MIN_ROWS_PER_THREAD = 512  # below, handing rows to a thread costs more than it saves


def select_slots(
    query_THD: torch.Tensor, row_keys_HND: torch.Tensor, col_keys_HND: torch.Tensor, *, topk: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(indices int32 [H, T, K], scores dtype [H, T, K])``, best first. ``dtype`` is fp32 or fp64.

    Gradients must be off.
    """
    tokens, heads, _ = query_THD.shape
    num_keys = row_keys_HND.shape[1]
    query = query_THD.transpose(0, 1)  # [H, T, D]
    keys = [half.to(dtype).transpose(1, 2) for half in (row_keys_HND, col_keys_HND)]  # [H, D/2, N]
    if heads * tokens <= NUMPY_ROWS:
        return _best_slots(query.to(dtype), keys, topk)
    threads = min(num_threads(), heads * tokens // MIN_ROWS_PER_THREAD) if query.device.type == "cpu" else 1
    step = max(1, min(CHUNK_SCORES // (heads * num_keys), -(-tokens // max(threads, 1))))
    if tokens <= step:
        return _best_slots(query.to(dtype), keys, topk)
    keys = [half.contiguous() for half in keys]
    indices = torch.empty(heads, tokens, topk, dtype=torch.int32, device=query.device)
    scores = torch.empty(heads, tokens, topk, dtype=dtype, device=query.device)
    chunks = [slice(begin, begin + step) for begin in range(0, tokens, step)]

    def work(some: list[slice]) -> None:
        for chunk in some:
            indices[:, chunk], scores[:, chunk] = _best_slots(query[:, chunk].to(dtype), keys, topk)

    run_in_threads(work, [chunks[first::threads] for first in range(threads)] if threads > 1 else [chunks])
    return indices, scores


def num_threads() -> int:
    return torch.get_num_threads()


def run_in_threads(function: Callable[[list], None], parts: list[list]) -> None:
    """``function`` on each part in a thread of its own, within which torch uses that one thread alone.

    numpy's sort and torch's small operators use one core each; side by side they use all of them. Torch's own threads
    have to sleep meanwhile: one that spins for its next operator keeps the core from the others.
    """
    if len(parts) == 1:
        return function(parts[0])
    # The mode holds for one thread alone, and tensors made in inference mode can be written in that mode only.
    mode = torch.inference_mode() if torch.is_inference_mode_enabled() else torch.no_grad()
    for done in [_pool(len(parts), os.getpid()).submit(mode(function), part) for part in parts]:
        done.result()


@functools.lru_cache(maxsize=4)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """``process`` is in the key because threads do not survive a fork."""
    before = torch.get_num_threads()
    started = threading.Barrier(threads + 1)
    pool = ThreadPoolExecutor(threads, "memory-select", initializer=_use_one_thread)
    for _ in range(threads):
        pool.submit(started.wait)
    started.wait()
    # The number holds for the thread that sets it, but threads that begin later would inherit it.
    torch.set_num_threads(before)
    return pool


def _use_one_thread() -> None:
    torch.get_num_threads()  # the first question in a thread sets its number to the process's, hence before the change
    torch.set_num_threads(1)


def _best_slots(query_HTD: torch.Tensor, keys: list[torch.Tensor], topk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots and scores ``[H, T, K]`` of one chunk."""
    heads, tokens, _ = query_HTD.shape
    num_keys = keys[0].shape[2]
    if heads * tokens <= NUMPY_ROWS and SIMD_SORT and query_HTD.dtype == torch.float32 and not query_HTD.is_cuda:
        found = _best_of_few(query_HTD, keys, topk)
        if found is not None:
            return found
    row_query, col_query = query_HTD.chunk(2, dim=-1)
    scores = _room(_KEPT.scores, (heads, tokens, num_keys), query_HTD)
    row_best, row_index = top_columns(torch.bmm(row_query, keys[0], out=scores).view(-1, num_keys), topk)  # [R, K]
    col_best, col_index = top_columns(torch.bmm(col_query, keys[1], out=scores).view(-1, num_keys), topk)
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


class _Kept(threading.local):
    """Room for the scores of one chunk that each thread keeps, 6 MiB: fresh pages cost as much as the sort does.

    A thread that is not the first one gets its memory from a heap that is given back whenever it is empty.
    """

    def __init__(self) -> None:
        # Ordinary tensors, also for a thread that begins in inference mode: it may train later.
        with torch.inference_mode(False):
            self.scores = torch.empty(CHUNK_SCORES)
            self.packed = torch.empty(CHUNK_SCORES, dtype=torch.float64)


_KEPT = _Kept()


def _room(
    kept: torch.Tensor, shape: Sequence[int], like: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """An uninitialised tensor of ``shape``, out of ``kept`` where it fits, in the dtype of ``like`` if none is given."""
    dtype, size = dtype or like.dtype, math.prod(shape)
    if size <= kept.numel() and dtype == kept.dtype and like.device == kept.device:
        return kept[:size].view(shape)
    return like.new_empty(shape, dtype=dtype)


def _best_of_few(
    query_HTD: torch.Tensor, keys: list[torch.Tensor], topk: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """As ``_best_slots``, in as few and as cheap calls as there are; ``None`` where a score is not finite."""
    heads, tokens, _ = query_HTD.shape
    rows, num_keys = heads * tokens, keys[0].shape[2]
    halves = [torch.bmm(q, k).numpy() for q, k in zip(query_HTD.chunk(2, dim=-1), keys)]
    best, column = _top_columns_of_few(halves, topk)
    first, second = _numpy_pairs(topk)
    scores, pair = _top_columns_of_few([best[:rows].take(first, 1) + best[rows:].take(second, 1)], topk)
    if not numpy.isfinite(scores).all():  # these are sums of the best ones: whatever is bad has come this far
        return None
    row_begin = numpy.arange(rows)[:, None]
    slots = column[row_begin, first[pair]] * num_keys + column[row_begin + rows, second[pair]]
    shape = (heads, tokens, topk)
    return torch.from_numpy(slots.astype(numpy.int32)).view(shape), torch.from_numpy(scores).view(shape)


def _top_columns_of_few(parts: list[Any], topk: int) -> tuple[Any, Any]:
    """``top_columns`` of finite scores, arrays whose rows are put below each other; numpy to numpy."""
    columns = parts[0].shape[-1]
    rows = parts[0].size // columns
    packed = numpy.empty((len(parts) * rows, columns))
    for index, part in enumerate(parts):
        packed[index * rows : (index + 1) * rows] = part.reshape(rows, columns)
    labels = packed.view(numpy.int64)
    labels |= _column_labels(columns)
    best = _sorted_end(packed, topk)[:, : -topk - 1 : -1]
    return best.astype(numpy.float32), best.view(numpy.int64) & COLUMN_MASK


def top_columns(scores_RN: torch.Tensor, topk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``scores_RN.topk(topk)``, exact, best first; on ties the columns may be others, but always the same.

    On the CPU each fp32 score becomes a double that carries its column in the low bits, and numpy's SIMD sort is several
    times faster than ``torch.topk``. Scores that are not finite have no room for a column, so rows with
    such scores go through ``torch.topk``.
    """
    worth_it = SIMD_SORT and scores_RN.numel() >= MIN_PACKED
    if worth_it and scores_RN.dtype == torch.float32 and scores_RN.device.type == "cpu":
        packed = _room(_KEPT.packed, scores_RN.shape, scores_RN, torch.float64).copy_(scores_RN)
        packed.view(torch.int64).bitwise_or_(torch.arange(scores_RN.shape[1]))
        best = torch.from_numpy(_sorted_end(packed.numpy(), topk))[:, -topk:].flip(1)
        # inf or NaN with a column is NaN, which sorts last; -inf with the column 0 is still -inf.
        if best[:, 0].sum().isfinite():
            return best.float(), best.view(torch.int64) & COLUMN_MASK
    return scores_RN.topk(topk, dim=1)


def _sorted_end(packed: Any, topk: int) -> Any:
    """An array whose last ``topk`` columns are those of the sorted rows. ``packed`` is overwritten."""
    columns = packed.shape[1]
    if columns < MIN_PARTED or 2 * topk > columns:
        packed.sort(axis=1)
        return packed
    packed.partition(columns - topk, axis=1)
    best = packed[:, columns - topk :].copy()
    best.sort(axis=1)
    return best


@functools.lru_cache(maxsize=64)
def _column_labels(columns: int) -> Any:
    return numpy.arange(columns)


@functools.lru_cache(maxsize=64)
def _numpy_pairs(topk: int) -> tuple[Any, Any]:
    first, second = _pairs(topk, torch.device("cpu"))
    return first.numpy(), second.numpy()


@functools.lru_cache(maxsize=64)
def _pairs(topk: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ranks (a, b) in the two sorted halves whose sum can be among the best K.

    (a + 1) * (b + 1) pairs score at least as much as the pair (a, b), itself included, so that product is at most K.
    """
    pairs = [(a, b) for a in range(topk) for b in range(topk // (a + 1))]
    first, second = torch.tensor(pairs, device=device).T.contiguous()
    return first, second
