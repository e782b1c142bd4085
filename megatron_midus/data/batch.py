"""One micro-batch for one rank: read by the first tensor-parallel rank, broadcast to the others, cut for context parallel.

The other tensor-parallel ranks do not read: with tp ranks on a node, tp times the reading processes and page-cache traffic
would fetch the same bytes, and a difference between their file systems would go unnoticed. One packed broadcast of
``4 * b * s`` int64 a micro-batch is small against a single layer's activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypedDict

import torch
import torch.distributed as dist
from megatron.core.utils import get_batch_on_this_cp_rank

from megatron_midus.errors import UserError

_PACKED = ("tokens", "position_ids", "labels", "loss_mask")


class Batch(TypedDict):
    """``b`` samples of ``s`` tokens (of ``s / cp`` under context parallel); ``None`` where this stage does not use it."""

    tokens: torch.Tensor | None  # [b, s] int64
    position_ids: torch.Tensor | None  # [b, s] int64
    labels: torch.Tensor | None  # [b, s] int64, labels[:, i] is the token after tokens[:, i]
    loss_mask: torch.Tensor | None  # [b, s] float32, 0 where a prediction does not count
    attention_mask: torch.Tensor | None  # [b, 1, s, s] bool, True = may not attend; only with reset_attention_mask


def needs_data(*, is_first_stage: bool, is_last_stage: bool, reset_attention_mask: bool = False) -> bool:
    """Whether a pipeline stage takes anything of a batch. Where it does not, no loader has to be built."""
    return is_first_stage or is_last_stage or reset_attention_mask


def get_batch(
    iterator: Iterator[dict[str, torch.Tensor]] | None,
    *,
    micro_batch_size: int,
    seq_length: int,
    is_first_stage: bool,
    is_last_stage: bool,
    device: torch.device | str,
    tp_group: dist.ProcessGroup | None = None,
    cp_group: dist.ProcessGroup | None = None,
    reset_attention_mask: bool = False,
    eod: int | None = None,
    documents_by_position: bool = False,
) -> Batch:
    """The next micro-batch as this rank needs it. A collective over ``tp_group``.

    Args:
        iterator: over :func:`megatron_midus.data.build_data_loader`; read on rank 0 of ``tp_group`` only, may be
            ``None`` elsewhere and on stages that need no data.
        micro_batch_size, seq_length: of every batch; the receiving ranks size their buffers by them.
        is_first_stage, is_last_stage: of the pipeline, for the model chunk that is about to run.
        device: where the tensors are wanted.
        tp_group: tensor-parallel group; ``None`` = no tensor parallelism.
        cp_group: context-parallel group; each rank keeps two of ``2 * cp`` chunks of the sequence.
        reset_attention_mask: also return the mask that separates the documents; needs ``eod`` or ``documents_by_position``.
        eod: id of the end-of-document token.
        documents_by_position: a document begins where the position is 0, whatever tokens there are: the turns of a conversation
            may end with the end-of-document token.

    Returns:
        Tokens and positions on the first stage, labels and loss mask on the last, ``None`` for the rest.

    Raises:
        ValueError: the iterator is exhausted, its batches have another shape, or seq_length cannot be cut for ``cp_group``.
    """
    cp_size = cp_group.size() if cp_group is not None else 1
    if cp_size > 1 and seq_length % (2 * cp_size):
        raise UserError(
            f"seq_length={seq_length} is not divisible by 2 * context_parallel_size={2 * cp_size}; choose a multiple"
        )
    if reset_attention_mask and eod is None and not documents_by_position:
        raise UserError("reset_attention_mask needs the id of the end-of-document token")
    if not needs_data(
        is_first_stage=is_first_stage, is_last_stage=is_last_stage, reset_attention_mask=reset_attention_mask
    ):
        return Batch(tokens=None, position_ids=None, labels=None, loss_mask=None, attention_mask=None)

    packed = _read_and_broadcast(iterator, (len(_PACKED), micro_batch_size, seq_length), device, tp_group)
    batch: dict[str, Any] = dict(zip(_PACKED, packed))
    batch["loss_mask"] = batch["loss_mask"].float()
    batch["attention_mask"] = None
    if reset_attention_mask:
        by_position = documents_by_position
        batch["attention_mask"] = (
            position_mask(batch["position_ids"]) if by_position else document_mask(batch["tokens"], eod)
        )
    if not is_first_stage:
        batch["tokens"] = batch["position_ids"] = None
    if not is_last_stage:
        batch["labels"] = batch["loss_mask"] = None
    if cp_size > 1:
        batch = get_batch_on_this_cp_rank(batch, cp_group)
    return Batch(**batch)


def _read_and_broadcast(
    iterator: Iterator[dict[str, torch.Tensor]] | None,
    shape: tuple[int, int, int],
    device: torch.device | str,
    tp_group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """``[4, b, s]`` int64 on ``device``, equal on every rank of ``tp_group``."""
    is_parallel = tp_group is not None and tp_group.size() > 1
    if is_parallel and tp_group.rank() != 0:
        packed = torch.empty(shape, dtype=torch.int64, device=device)
    else:
        packed = _pack(iterator, shape)
        if torch.device(device).type == "cuda":
            packed = packed.pin_memory()
        packed = packed.to(device, non_blocking=True)
    if is_parallel:
        dist.broadcast(packed, group=tp_group, group_src=0)
    return packed


def _pack(iterator: Iterator[dict[str, torch.Tensor]] | None, shape: tuple[int, int, int]) -> torch.Tensor:
    assert iterator is not None, "the first tensor-parallel rank of a stage that needs data has no iterator"
    try:
        sample = next(iterator)
    except StopIteration:
        # Not StopIteration: the peers wait in the broadcast, so the whole job has to end, and say why.
        raise UserError(
            "the data are exhausted; give more data, fewer training samples, or use --dataloader-type cyclic"
        ) from None
    # The loss mask of a GPT dataset is 0 or 1, so it travels as an integer like the rest.
    packed = torch.stack([sample[name].long() for name in _PACKED])
    if packed.shape != shape:
        raise UserError(
            f"a batch has shape {tuple(packed.shape[1:])}, expected {shape[1:]} = (micro_batch, seq_length)"
        )
    return packed


def document_mask(tokens: torch.Tensor, eod: int) -> torch.Tensor:
    """Causal mask that also separates packed documents.

    Args:
        tokens: ``[b, s]``; a document ends with its ``eod``, which still belongs to it.
        eod: id of the end-of-document token.

    Returns:
        ``[b, 1, s, s]`` bool, True where the query (third axis) may **not** attend to the key (fourth axis).
    """
    is_eod = tokens == eod
    return _separate(is_eod.cumsum(dim=1) - is_eod.long())  # end-of-document tokens before this position


def position_mask(position_ids: torch.Tensor) -> torch.Tensor:
    """Like :func:`document_mask`, of documents that begin where ``position_ids`` ``[b, s]`` are 0."""
    return _separate((position_ids == 0).cumsum(dim=1))


def _separate(document: torch.Tensor) -> torch.Tensor:
    """``document``: ``[b, s]``, the number of the document of each place."""
    other_document = document[:, :, None] != document[:, None, :]
    length = document.shape[1]
    future = torch.ones(length, length, dtype=torch.bool, device=document.device).triu(diagonal=1)
    return (other_document | future)[:, None]
