"""Backend "torch": the head-wise memory as one autograd function made of the fastest pieces that plain torch has.

Selected slots and weights are kept head-major, [H, T, K], and read as bags: hive [H*T, K] and block [T, H*K] against one
bank, full [T, K] per head against its own. Nothing of the size [T, H, N] or [T, H, K, width] is ever held.
Shapes: T tokens, H memory heads, D channels of one head's query, N sub-keys per half, K top-k, L latent; B bags of J
entries; W width of a bank's rows; c tokens of a chunk.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from megatron_midus.ops import selection
from megatron_midus.ops.reference import activate_scores, compute_dtype

CHUNK_SELECTIONS = 1 << 20  # slots handled at a time; a chunk's temporaries take about 100 bytes each
FEW_LOOKUPS = 512
MAX_SEGMENT = 1024  # entries summed one after the other; longer runs are split, for balance and for accuracy
GATHERED_ELEMENTS = 1 << 24  # elements of a gather where sampled_addmm cannot be used


def unsupported_reason(
    query_THD: torch.Tensor, *others: torch.Tensor | None, topk: int, variant: str, **settings: Any
) -> str | None:
    """Why this backend cannot run, ``None`` when it can."""
    if query_THD.device.type not in ("cpu", "cuda"):
        return f"it knows cpu and cuda, not {query_THD.device.type}; choose reference"
    return None


def head_wise_memory(
    query_THD: torch.Tensor,
    row_keys_HND: torch.Tensor,
    col_keys_HND: torch.Tensor,
    values: torch.Tensor,
    head_proj: torch.Tensor | None,
    *,
    topk: int,
    variant: str = "hive",
    score_activation: str = "softmax",
    observer: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
    pieces: Pieces | None = None,
) -> torch.Tensor:
    """As ``megatron_midus.ops.head_wise_memory``; gradients are the same from run to run."""
    tensors = (query_THD, row_keys_HND, col_keys_HND, values, head_proj)
    settings = _Settings(topk, variant, score_activation, observer, pieces or _PIECES)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _HeadWiseMemory.apply(*tensors, settings)
    return _look_up(*tensors, settings)[0]


def select_slots(
    query_THD: torch.Tensor, row_keys_HND: torch.Tensor, col_keys_HND: torch.Tensor, *, topk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(indices int32 [T, H, K], scores [T, H, K])``, best first."""
    dtype = compute_dtype(query_THD, row_keys_HND, col_keys_HND)
    indices, scores = selection.select_slots(query_THD, row_keys_HND, col_keys_HND, topk=topk, dtype=dtype)
    return indices.transpose(0, 1).contiguous(), scores.transpose(0, 1).contiguous()


