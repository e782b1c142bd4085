"""The definition of the head-wise memory in plain torch: any floating dtype, differentiable by autograd, not fast.

Shapes: T tokens, H memory heads, D channels of one head's query, N sub-keys per half (N * N slots), K top-k, L latent.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

RMS_EPSILON = 1e-6


def transform_query(
    query_THD: torch.Tensor,
    query_norm_HD: torch.Tensor | None = None,
    log_temperature_H: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalises and scales each head's query before the look-up; without parameters the query is returned as it is.

    ``q / sqrt(mean(q^2) + 1e-6) * query_norm[h] * exp(log_temperature[h])``, computed in fp32 at least.

    Args:
        query_THD: ``[T, H, D]``.
        query_norm_HD: ``[H, D]`` scale of the root-mean-square norm; ``None`` = no norm.
        log_temperature_H: ``[H]`` logarithm of the factor on the scores; ``None`` = 1.

    Returns:
        ``[T, H, D]`` in the dtype of ``query_THD``.
    """
    if query_norm_HD is None and log_temperature_H is None:
        return query_THD
    out = query_THD.to(compute_dtype(query_THD))
    if query_norm_HD is not None:
        out = _unit_rms(out) * query_norm_HD
    if log_temperature_H is not None:
        out = out * log_temperature_H.to(out.dtype).exp()[:, None]
    return out.to(query_THD.dtype)


def unit_rms(query_THD: torch.Tensor) -> torch.Tensor:
    """``q / sqrt(mean(q^2) + 1e-6)`` of each head, computed in fp32 at least and returned in the dtype given."""
    return _unit_rms(query_THD.to(compute_dtype(query_THD))).to(query_THD.dtype)


def _unit_rms(query_THD: torch.Tensor) -> torch.Tensor:
    return query_THD * torch.rsqrt(query_THD.square().mean(-1, keepdim=True) + RMS_EPSILON)


def select_slots(
    query_THD: torch.Tensor, row_keys_HND: torch.Tensor, col_keys_HND: torch.Tensor, *, topk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact top-k of the N * N slots of each head, found through the top-k of each half (Lample et al. 2019, section 3.1).

    Slot ``(i, j)`` has the index ``i * N + j`` and the score ``row_keys[i] . q[:D/2] + col_keys[j] . q[D/2:]``.

    Returns:
        ``(indices int64 [T, H, K], scores [T, H, K])``, best first; scores in fp32 at least, with gradient.
    """
    dtype = compute_dtype(query_THD, row_keys_HND, col_keys_HND)
    num_keys = row_keys_HND.shape[1]
    row_query, col_query = query_THD.to(dtype).chunk(2, dim=-1)  # [T, H, D/2] each
    row_scores = torch.einsum("thd,hnd->thn", row_query, row_keys_HND.to(dtype))
    col_scores = torch.einsum("thd,hnd->thn", col_query, col_keys_HND.to(dtype))
    row_best, row_index = row_scores.topk(topk, dim=-1)  # [T, H, K]
    col_best, col_index = col_scores.topk(topk, dim=-1)
    sums = row_best[..., :, None] + col_best[..., None, :]  # [T, H, K, K]
    slots = row_index[..., :, None] * num_keys + col_index[..., None, :]
    scores, position = sums.flatten(-2).topk(topk, dim=-1)
    return slots.flatten(-2).gather(-1, position), scores


def activate_scores(scores_THK: torch.Tensor, score_activation: str) -> torch.Tensor:
    """Weights of the selected slots: ``softmax`` over the K scores, or ``sigmoid`` or ``relu`` of each."""
    if score_activation == "softmax":
        return scores_THK.softmax(-1)
    return scores_THK.sigmoid() if score_activation == "sigmoid" else scores_THK.relu()


def weigh_slots(
    query_THD: torch.Tensor,
    row_keys_HND: torch.Tensor,
    col_keys_HND: torch.Tensor,
    *,
    topk: int,
    score_activation: str = "softmax",
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``megatron_midus.ops.weigh_slots``: the first half of ``head_wise_memory``."""
    index, scores = select_slots(query_THD, row_keys_HND, col_keys_HND, topk=topk)
    return index.int(), activate_scores(scores, score_activation)


def aggregate_values(values_SW: torch.Tensor, index_BJ: torch.Tensor, weights_BJ: torch.Tensor) -> torch.Tensor:
    """As ``megatron_midus.ops.aggregate_values``: the second half, for a bank that all bags share."""
    return torch.einsum("bj,bjw->bw", weights_BJ, F.embedding(index_BJ, values_SW.to(weights_BJ.dtype)))


def activation_backward(
    grad_weights_THK: torch.Tensor, weights_THK: torch.Tensor, score_activation: str
) -> torch.Tensor:
    """Gradient of the scores; all three derivatives follow from the weights alone. May overwrite ``grad_weights_THK``."""
    if score_activation == "softmax":
        return torch._softmax_backward_data(grad_weights_THK, weights_THK, -1, weights_THK.dtype)
    if score_activation == "sigmoid":
        return grad_weights_THK.mul_(weights_THK).mul_(1 - weights_THK)
    return grad_weights_THK.mul_(weights_THK > 0)


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
) -> torch.Tensor:
    """The maths of ``megatron_midus.ops.head_wise_memory``, where arguments and shapes are explained and checked."""
    dtype = compute_dtype(query_THD, row_keys_HND, col_keys_HND, values, head_proj)
    index, scores = select_slots(query_THD.to(dtype), row_keys_HND, col_keys_HND, topk=topk)
    weights = activate_scores(scores, score_activation)  # [T, H, K]
    if observer is not None:
        observer(index.int(), weights.detach())
    values = values.to(dtype)
    # Rows come from F.embedding, whose gradient is the same from run to run, unlike that of an index on several threads.
    if variant == "hive":
        assert head_proj is not None
        latent = torch.einsum("thk,thkl->thl", weights, F.embedding(index, values))
        out = torch.einsum("thl,hlo->tho", latent, head_proj.to(dtype))
    elif variant == "full":
        first = torch.arange(values.shape[0], device=index.device)[:, None] * values.shape[1]  # [H, 1]: a head's slot 0
        out = torch.einsum("thk,thko->tho", weights, F.embedding(first + index, values.flatten(0, 1)))
    else:
        out = torch.einsum("thk,thkd->td", weights, F.embedding(index, values))[:, None]
    return out.to(query_THD.dtype)


def compute_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """fp32, or fp64 when any of the tensors is."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
