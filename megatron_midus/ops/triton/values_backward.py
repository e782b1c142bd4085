"""Gradients of the value bank, of the head projection and of the weights of the selected slots.

The bank's gradient is a scatter of T * H * K rows. The deterministic way sorts the selected slots (stable), cuts the
sorted list into chunks of equal length, whatever slots they hold, and sums each run of one slot in fp32 registers. A run
that a chunk's border cuts leaves one partial sum per chunk; the partial sums are again a sorted list, and the same kernel
sums them until one chunk holds them all. So a slot that every token selects costs no more than any other, the order of
summation is fixed by the input alone, and the weights' gradient, one dot product per selection, comes from the same rows.

Shapes: T tokens, H memory heads, K top-k, L latent, N sub-keys per half; S = T*H*K selections; R rows of the flattened
bank of W channels; B rows of the gradient that reaches the bank, J selections each (hive, full: B = T*H, J = K;
block: B = T, J = H*K).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megatron_midus.ops.triton.projection_backward import projection_backward

CHUNK = 256  # sorted selections that one program sums
TILE = 16  # of them taken at a time: the smallest matrix product of tensor cores
ATOMIC_TILE = 64  # selections that one program adds with atomics
BLOCK_W = 64  # channels of the bank's rows taken at a time


def values_backward(
    grad_out: torch.Tensor,
    indices_THK: torch.Tensor,
    weights_THK: torch.Tensor,
    values: torch.Tensor,
    head_proj_HLO: torch.Tensor | None,
    latent_THL: torch.Tensor | None,
    *,
    variant: str,
    deterministic: bool,
    accumulate_into: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of ``out = sum_k weights[k] * values[indices[k]]``, for ``hive`` times ``head_proj``.

    Args:
        grad_out: ``[T, H, d_o]``, for ``block`` ``[T, 1, d]``.
        indices_THK: slots, int32, contiguous.
        weights_THK: fp32, contiguous.
        values: ``hive`` ``[N*N, L]``; ``full`` ``[H, N*N, d_o]``; ``block`` ``[N*N, d]``; contiguous.
        head_proj_HLO: ``hive`` ``[H, L, d_o]``, else ``None``.
        latent_THL: ``hive``: what the projection was applied to, in the dtype of ``values``, else ``None``.
        variant: ``hive``, ``full`` or ``block``.
        deterministic: equal bits from run to run; ``False`` adds with fp32 atomics in whatever order they come.
        accumulate_into: fp32 buffer of the shape of ``values`` (Megatron's ``main_grad``) to add the bank's gradient to.

    Returns:
        ``(grad_weights fp32 [T, H, K], grad_values, grad_head_proj)``. ``grad_values`` has the dtype of ``values`` and
        zeros in rows that no token selected; it is ``None`` when it went to ``accumulate_into``. ``grad_head_proj`` is
        ``None`` without a projection.
    """
    if accumulate_into is not None:
        _check_buffer(accumulate_into, values)
    grad_proj = None
    rows = grad_out
    if head_proj_HLO is not None:
        assert latent_THL is not None
        rows, grad_proj = projection_backward(grad_out, latent_THL, head_proj_HLO)
    rows = rows.contiguous().view(-1, values.shape[-1])  # [B, W]
    bank = values.view(-1, values.shape[-1])  # [R, W]
    grad_weights = torch.empty_like(weights_THK)
    if weights_THK.numel() == 0:
        return grad_weights, None if accumulate_into is not None else torch.zeros_like(values), grad_proj
    slots = _flat_slots(indices_THK, values) if variant == "full" else indices_THK.view(-1)
    if accumulate_into is not None:
        grad_bank = accumulate_into.view_as(bank)
    else:
        grad_bank = torch.zeros_like(bank, dtype=values.dtype if deterministic else torch.float32)
    if deterministic:
        _sum_sorted(slots, weights_THK, rows, bank, grad_bank, grad_weights, add=accumulate_into is not None)
    else:
        _add_atomically(slots, weights_THK, rows, bank, grad_bank, grad_weights)
    grad_values = None if accumulate_into is not None else grad_bank.view_as(values).to(values.dtype)
    return grad_weights, grad_values, grad_proj


def _check_buffer(buffer: torch.Tensor, values: torch.Tensor) -> None:
    if buffer.shape != values.shape or buffer.dtype != torch.float32 or not buffer.is_contiguous():
        raise ValueError(
            f"accumulate_into is {list(buffer.shape)} of {buffer.dtype}; give a contiguous torch.float32 tensor of the"
            f" values' shape {list(values.shape)}"
        )


