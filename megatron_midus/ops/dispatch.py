"""The public operators: checks their arguments, picks a backend and says why.

Shapes: T tokens, H memory heads, D channels of one head's query, N sub-keys per half (N * N slots), K top-k, L latent.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch

from megatron_midus.errors import UserError

logger = logging.getLogger(__name__)

# Called with a look-up's ``(indices int32 [T, H, K], weights [T, H, K])``, without gradient. They are the operator's own
# tensors and saved for the backward pass, so an observer must not write to them; they need not be contiguous.
Observer = Callable[[torch.Tensor, torch.Tensor], None]

VARIANTS = ("hive", "full", "block")
SCORE_ACTIVATIONS = ("softmax", "sigmoid", "relu")

# Name of a backend -> module with `head_wise_memory(...)`, its halves `weigh_slots(...)` and `aggregate_values(...)`, and
# `unsupported_reason(...) -> str | None`. A new one is a line here; "auto" takes the first that can run, so the fastest
# stands first and the definition last.
BACKENDS = {
    "triton": "megatron_midus.ops.triton.function",
    "numba": "megatron_midus.ops.numba.function",
    "torch": "megatron_midus.ops.cpu",
    "reference": "megatron_midus.ops.reference",
}


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
    backend: str = "auto",
    deterministic: bool = True,
    values_main_grad: torch.Tensor | None = None,
    observer: Observer | None = None,
) -> torch.Tensor:
    """Product-key memory with one look-up per head (Kim et al., MIDUS, arXiv 2512.13751).

    Per token and head the K best of N * N slots are read and summed with weights made of their scores; ``hive`` reads
    a latent bank that the heads share and projects per head: ``m[h] = (sum_j p_j values[idx_j]) head_proj[h]``.

    Args:
        query_THD: ``[T, H, D]``, D even; T may be 0.
        row_keys_HND: ``[H, N, D/2]``, matched with the first half of the query.
        col_keys_HND: ``[H, N, D/2]``, matched with the second half.
        values: ``hive`` ``[N*N, L]``; ``full`` ``[H, N*N, d_o]``; ``block`` ``[N*N, d]``.
        head_proj: ``hive`` ``[H, L, d_o]``; ``None`` for the others.
        topk: slots per head and token, K, at most N.
        variant: ``hive``, ``full`` or ``block`` (one bank, head outputs summed).
        score_activation: ``softmax``, ``sigmoid`` or ``relu`` turns the K scores into weights.
        backend: ``auto``, ``reference``, ``torch``, ``numba`` or ``triton``. ``auto`` takes the fastest that can run.
        deterministic: ask for gradients that are equal bit by bit from run to run. ``False`` merely allows otherwise.
        values_main_grad: fp32 buffer of the shape of ``values``, to which the backward pass adds their gradient;
            autograd then sees zeros. Backend ``triton`` alone; saves a pass over the bank and its gradient.
        observer: is shown the selected slots and their weights, every time that the look-up is computed.

    Returns:
        ``[T, H, d_o]``, for ``block`` ``[T, 1, d]``, in the dtype of the query. Scores, weights and sums are fp32 at
        least; autocast does not apply.

    Raises:
        ValueError: shapes that do not fit, or a backend that was named and cannot run.
    """
    check_arguments(
        query_THD, row_keys_HND, col_keys_HND, values, head_proj, topk=topk, variant=variant,
        score_activation=score_activation,
    )  # fmt: skip
    tensors = (query_THD, row_keys_HND, col_keys_HND, values, head_proj)
    settings: dict[str, Any] = {"topk": topk, "variant": variant, "score_activation": score_activation}
    name = choose_backend(backend, *tensors, **settings, deterministic=deterministic, values_main_grad=values_main_grad)
    if name not in ("numba", "torch", "reference"):
        settings["deterministic"] = deterministic
    if values_main_grad is not None:
        settings["values_main_grad"] = values_main_grad
    if observer is not None:
        settings["observer"] = observer
    if not torch.is_autocast_enabled(query_THD.device.type):  # a context costs as much as a few look-ups of one token
        return _module(name).head_wise_memory(*tensors, **settings)
    with torch.autocast(query_THD.device.type, enabled=False):
        return _module(name).head_wise_memory(*tensors, **settings)


def select_slots(
    query_THD: torch.Tensor, row_keys_HND: torch.Tensor, col_keys_HND: torch.Tensor, *, topk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The slots that ``head_wise_memory`` reads, for telemetry and analysis; no gradient.

    Returns:
        ``(indices int32 [T, H, K], scores [T, H, K])``, best first, scores in fp32 at least.
    """
    check_keys(query_THD, row_keys_HND, col_keys_HND, topk=topk)
    with torch.no_grad(), torch.autocast(query_THD.device.type, enabled=False):
        return _module("torch").select_slots(query_THD, row_keys_HND, col_keys_HND, topk=topk)


