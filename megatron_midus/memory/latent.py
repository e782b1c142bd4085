"""The latent value bank: V split on its columns over the tensor-parallel ranks, and what travels between them.

Every rank reads its columns for the slots of all heads, so the selections of all ranks are gathered before, and the
columns of each head's result are brought together after. The gradient of V is complete where it lies.
Shapes: T tokens, M memory heads, K slots a head reads, L columns of V, p tensor-parallel ranks.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.mappings import all_to_all, gather_from_sequence_parallel_region

from megatron_midus.ops import aggregate_values


def read_latent_bank(
    values: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    *,
    sum_heads: bool,
    dtype: torch.dtype,
    group: torch.distributed.ProcessGroup,
    backend: str = "auto",
) -> torch.Tensor:
    """Reads a bank of which every rank of ``group`` holds L/p columns.

    Bytes that a rank receives, ``f = (p - 1) / p``: 8 a slot for indices and weights and 4 for the gradient of the
    weights, ``12 f T M K``; and for the result and its gradient ``2 f T M L/p`` elements of ``dtype``.

    Args:
        values: ``[N*N, L/p]``.
        indices: ``[T, M/p, K]`` of this rank's heads.
        weights: ``[T, M/p, K]``; their gradient is summed over the ranks' columns.
        sum_heads: add up the results of all heads (variant block), which leaves nothing to bring together.
        dtype: of the result, in which it travels, too.

    Returns:
        ``[T, M/p, L]`` of this rank's heads; with ``sum_heads`` this rank's columns of the sum, ``[T, 1, L/p]``.
    """
    ranks = group.size()
    indices = gather_from_sequence_parallel_region(indices, group=group)  # [p*T, M/p, K]
    weights = gather_from_sequence_parallel_region(weights, group=group)
    tokens, heads, topk = indices.shape[0] // ranks, indices.shape[1], indices.shape[2]
    if sum_heads:
        indices, weights = (
            gathered.view(ranks, tokens, heads * topk).transpose(0, 1).reshape(tokens, ranks * heads * topk)
            for gathered in (indices, weights)
        )
        return aggregate_values(values, indices, weights, backend=backend).to(dtype)[:, None]
    found = aggregate_values(values, indices.view(-1, topk), weights.view(-1, topk), backend=backend)
    # Rank r's heads are the r-th part of the first axis, so no axis has to move before the exchange.
    found = all_to_all(group, found.to(dtype).view(ranks * tokens, heads, -1))  # [p*T, M/p, L/p], columns by source
    return found.view(ranks, tokens, heads, -1).permute(1, 2, 0, 3).reshape(tokens, heads, -1)