def _flat_slots(indices_THK: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Rows of ``values [H, R, W]`` seen as one bank ``[H*R, W]``."""
    heads, slots = values.shape[:2]
    dtype = torch.int64 if heads * slots > 2**31 - 1 else torch.int32
    first = torch.arange(heads, device=values.device, dtype=dtype)[:, None] * slots
    return (indices_THK + first).view(-1)


def _sum_sorted(slots, weights, rows, bank, grad_bank, grad_weights, *, add: bool) -> None:
    """``grad_bank[slots[s]] = weights[s] * rows[s // J]`` summed, and ``grad_weights[s] = <rows[s // J], bank[slots[s]]>``.

    ``add``: to what ``grad_bank`` holds, else it must hold zeros.
    """
    width = bank.shape[1]
    slots, order = torch.sort(slots, stable=True)
    per_row = slots.numel() // rows.shape[0]
    block = _block_width(width)
    selections = True
    while True:
        chunks = triton.cdiv(slots.numel(), CHUNK)
        # Two partial sums a chunk: of the run that its first border cuts and of the one that its last border cuts.
        partial_slots = slots.new_empty(2 * chunks)
        partial_rows = torch.empty(2 * chunks, width, dtype=torch.float32, device=bank.device)
        _sum_runs_kernel[(chunks,)](
            slots, order, weights, rows, bank, grad_bank, grad_weights, partial_slots, partial_rows,
            slots.numel(), width,
            PER_ROW=per_row, SELECTIONS=selections, ADD=add,
            CHUNK=CHUNK, TILE=TILE, BLOCK_W=block, num_warps=1,
        )  # fmt: skip
        if chunks == 1:
            return
        slots, rows, selections, add = partial_slots, partial_rows, False, True


def _add_atomically(slots, weights, rows, bank, grad_bank, grad_weights) -> None:
    """As ``_sum_sorted``, added to fp32 ``grad_bank`` in no fixed order."""
    width = bank.shape[1]
    _add_atomically_kernel[(triton.cdiv(slots.numel(), ATOMIC_TILE),)](
        slots, weights, rows, bank, grad_bank, grad_weights,
        slots.numel(), width,
        PER_ROW=slots.numel() // rows.shape[0], TILE=ATOMIC_TILE, BLOCK_W=_block_width(width), num_warps=4,
    )  # fmt: skip


def _block_width(width: int) -> int:
    return min(BLOCK_W, max(16, triton.next_power_of_2(width)))


@triton.jit
def _weighted_sum(weights, rows, acc):
    """``acc + weights @ rows`` to about 16 bits of the fp32 weights where the rows have 8 or 11, else to all bits."""
    if rows.dtype == tl.float32:
        return tl.dot(weights, rows, acc, input_precision="ieee")
    high = weights.to(rows.dtype)
    low = (weights - high.to(tl.float32)).to(rows.dtype)
    return tl.dot(low, rows, tl.dot(high, rows, acc))


@triton.jit
def _sum_runs_kernel(
    slots_ptr, order_ptr, weights_ptr, rows_ptr, bank_ptr, grad_bank_ptr, grad_weights_ptr,
    partial_slots_ptr, partial_rows_ptr,
    num_entries, width,
    PER_ROW: tl.constexpr, SELECTIONS: tl.constexpr, ADD: tl.constexpr,
    CHUNK: tl.constexpr, TILE: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Sums of the runs of one slot within one chunk of the sorted entries.

    Rank r of an entry is the number of runs that ended before it in its tile, so ``one-hot(rank)^T @ rows`` is a tile of
    run sums; row 0 continues ``carry``, the sum of the run that was open when the tile began.
    """
    chunk = tl.program_id(0).to(tl.int64)
    start = chunk * CHUNK
    end = tl.minimum(start + CHUNK, num_entries)
    ranks = tl.arange(0, TILE)
    first_slot = tl.load(slots_ptr + start)
    last_slot = tl.load(slots_ptr + end - 1)
    tl.store(partial_slots_ptr + 2 * chunk, first_slot)
    tl.store(partial_slots_ptr + 2 * chunk + 1, last_slot)
    before = tl.load(slots_ptr + start - 1, mask=start > 0, other=-1)
    cut = before == first_slot  # the first run began in an earlier chunk

    for begin_w in range(0, width, BLOCK_W):
        channels = begin_w + tl.arange(0, BLOCK_W)
        in_row = channels < width
        tl.debug_barrier()  # other threads of this program read the products stored for the previous channels
        carry = tl.zeros([TILE, BLOCK_W], tl.float32)  # row 0 alone counts
        tl.store(partial_rows_ptr + 2 * chunk * width + channels, tl.zeros([BLOCK_W], tl.float32), mask=in_row)
        is_cut = cut
        for begin in range(0, CHUNK, TILE):
            entries = start + begin + ranks
            is_entry = entries < num_entries
            slots = tl.load(slots_ptr + entries, mask=is_entry, other=-1)
            following = tl.load(slots_ptr + entries + 1, mask=entries + 1 < num_entries, other=-1)
            ends = ((slots != following) & is_entry).to(tl.int32)
            rank = tl.cumsum(ends, 0) - ends
            num_ended = tl.sum(ends, 0)
            mask = is_entry[:, None] & in_row[None, :]
            if SELECTIONS:
                position = tl.load(order_ptr + entries, mask=is_entry, other=0)
                weights = tl.load(weights_ptr + position, mask=is_entry, other=0.0)
                row = position // PER_ROW
            else:
                weights = is_entry.to(tl.float32)
                row = entries
            rows = tl.load(rows_ptr + row[:, None] * width + channels[None, :], mask=mask, other=0.0)
            if SELECTIONS:
                bank_rows = tl.load(
                    bank_ptr + slots.to(tl.int64)[:, None] * width + channels[None, :], mask=mask, other=0.0
                )
                product = tl.sum(rows.to(tl.float32) * bank_rows.to(tl.float32), 1)
                if begin_w > 0:
                    product += tl.load(grad_weights_ptr + position, mask=is_entry, other=0.0)
                tl.store(grad_weights_ptr + position, product, mask=is_entry)

            one_hot = tl.where(rank[None, :] == ranks[:, None], weights[None, :], 0.0)  # [rank, entry]
            sums = _weighted_sum(one_hot, rows, carry)
            still_open = tl.where((rank - num_ended)[None, :] == ranks[:, None], weights[None, :], 0.0)
            carry = _weighted_sum(still_open, rows, tl.where(num_ended == 0, carry, 0.0))

            ended_slot = tl.sum(tl.where((rank[None, :] == ranks[:, None]) & (ends[None, :] > 0), slots[None, :], 0), 1)
            # The run that an earlier chunk began goes to the partial sums.
            whole = (ranks < num_ended) & ((ranks > 0) | (is_cut == 0))
            out = grad_bank_ptr + ended_slot.to(tl.int64)[:, None] * width + channels[None, :]
            mask = whole[:, None] & in_row[None, :]
            if ADD:
                sums_out = sums + tl.load(out, mask=mask, other=0.0).to(tl.float32)
            else:
                sums_out = sums
            tl.store(out, sums_out.to(grad_bank_ptr.dtype.element_ty), mask=mask)
            to_partial = is_cut & (num_ended > 0)
            head = partial_rows_ptr + 2 * chunk * width + channels[None, :] + ranks[:, None] * 0
            tl.store(head, sums, mask=(ranks == 0)[:, None] & in_row[None, :] & to_partial)
            is_cut = is_cut & (num_ended == 0)
        tail = partial_rows_ptr + (2 * chunk + 1) * width + channels[None, :] + ranks[:, None] * 0
        tl.store(tail, carry, mask=(ranks == 0)[:, None] & in_row[None, :])


@triton.jit
def _add_atomically_kernel(
    slots_ptr, weights_ptr, rows_ptr, bank_ptr, grad_bank_ptr, grad_weights_ptr,
    num_entries, width,
    PER_ROW: tl.constexpr, TILE: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    entries = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    is_entry = entries < num_entries
    slots = tl.load(slots_ptr + entries, mask=is_entry, other=0).to(tl.int64)
    weights = tl.load(weights_ptr + entries, mask=is_entry, other=0.0)
    product = tl.zeros([TILE], tl.float32)
    for begin_w in range(0, width, BLOCK_W):
        channels = begin_w + tl.arange(0, BLOCK_W)
        mask = is_entry[:, None] & (channels < width)[None, :]
        row_offset = (entries // PER_ROW)[:, None] * width + channels[None, :]
        rows = tl.load(rows_ptr + row_offset, mask=mask, other=0.0).to(tl.float32)
        bank_offset = slots[:, None] * width + channels[None, :]
        product += tl.sum(rows * tl.load(bank_ptr + bank_offset, mask=mask, other=0.0).to(tl.float32), 1)
        tl.atomic_add(grad_bank_ptr + bank_offset, weights[:, None] * rows, mask=mask, sem="relaxed")
    tl.store(grad_weights_ptr + entries, product, mask=is_entry)
