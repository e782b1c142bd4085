"""Backend "numba": the head-wise memory on the CPU with the parts that torch has no fast operator for as compiled loops.

It is backend "torch" (`ops/cpu.py`) with other pieces: selection, the gradients of weights, bank and sub-keys.
Shapes: T tokens, H memory heads, D channels of one head's query, N sub-keys per half, K top-k; B bags of J entries.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch

from megatron_midus.ops import cpu
from megatron_midus.ops.selection import num_threads, run_in_threads

MAX_TOPK = 128
MIN_LOOKUPS = 4096  # chosen unasked from here on; below, torch does as well and need not compile anything
CHUNK_SCORES = 1 << 17  # scores of one half held at a time, by each thread: half of a second-level cache
WHOLE_ROWS = 8  # columns per top-k up to which all are sorted: a bound saves less than it costs
MIN_PER_THREAD = 512  # look-ups; below, handing them to a thread costs more than it saves


def unsupported_reason(
    query_THD: torch.Tensor,
    *others: torch.Tensor | None,
    topk: int,
    variant: str,
    automatic: bool = False,
    **settings: Any,
) -> str | None:
    """Why this backend cannot run, ``None`` when it can. ``automatic``: nobody named it, so it must be worth compiling.

    Where there is no query, as in ``aggregate_values``, there are values ``[slots, W]`` and weights ``[B, J]``.
    """
    if query_THD.device.type != "cpu":
        return f"its loops need tensors of the CPU and these are on {query_THD.device.type}"
    if not _installed():
        return "the package numba is not installed; run pip install numba"
    if topk > MAX_TOPK:
        return f"topk={topk} is more than the {MAX_TOPK} that its loops sort; choose torch"
    if automatic and _num_lookups(query_THD, *others) < MIN_LOOKUPS:
        return f"it is compiled for {MIN_LOOKUPS} look-ups and more at a time"
    return None


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("numba") is not None


def _num_lookups(query_THD: torch.Tensor, *others: torch.Tensor | None) -> int:
    if query_THD.dim() == 3:
        return query_THD.shape[0] * query_THD.shape[1]
    return 0 if not others or others[0] is None else len(others[0])


def _select_slots(
    query_THD: torch.Tensor, row_keys_HND: torch.Tensor, col_keys_HND: torch.Tensor, *, topk: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``megatron_midus.ops.selection.select_slots``."""
    loops = _loops()
    tokens, heads, channels = query_THD.shape
    num_keys = row_keys_HND.shape[1]
    query = query_THD.detach().to(dtype).unflatten(2, (2, channels // 2))  # [T, H, 2, D/2]
    keys = torch.stack([row_keys_HND.detach(), col_keys_HND.detach()], 1).to(dtype)  # [H, 2, N, D/2]
    # Where the sums of squares are finite no product of the two vectors overflows (Cauchy and Schwarz): no score is NaN.
    is_clean = query.square().sum((2, 3)).isfinite()  # [T, H]
    is_clean &= keys.square().sum((1, 2, 3)).isfinite()
    is_clean_HT = is_clean.t().contiguous().numpy()
    width = max(4, 1 << (topk - 1).bit_length())
    size = -(-num_keys // width) * width if num_keys <= WHOLE_ROWS * width else 2 * width
    networks = _networks(size, width, topk)
    index = torch.empty(heads, tokens, topk, dtype=torch.int32)
    scores = torch.empty(heads, tokens, topk, dtype=dtype)
    step = max(loops.LANES, CHUNK_SCORES // num_keys)

    def work(chunks: list[tuple[int, slice]]) -> None:
        room = torch.empty(2, min(step, tokens), num_keys, dtype=dtype)
        for head, chunk in chunks:
            part = query[chunk, head]
            halves = [torch.mm(part[:, h], keys[head, h].t(), out=room[h, : len(part)]).numpy() for h in (0, 1)]
            loops.select_slots(
                *halves, is_clean_HT[head, chunk], topk, size, *networks, index[head, chunk].numpy(),
                scores[head, chunk].numpy(),
            )  # fmt: skip

    chunks = [(head, slice(begin, begin + step)) for head in range(heads) for begin in range(0, tokens, step)]
    _share(work, chunks, heads * tokens)
    return index, scores


def _row_products(bank: torch.Tensor, index_BJ: torch.Tensor, rows_BW: torch.Tensor) -> torch.Tensor:
    """``out[b, j] = <rows[b], bank[index[b, j]]>``, ``[B, J]``."""
    loops = _loops()
    bank, index_BJ = cpu.widened(bank, index_BJ, rows_BW.dtype)
    out = rows_BW.new_empty(index_BJ.shape)
    arrays = [t.contiguous().numpy() for t in (index_BJ, rows_BW, out)]
    table = bank.contiguous().numpy()

    def work(bags: list[slice]) -> None:
        for some in bags:
            loops.row_products(table, *(array[some] for array in arrays))

    _share(work, _ranges(len(index_BJ)), len(index_BJ))
    return out


def _scatter_rows(
    index_BJ: torch.Tensor, weights_BJ: torch.Tensor, rows_BW: torch.Tensor, num_rows: int
) -> torch.Tensor:
    """``out[index[b, j]] += weights[b, j] * rows[b]``, ``[num_rows, W]``; summed in the order of (b, j), always.

    Each thread owns a range of slots and goes through all entries.
    """
    loops = _loops()
    out = rows_BW.new_zeros(num_rows, rows_BW.shape[1])
    arrays = [t.contiguous().numpy() for t in (index_BJ, weights_BJ, rows_BW)]

    def work(slots: list[slice]) -> None:
        for some in slots:
            loops.scatter_rows(*arrays, some.start, some.stop, out.numpy())

    _share(work, _ranges(num_rows), len(index_BJ))
    return out


def _backward_keys(grad_scores_HTK, query, row_keys, col_keys, index, dtype, needs_query, needs_keys):
    """Gradients of the query and of both halves of the sub-keys."""
    loops = _loops()
    wide_query = query.detach().to(dtype).transpose(0, 1).contiguous()  # [H, T, D]
    grad_query = torch.empty_like(wide_query)
    keys = [half.detach().to(dtype).contiguous() for half in (row_keys, col_keys)]  # [H, N, D/2]
    grad_keys = [torch.zeros_like(half) for half in keys]
    arrays = [t.contiguous().numpy() for t in (grad_scores_HTK, index, wide_query, *keys, grad_query, *grad_keys)]

    def work(heads: list[int]) -> None:
        for head in heads:
            loops.keys_backward(*(array[head] for array in arrays))

    _share(work, list(range(len(keys[0]))), index.shape[0] * index.shape[1])
    rows, cols = (grad.to(half.dtype) if needs_keys else None for grad, half in zip(grad_keys, (row_keys, col_keys)))
    return grad_query.transpose(0, 1).to(query.dtype).contiguous() if needs_query else None, rows, cols


def _loops() -> Any:
    from megatron_midus.ops.numba import loops  # at the first use: it brings numba along

    return loops


@functools.cache
def _networks(size: int, width: int, topk: int) -> tuple[Any, Any]:
    loops = _loops()
    return loops.selection_network(size, width), loops.pairs_network(topk)


def _ranges(length: int) -> list[slice]:
    """One range for each thread."""
    step = max(1, -(-length // num_threads()))
    return [slice(begin, min(begin + step, length)) for begin in range(0, length, step)]


def _share(work: Any, items: list, num_lookups: int) -> None:
    """``work`` on the items, by as many threads as are worth it."""
    threads = max(1, min(num_threads(), num_lookups // MIN_PER_THREAD))
    parts = [items[first::threads] for first in range(min(threads, len(items)))]
    if parts:
        run_in_threads(work, parts)


_PIECES = cpu.Pieces(_select_slots, _row_products, _scatter_rows, _backward_keys)

head_wise_memory = functools.partial(cpu.head_wise_memory, pieces=_PIECES)
weigh_slots = functools.partial(cpu.weigh_slots, pieces=_PIECES)
aggregate_values = functools.partial(cpu.aggregate_values, pieces=_PIECES)
