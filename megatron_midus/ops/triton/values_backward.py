"""Gradients of the value bank, of the head projection and of the weights of the selected slots.

The bank's gradient is a scatter of T * H * K rows. The deterministic way sorts the selected slots (stable), cuts the
sorted list into chunks of equal length, whatever slots they hold, and sums each run of one slot within its chunk, in
order, in fp32 registers. A run that a chunk's border cuts leaves one partial sum per chunk, and a second kernel adds
those in order. So a slot that every token selects is as much work as any other entries, the order of summation is fixed
by the input alone, and the weights' gradient, one dot product per selection, comes from the same rows.

Shapes: T tokens, H memory heads, K top-k, L latent, N sub-keys per half; S = T*H*K selections; R rows of the flattened
bank of W channels; B rows of the gradient that reaches the bank, J selections each (hive, full: B = T*H, J = K;
block: B = T, J = H*K).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megatron_midus.errors import UserError
from megatron_midus.ops.triton.projection_backward import projection_backward

CHUNK = 64  # sorted selections that are summed one after the other
TILE_ELEMENTS = 128  # elements that a program holds: chunks side by side times channels
MAX_BLOCK_W = 256  # channels of the bank's rows taken at a time
CUT_TILE = 16  # chunks of one long run taken at a time
ATOMIC_TILE = 64  # selections that one program adds with atomics
ATOMIC_BLOCK_W = 64


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
        raise UserError(
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
    num_entries = slots.numel()
    block_w = min(MAX_BLOCK_W, max(16, triton.next_power_of_2(width)))
    group = max(1, TILE_ELEMENTS // block_w)
    chunk = CHUNK * triton.cdiv(width, block_w)  # longer for wide rows: a chunk leaves two rows of partial sums
    chunks = triton.cdiv(num_entries, chunk)
    # What a chunk holds of the run that its first border cuts, and of the one that its last border cuts.
    heads, tails = torch.empty(2, chunks, width, dtype=torch.float32, device=bank.device)
    _sum_runs_kernel[(triton.cdiv(chunks, group),)](
        slots, order, weights, rows, bank, grad_bank, grad_weights, heads, tails,
        num_entries, width,
        PER_ROW=num_entries // rows.shape[0], ADD=add, OFFSET=_offset_type(rows, bank, heads),
        FULL=num_entries % (chunk * group) == 0, FULL_W=width % block_w == 0,
        CHUNK=chunk, GROUP=group, BLOCK_W=block_w, num_warps=1,
    )  # fmt: skip
    _sum_cut_runs_kernel[(chunks, triton.cdiv(width, block_w))](
        slots, heads, tails, grad_bank, num_entries, chunks, width,
        ADD=add, OFFSET=_offset_type(bank, heads), CHUNK=chunk, TILE=CUT_TILE, BLOCK_W=block_w, num_warps=1,
    )  # fmt: skip


def _offset_type(*tensors: torch.Tensor) -> tl.dtype:
    """int64 where an offset passes 2**31: N * L and T * H * L do at large sizes; int32 is half the work elsewhere."""
    return tl.int64 if max(tensor.numel() for tensor in tensors) >= 2**31 else tl.int32


def _add_atomically(slots, weights, rows, bank, grad_bank, grad_weights) -> None:
    """As ``_sum_sorted``, added to fp32 ``grad_bank`` in no fixed order."""
    width = bank.shape[1]
    _add_atomically_kernel[(triton.cdiv(slots.numel(), ATOMIC_TILE),)](
        slots, weights, rows, bank, grad_bank, grad_weights,
        slots.numel(), width,
        PER_ROW=slots.numel() // rows.shape[0], TILE=ATOMIC_TILE,
        BLOCK_W=min(ATOMIC_BLOCK_W, max(16, triton.next_power_of_2(width))), num_warps=4,
    )  # fmt: skip


@triton.jit
def _sum_runs_kernel(
    slots_ptr, order_ptr, weights_ptr, rows_ptr, bank_ptr, grad_bank_ptr, grad_weights_ptr, heads_ptr, tails_ptr,
    num_entries, width,
    PER_ROW: tl.constexpr, ADD: tl.constexpr, OFFSET: tl.constexpr, FULL: tl.constexpr, FULL_W: tl.constexpr,
    CHUNK: tl.constexpr, GROUP: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Sums of the runs of one slot within each of GROUP chunks of sorted entries, which advance side by side."""
    chunk = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    start = chunk * CHUNK
    end = tl.minimum(start + CHUNK, num_entries)
    before = tl.load(slots_ptr + start - 1, mask=(start > 0) & (start < end), other=-1)
    for begin_w in range(0, width, BLOCK_W):
        channels = begin_w + tl.arange(0, BLOCK_W)
        in_row = ((tl.arange(0, BLOCK_W) >= 0) if FULL_W else (channels < width))[None, :]
        partial_offset = chunk.to(OFFSET)[:, None] * width + channels[None, :]
        tl.debug_barrier()  # other threads of this program read the products stored for the previous channels
        head = tl.zeros([GROUP, BLOCK_W], tl.float32)
        total = tl.zeros([GROUP, BLOCK_W], tl.float32)
        bank_row = tl.zeros([GROUP, BLOCK_W], bank_ptr.dtype.element_ty)
        slot = tl.load(slots_ptr + start, mask=start < end, other=-1)
        begins = start < end
        position = tl.load(order_ptr + start, mask=start < end, other=0).to(tl.int32)
        for step in range(CHUNK):
            entry = start + step
            is_entry = (tl.arange(0, GROUP) >= 0) if FULL else (entry < end)
            slot_offset = slot.to(OFFSET)[:, None] * width + channels[None, :]
            bank_row = tl.load(bank_ptr + slot_offset, mask=(begins & is_entry)[:, None] & in_row, other=bank_row)
            weight = tl.load(weights_ptr + position, mask=is_entry, other=0.0)
            row_offset = (position // PER_ROW).to(OFFSET)[:, None] * width + channels[None, :]
            row = tl.load(rows_ptr + row_offset, mask=is_entry[:, None] & in_row, other=0.0).to(tl.float32)
            following = tl.load(slots_ptr + entry + 1, mask=entry + 1 < num_entries, other=-1)
            next_position = tl.load(order_ptr + entry + 1, mask=entry + 1 < num_entries, other=0).to(tl.int32)
            product = tl.sum(row * bank_row.to(tl.float32), 1)
            if begin_w > 0:
                product += tl.load(grad_weights_ptr + position, mask=is_entry, other=0.0)
            tl.store(grad_weights_ptr + position, product, mask=is_entry)

            total = tl.where(begins[:, None], 0.0, total) + weight[:, None] * row
            ends = is_entry & (slot != following)
            is_cut = slot == before  # the run began in an earlier chunk
            head = tl.where((is_cut & is_entry)[:, None], total, head)
            mask = (ends & (is_cut == 0))[:, None] & in_row
            whole = total
            if ADD:
                whole += tl.load(grad_bank_ptr + slot_offset, mask=mask, other=0.0).to(tl.float32)
            tl.store(grad_bank_ptr + slot_offset, whole.to(grad_bank_ptr.dtype.element_ty), mask=mask)
            begins = slot != following
            slot, position = following, next_position
        mask = (start < end)[:, None] & in_row
        tl.store(heads_ptr + partial_offset, head, mask=mask)
        tl.store(tails_ptr + partial_offset, total, mask=mask)


@triton.jit
def _sum_cut_runs_kernel(
    slots_ptr, heads_ptr, tails_ptr, grad_bank_ptr,
    num_entries, num_chunks, width,
    ADD: tl.constexpr, OFFSET: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """The sum of the run that begins in this chunk and goes on in the next: this tail and all heads that follow."""
    chunk = tl.program_id(0)
    start = chunk * CHUNK
    end = tl.minimum(start + CHUNK, num_entries)
    slot = tl.load(slots_ptr + end - 1)
    before = tl.load(slots_ptr + start - 1, mask=start > 0, other=-1)
    after = tl.load(slots_ptr + end, mask=end < num_entries, other=-1)
    if (slot != before) & (slot == after):
        channels = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
        in_row = channels < width
        total = tl.load(tails_ptr + chunk.to(OFFSET) * width + channels, mask=in_row, other=0.0)
        next_chunk = chunk + 1
        more = True
        while more:
            chunks = next_chunk + tl.arange(0, TILE)
            first_slot = tl.load(slots_ptr + chunks * CHUNK, mask=chunks < num_chunks, other=-1)
            mask = (first_slot == slot)[:, None] & in_row[None, :]
            offset = chunks.to(OFFSET)[:, None] * width + channels[None, :]
            total += tl.sum(tl.load(heads_ptr + offset, mask=mask, other=0.0), 0)
            next_chunk += TILE
            more = tl.load(slots_ptr + next_chunk * CHUNK, mask=next_chunk < num_chunks, other=-1) == slot
        out = grad_bank_ptr + slot.to(OFFSET) * width + channels
        if ADD:
            total += tl.load(out, mask=in_row, other=0.0).to(tl.float32)
        tl.store(out, total.to(grad_bank_ptr.dtype.element_ty), mask=in_row)


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