# -- the two halves of head_wise_memory, for a bank whose columns lie on several ranks -----------------------------
def weigh_slots(
    query_THD: torch.Tensor,
    row_keys_HND: torch.Tensor,
    col_keys_HND: torch.Tensor,
    *,
    topk: int,
    score_activation: str = "softmax",
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The slots that ``head_wise_memory`` reads and their weights, which carry the gradient of query and sub-keys.

    Args: as of ``head_wise_memory``.

    Returns:
        ``(indices int32 [T, H, K], weights [T, H, K])``, best first, weights in fp32 at least.

    Raises:
        ValueError: as ``head_wise_memory``.
    """
    if score_activation not in SCORE_ACTIVATIONS:
        raise UserError(f"score_activation={score_activation!r} is not known; choose one of {list(SCORE_ACTIVATIONS)}")
    check_keys(query_THD, row_keys_HND, col_keys_HND, topk=topk)
    module = _module(choose_backend(backend, query_THD, row_keys_HND, col_keys_HND, topk=topk, variant="block"))
    with torch.autocast(query_THD.device.type, enabled=False):
        return module.weigh_slots(query_THD, row_keys_HND, col_keys_HND, topk=topk, score_activation=score_activation)


def aggregate_values(
    values_SW: torch.Tensor, index_BJ: torch.Tensor, weights_BJ: torch.Tensor, *, backend: str = "auto"
) -> torch.Tensor:
    """Reads bags of slots: ``out[b] = sum_j weights[b, j] * values[index[b, j]]``, differentiable in both.

    With ``hive`` a bag is one head's K slots of one token, with ``block`` those of all heads. ``values`` may be some
    of a bank's columns: columns do not mix, and the gradients of the weights add up over them.

    Args:
        values_SW: ``[slots, width]``.
        index_BJ: int32 or int64 ``[bags, entries]``.
        weights_BJ: ``[bags, entries]``, fp32 or fp64.
        backend: as of ``head_wise_memory``.

    Returns:
        ``[bags, width]`` in the dtype of the weights.

    Raises:
        ValueError: shapes that do not fit, or a backend that was named and cannot run.
    """
    if values_SW.dim() != 2 or index_BJ.dim() != 2 or index_BJ.shape != weights_BJ.shape:
        raise UserError(
            f"values {list(values_SW.shape)}, indices {list(index_BJ.shape)} and weights {list(weights_BJ.shape)} do "
            "not fit; give [slots, width] and twice [bags, entries]"
        )
    _check_placement({"values": values_SW, "weights": weights_BJ})
    module = _module(choose_backend(backend, values_SW, weights_BJ, topk=1, variant="block"))
    with torch.autocast(values_SW.device.type, enabled=False):
        return module.aggregate_values(values_SW, index_BJ, weights_BJ)


# -- choice of a backend ---------------------------------------------------------------------------------------------
def unsupported_reason(backend: str, *tensors: torch.Tensor | None, **settings: Any) -> str | None:
    """Why ``backend`` cannot run ``head_wise_memory(*tensors, **settings)``, in words; ``None`` when it can."""
    if backend not in BACKENDS:
        return f"it is not known; choose one of {['auto', *BACKENDS]}"
    if backend != "triton" and settings.get("values_main_grad") is not None:
        return "only triton adds the gradient of the values to a buffer; give values_main_grad=None"
    if backend == "reference":
        return None
    return _module(backend).unsupported_reason(*tensors, **settings)


def choose_backend(backend: str, *tensors: torch.Tensor | None, **settings: Any) -> str:
    """Resolves ``auto``; raises ``ValueError`` when a named backend cannot run."""
    if backend != "auto":
        reason = unsupported_reason(backend, *tensors, **settings)
        if reason is not None:
            raise UserError(f"memory backend {backend!r} cannot run: {reason}")
        return backend
    rejected: list[str] = []
    for name in BACKENDS:
        reason = unsupported_reason(name, *tensors, **settings, automatic=True)
        if reason is None:
            _log_once(name, "; ".join(rejected))
            return name
        rejected.append(f"not {name}: {reason}")
    raise UserError(f"no memory backend can run: {'; '.join(rejected)}")


@functools.cache
def _log_once(name: str, rejected: str) -> None:
    logger.info("head-wise memory: backend %s (%s)", name, rejected or "the fastest there is")


def _module(backend: str) -> Any:
    return importlib.import_module(BACKENDS[backend])  # at the first use: triton takes seconds


# -- arguments -------------------------------------------------------------------------------------------------------
def check_keys(query_THD: torch.Tensor, row_keys_HND: torch.Tensor, col_keys_HND: torch.Tensor, *, topk: int) -> None:
    """Raises ``ValueError`` where queries and sub-keys do not fit together."""
    if query_THD.dim() != 3:
        raise UserError(f"query has shape {list(query_THD.shape)}; give [tokens, heads, channels]")
    _, heads, channels = query_THD.shape
    if channels < 2 or channels % 2:
        raise UserError(f"query has {channels} channels per head; product keys need an even number of at least 2")
    for name, keys in (("row_keys", row_keys_HND), ("col_keys", col_keys_HND)):
        if keys.dim() != 3 or (keys.shape[0], keys.shape[2]) != (heads, channels // 2):
            raise UserError(
                f"{name} has shape {list(keys.shape)}; the query wants [{heads}, sub-keys, {channels // 2}]"
            )
    num_keys = row_keys_HND.shape[1]
    if col_keys_HND.shape[1] != num_keys:
        raise UserError(f"row_keys has {num_keys} sub-keys and col_keys {col_keys_HND.shape[1]}; they must be equal")
    if num_keys**2 > 2**31 - 1:
        raise UserError(f"{num_keys} sub-keys make more slots than int32 indices reach; choose at most 46340")
    if not 1 <= topk <= num_keys:
        raise UserError(f"topk={topk} is out of range; choose 1 to the number of sub-keys, {num_keys}")
    _check_placement({"query": query_THD, "row_keys": row_keys_HND, "col_keys": col_keys_HND})


def check_arguments(
    query_THD: torch.Tensor,
    row_keys_HND: torch.Tensor,
    col_keys_HND: torch.Tensor,
    values: torch.Tensor,
    head_proj: torch.Tensor | None,
    *,
    topk: int,
    variant: str,
    score_activation: str,
) -> None:
    """Raises ``ValueError`` where the arguments of ``head_wise_memory`` do not fit together."""
    if variant not in VARIANTS:
        raise UserError(f"variant={variant!r} is not known; choose one of {list(VARIANTS)}")
    if score_activation not in SCORE_ACTIVATIONS:
        raise UserError(f"score_activation={score_activation!r} is not known; choose one of {list(SCORE_ACTIVATIONS)}")
    check_keys(query_THD, row_keys_HND, col_keys_HND, topk=topk)
    heads, slots = query_THD.shape[1], row_keys_HND.shape[1] ** 2
    leading = (heads, slots) if variant == "full" else (slots,)
    if values.dim() != len(leading) + 1 or values.shape[:-1] != leading:
        wanted = ", ".join(map(str, (*leading, "width")))
        raise UserError(f"values has shape {list(values.shape)}; variant {variant} wants [{wanted}]")
    if (head_proj is None) == (variant == "hive"):
        raise UserError(f"head_proj only belongs to variant hive; variant={variant} got {_shape(head_proj)}")
    if head_proj is not None and (head_proj.dim() != 3 or head_proj.shape[:2] != (heads, values.shape[1])):
        raise UserError(f"head_proj has shape {_shape(head_proj)}; wanted [{heads}, {values.shape[1]}, width]")
    _check_placement({"query": query_THD, "values": values, "head_proj": head_proj})


def _check_placement(tensors: dict[str, torch.Tensor | None]) -> None:
    device = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise UserError(f"{name} has dtype {tensor.dtype}; give a floating-point tensor")
        device = device or tensor.device
        if tensor.device != device:
            raise UserError(f"{name} is on {tensor.device} and query on {device}; move them to one device")


def _shape(tensor: torch.Tensor | None) -> str:
    return "none" if tensor is None else str(list(tensor.shape))