def weigh_slots(
    query_THD: torch.Tensor,
    row_keys_HND: torch.Tensor,
    col_keys_HND: torch.Tensor,
    *,
    topk: int,
    score_activation: str = "softmax",
    pieces: Pieces | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``megatron_midus.ops.weigh_slots``."""
    return _WeighSlots.apply(query_THD, row_keys_HND, col_keys_HND, topk, score_activation, pieces or _PIECES)


def aggregate_values(
    values_SW: torch.Tensor, index_BJ: torch.Tensor, weights_BJ: torch.Tensor, *, pieces: Pieces | None = None
) -> torch.Tensor:
    """As ``megatron_midus.ops.aggregate_values``; gradients are the same from run to run."""
    return _AggregateValues.apply(values_SW, index_BJ, weights_BJ, pieces or _PIECES)


class Pieces(NamedTuple):
    """What a backend for the CPU may do its own way; signatures as of the functions in ``_PIECES`` below."""

    select_slots: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    row_products: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    scatter_rows: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
    backward_keys: Callable[..., tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]]


class _Settings(NamedTuple):
    topk: int
    variant: str
    score_activation: str
    observer: Callable[[torch.Tensor, torch.Tensor], None] | None
    pieces: Pieces


def _look_up(
    query: torch.Tensor,
    row_keys: torch.Tensor,
    col_keys: torch.Tensor,
    values: torch.Tensor,
    head_proj: torch.Tensor | None,
    settings: _Settings,
    keep_latent: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """``(out, slots int32 [H, T, K], weights [H, T, K], latent sums [H, T, L])``, the last where they are to be kept."""
    dtype = compute_dtype(query, row_keys, col_keys, values, head_proj)
    index, scores = settings.pieces.select_slots(query, row_keys, col_keys, topk=settings.topk, dtype=dtype)
    weights = activate_scores(scores, settings.score_activation)
    if settings.observer is not None:
        settings.observer(index.transpose(0, 1), weights.detach().transpose(0, 1))
    tokens, heads, _ = query.shape
    if head_proj is not None and tokens * heads <= FEW_LOOKUPS:  # one part; of a decoding step, each call counts
        bank, slots = widened(values, index.view(-1), dtype)
        starts = _bag_starts(tokens * heads, settings.topk, index.device)
        latent = torch.embedding_bag(bank, slots, starts, False, 0, False, weights.view(-1))[0]  # mode 0: sum
        latent = latent.view(heads, tokens, values.shape[1])
        out = torch.bmm(latent, head_proj.to(dtype)).transpose(0, 1)
        return out.to(query.dtype).contiguous(), index, weights, latent if keep_latent else None
    width = values.shape[-1] if head_proj is None else head_proj.shape[2]
    out = query.new_empty(tokens, 1 if settings.variant == "block" else heads, width)
    proj = None if head_proj is None else head_proj.to(dtype)
    latents = []
    for part in _parts(values, index, settings.variant, dtype):
        pooled = _pool_rows(part.bank, part.bags(index), part.bags(weights))
        pooled = pooled.view(part.num_outputs, -1, values.shape[-1])  # [H, c, W]
        if keep_latent:
            latents.append(pooled)
        pooled = pooled if proj is None else torch.bmm(pooled, proj)
        out[part.tokens, part.outputs] = pooled.transpose(0, 1)
    return out, index, weights, torch.cat(latents, 1) if len(latents) > 1 else latents[0] if latents else None


class _HeadWiseMemory(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, row_keys, col_keys, values, head_proj, settings):
        # The latent sums are as large as the output; to read the bank again would take a tenth of the backward pass.
        keep_latent = head_proj is not None and ctx.needs_input_grad[4]
        out, index, weights, latent = _look_up(query, row_keys, col_keys, values, head_proj, settings, keep_latent)
        ctx.save_for_backward(query, row_keys, col_keys, values, head_proj, index, weights, latent)
        ctx.settings = settings
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        query, row_keys, col_keys, values, head_proj, index, weights, latent = ctx.saved_tensors
        needs_query, needs_rows, needs_cols, needs_values, *_ = ctx.needs_input_grad
        needs_scores = needs_query or needs_rows or needs_cols
        with torch.autocast(query.device.type, enabled=False):
            grad_values, grad_proj, grad_weights = _backward_values(
                grad_out, values, head_proj, index, weights, latent, ctx.settings, needs_values, needs_scores
            )  # fmt: skip
            grad_query = grad_rows = grad_cols = None
            if needs_scores:
                grad_scores = _activation_backward(grad_weights, weights, ctx.settings.score_activation)
                grad_query, grad_rows, grad_cols = ctx.settings.pieces.backward_keys(
                    grad_scores, query, row_keys, col_keys, index, weights.dtype, needs_query, needs_rows or needs_cols
                )
        return (
            grad_query,
            grad_rows if needs_rows else None,
            grad_cols if needs_cols else None,
            grad_values,
            grad_proj,
            None,
        )


class _WeighSlots(torch.autograd.Function):
    """The look-up up to the weights, for a caller that moves them before values are read."""

    @staticmethod
    def forward(ctx, query, row_keys, col_keys, topk, score_activation, pieces):
        dtype = compute_dtype(query, row_keys, col_keys)
        index, scores = pieces.select_slots(query, row_keys, col_keys, topk=topk, dtype=dtype)
        weights = activate_scores(scores, score_activation)
        ctx.save_for_backward(query, row_keys, col_keys, index, weights)
        ctx.score_activation, ctx.pieces = score_activation, pieces
        index_THK = index.transpose(0, 1).contiguous()
        ctx.mark_non_differentiable(index_THK)
        return index_THK, weights.transpose(0, 1).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, _, grad_weights):
        query, row_keys, col_keys, index, weights = ctx.saved_tensors
        needs_query, needs_rows, needs_cols, *_ = ctx.needs_input_grad
        with torch.autocast(query.device.type, enabled=False):
            # A copy: the gradient of the activation is made in place.
            grad_weights = grad_weights.to(weights.dtype).transpose(0, 1).clone(memory_format=torch.contiguous_format)
            grad_scores = _activation_backward(grad_weights, weights, ctx.score_activation)
            grad_query, grad_rows, grad_cols = ctx.pieces.backward_keys(
                grad_scores, query, row_keys, col_keys, index, weights.dtype, needs_query, needs_rows or needs_cols
            )
        return grad_query, grad_rows if needs_rows else None, grad_cols if needs_cols else None, None, None, None


class _AggregateValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, index_BJ, weights_BJ, pieces):
        ctx.save_for_backward(values, index_BJ, weights_BJ)
        ctx.pieces = pieces
        out = weights_BJ.new_empty(len(index_BJ), values.shape[1])
        bank = _bank(values, index_BJ, weights_BJ.dtype)
        for part in _chunks(len(index_BJ), index_BJ.shape[1]):
            out[part] = _pool_rows(bank, index_BJ[part], weights_BJ[part])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        values, index, weights = ctx.saved_tensors
        needs_values, _, needs_weights, _ = ctx.needs_input_grad
        grad_values = None
        grad_weights = torch.empty_like(weights) if needs_weights else None
        bank = _bank(values, index, weights.dtype)
        with torch.autocast(weights.device.type, enabled=False):
            for part in _chunks(len(index), index.shape[1]):
                rows = grad_out[part].to(weights.dtype).contiguous()  # [B, W]
                if grad_weights is not None:
                    grad_weights[part] = ctx.pieces.row_products(bank, index[part], rows)
                if needs_values:
                    added = ctx.pieces.scatter_rows(index[part], weights[part], rows, len(values))
                    grad_values = added if grad_values is None else grad_values.add_(added)
        if needs_values and grad_values is None:  # no bag
            grad_values = _zeros(values, weights.dtype)
        return None if grad_values is None else grad_values.to(values.dtype), None, grad_weights, None


def _bank(values: torch.Tensor, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The bank in ``dtype`` where more rows are read than there are; else ``_pool_rows`` widens the few."""
    return (values.detach().to(dtype) if index.numel() >= len(values) else values.detach()).contiguous()


# -- which bags read which bank --------------------------------------------------------------------------------------
class _Part(NamedTuple):
    """Tokens and heads that are handled together: they share one bank."""

    bank: torch.Tensor  # [rows, W]
    bank_index: int | None  # which bank of `values`; None = there is one
    heads: slice
    tokens: slice
    variant: str

    @property
    def outputs(self) -> slice:
        """Heads of the output."""
        return slice(0, 1) if self.variant == "block" else self.heads

    @property
    def num_outputs(self) -> int:
        return self.outputs.stop - self.outputs.start

    def bags(self, entries_HTK: torch.Tensor) -> torch.Tensor:
        """Entries of this part as ``[B, J]``."""
        entries = entries_HTK[self.heads, self.tokens]
        if self.variant == "block":
            return entries.transpose(0, 1).flatten(1).contiguous()
        return entries.reshape(-1, entries.shape[-1])

    def unbag(self, entries_BJ: torch.Tensor, topk: int) -> torch.Tensor:
        """Inverse of ``bags``: ``[H, c, K]``."""
        if self.variant == "block":
            return entries_BJ.view(entries_BJ.shape[0], -1, topk).transpose(0, 1)
        return entries_BJ.view(self.heads.stop - self.heads.start, -1, topk)


def _parts(values: torch.Tensor, index_HTK: torch.Tensor, variant: str, dtype: torch.dtype) -> Iterator[_Part]:
    heads, tokens, topk = index_HTK.shape
    groups = [slice(h, h + 1) for h in range(heads)] if variant == "full" else [slice(0, heads)]
    for group in groups:
        bank_index = group.start if variant == "full" else None
        bank = (values if bank_index is None else values[bank_index]).detach()
        num_heads = group.stop - group.start
        if num_heads * tokens * topk >= bank.shape[0]:  # else _pool_rows widens the few rows that are read
            bank = bank.to(dtype)
        for chunk in _chunks(tokens, num_heads * topk):
            yield _Part(bank.contiguous(), bank_index, group, chunk, variant)


def _chunks(tokens: int, per_token: int) -> Iterator[slice]:
    step = max(1, CHUNK_SELECTIONS // per_token)
    for begin in range(0, tokens, step):
        yield slice(begin, min(begin + step, tokens))


# -- backward --------------------------------------------------------------------------------------------------------
def _backward_values(grad_out, values, head_proj, index, weights, latent_HTL, settings, needs_values, needs_weights):
    """Gradients of the bank, of the head projection and of the weights ``[H, T, K]``; ``None`` where not needed."""
    dtype = weights.dtype
    grad_values = None
    grad_proj = None if latent_HTL is None else _zeros(head_proj, dtype)
    grad_weights = torch.empty_like(weights) if needs_weights else None
    proj = None if head_proj is None else head_proj.to(dtype)
    for part in _parts(values, index, settings.variant, dtype):
        bags, bag_weights = part.bags(index), part.bags(weights)
        grad_pooled = grad_out[part.tokens, part.outputs].to(dtype).transpose(0, 1)  # [H, c, d_o]
        if grad_proj is not None:
            grad_proj.baddbmm_(latent_HTL[:, part.tokens].transpose(1, 2), grad_pooled)
        if proj is not None:
            grad_pooled = torch.bmm(grad_pooled, proj.transpose(1, 2))  # [H, c, L]
        rows = grad_pooled.reshape(len(bags), -1)  # [B, W]
        if grad_weights is not None:
            products = settings.pieces.row_products(part.bank, bags, rows)
            grad_weights[part.heads, part.tokens] = part.unbag(products, settings.topk)
        if needs_values:
            added = settings.pieces.scatter_rows(bags, bag_weights, rows, len(part.bank))
            if grad_values is None:  # the only bank's first one is taken as it is: no pass over zeros of its size
                grad_values = added if part.bank_index is None else _zeros(values, dtype)
            if grad_values is not added:
                grad_values[() if part.bank_index is None else part.bank_index] += added
    if needs_values and grad_values is None:  # no token
        grad_values = _zeros(values, dtype)
    cast = [None if g is None else g.to(like.dtype) for g, like in ((grad_values, values), (grad_proj, head_proj))]
    return *cast, grad_weights


def _zeros(like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(like.shape, dtype=dtype, device=like.device)


def _activation_backward(grad_weights: torch.Tensor, weights: torch.Tensor, score_activation: str) -> torch.Tensor:
    """Gradient of the scores; all three derivatives follow from the weights alone. Overwrites ``grad_weights``."""
    if score_activation == "softmax":
        return torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
    if score_activation == "sigmoid":
        return grad_weights.mul_(weights).mul_(1 - weights)
    return grad_weights.mul_(weights > 0)


def _backward_keys(grad_scores_HTK, query, row_keys, col_keys, index, dtype, needs_query, needs_keys):
    """Gradients of the query and of both halves of the sub-keys.

    A slot's score is the sum of two products, so both halves see the same gradient. They are handled as one: a query is
    two rows of D/2 channels, and the sub-keys of both halves and all heads are the rows of one table.
    """
    heads, num_keys, width = row_keys.shape
    topk = index.shape[-1]
    keys = torch.stack([row_keys, col_keys], 1).to(dtype).view(-1, width)  # [H * 2 * N, D/2]
    grad_query = torch.empty_like(query, memory_format=torch.contiguous_format) if needs_query else None
    grad_keys = torch.zeros_like(keys) if needs_keys else None
    first_key = torch.arange(0, len(keys), 2 * num_keys, dtype=torch.int32, device=index.device)[:, None, None]
    for tokens in _chunks(len(query), 2 * heads * topk):
        slots = index[:, tokens]
        row = torch.div(slots, num_keys, rounding_mode="floor")
        col = slots - row * num_keys
        used = torch.stack([row + first_key, col + (first_key + num_keys)], 2).view(-1, topk)  # [H * c * 2, K]
        weights = grad_scores_HTK[:, tokens, None].expand(-1, -1, 2, -1).reshape(-1, topk)
        if grad_query is not None:
            found = F.embedding_bag(used, keys, per_sample_weights=weights, mode="sum")  # [H * c * 2, D/2]
            grad_query[tokens] = found.view(heads, -1, 2 * width).transpose(0, 1)
        if grad_keys is not None:
            rows = query[tokens].to(dtype).transpose(0, 1).reshape(-1, width)  # [H * c * 2, D/2]
            grad_keys += _scatter_rows(used, weights, rows, len(keys))
    if grad_keys is None:
        return grad_query, None, None
    both = grad_keys.view(heads, 2, num_keys, width)
    return grad_query, both[:, 0].to(row_keys.dtype), both[:, 1].to(col_keys.dtype)


# -- pieces ----------------------------------------------------------------------------------------------------------
def widened(bank: torch.Tensor, index: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Bank and index in ``dtype``: of a narrower bank only the rows that are read."""
    if bank.dtype == dtype:
        return bank, index
    rows = bank.index_select(0, index.flatten()).to(dtype)
    return rows, torch.arange(index.numel(), dtype=index.dtype, device=index.device).view(index.shape)


def _pool_rows(bank: torch.Tensor, index_BJ: torch.Tensor, weights_BJ: torch.Tensor) -> torch.Tensor:
    """``out[b] = sum_j weights[b, j] * bank[index[b, j]]``, ``[B, W]``."""
    bank, index_BJ = widened(bank, index_BJ, weights_BJ.dtype)
    return F.embedding_bag(index_BJ, bank, per_sample_weights=weights_BJ, mode="sum")


@functools.lru_cache(maxsize=64)
def _bag_starts(num_bags: int, entries: int, device: torch.device) -> torch.Tensor:
    return torch.arange(0, num_bags * entries, entries, dtype=torch.int32, device=device)


def _row_products(bank: torch.Tensor, index_BJ: torch.Tensor, rows_BW: torch.Tensor) -> torch.Tensor:
    """``out[b, j] = <rows[b], bank[index[b, j]]>``, ``[B, J]``."""
    bank, index_BJ = widened(bank, index_BJ, rows_BW.dtype)
    num_bags, entries = index_BJ.shape
    if bank.device.type == "cpu":
        starts = torch.arange(0, index_BJ.numel() + 1, entries, dtype=index_BJ.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            pattern = torch.sparse_csr_tensor(
                starts, index_BJ.flatten(), rows_BW.new_zeros(index_BJ.numel()), (num_bags, len(bank)),
                check_invariants=False,
            )  # fmt: skip
            return torch.sparse.sampled_addmm(pattern, rows_BW, bank.t(), beta=0).values().view(index_BJ.shape)
    out = rows_BW.new_empty(index_BJ.shape)
    step = max(1, GATHERED_ELEMENTS // (entries * bank.shape[1]))
    for begin in range(0, num_bags, step):
        part = slice(begin, begin + step)
        found = bank.index_select(0, index_BJ[part].flatten()).view(-1, entries, bank.shape[1])
        out[part] = torch.bmm(found, rows_BW[part, :, None])[..., 0]
    return out


def _scatter_rows(
    index_BJ: torch.Tensor, weights_BJ: torch.Tensor, rows_BW: torch.Tensor, num_rows: int
) -> torch.Tensor:
    """``out[index[b, j]] += weights[b, j] * rows[b]``, ``[num_rows, W]``; summed in the order of (b, j), always."""
    flat = index_BJ.flatten()
    order = torch.sort(flat, stable=True).indices
    counts = torch.bincount(flat, minlength=num_rows)
    bag = torch.arange(len(index_BJ), dtype=flat.dtype, device=flat.device)[:, None].expand(index_BJ.shape).flatten()
    source, weights = bag.index_select(0, order), weights_BJ.flatten().index_select(0, order)
    return _sum_runs(rows_BW, source, weights, counts)


def _sum_runs(
    rows_BW: torch.Tensor, index: torch.Tensor, weights: torch.Tensor | None, counts: torch.Tensor
) -> torch.Tensor:
    """Sums of consecutive runs of ``weights * rows[index]``, ``counts[r]`` entries in run r; empty runs give zero."""
    starts = counts.cumsum(0) - counts
    pieces = (counts + (MAX_SEGMENT - 1)) // MAX_SEGMENT
    if counts.max() <= MAX_SEGMENT:
        return F.embedding_bag(index, rows_BW, starts.to(index.dtype), per_sample_weights=weights, mode="sum")
    # A hot slot: cut its run into pieces, then sum the pieces of each run in order.
    run = torch.repeat_interleave(pieces)
    piece_in_run = torch.arange(len(run), device=run.device) - (pieces.cumsum(0) - pieces)[run]
    offsets = (starts[run] + MAX_SEGMENT * piece_in_run).to(index.dtype)
    partial = F.embedding_bag(index, rows_BW, offsets, per_sample_weights=weights, mode="sum")
    return _sum_runs(partial, torch.arange(len(partial), dtype=index.dtype, device=index.device), None, pieces)


_PIECES = Pieces(selection.select_slots, _row_products, _scatter_rows, _backward_keys)
