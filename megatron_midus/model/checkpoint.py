"""Weights of the built model in Megatron's distributed checkpoints: the model part alone, whatever else lies there."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from torch.distributed.checkpoint.api import CheckpointException

from megatron_midus.errors import UserError
from megatron_midus.megatron_compat import load_checkpoint, save_checkpoint
from megatron_midus.model.builder import unwrap
from megatron_midus.model.lora import KEY_PREFIX, MERGED, merge_state

# Every key of a model starts with one of these; optimizer state and the rest of a training checkpoint do not.
_MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.")
# Rows of these may be padded to a multiple that hangs on the tensor-parallel size.
_VOCABULARY_KEYS = ("embedding.word_embeddings.weight", "output_layer.weight")


def sharded_state_dict(model_chunks: Sequence[torch.nn.Module], metadata: dict[str, Any] | None = None) -> dict:
    """The sharded tensors of the model's weights.

    Returns:
        ``{"model": …}``, or ``{"model0": …, "model1": …}`` with several chunks, as Megatron's own checkpoints have
        it. Checkpoint keys carry neither name. ``_extra_state`` objects, which hold FP8 statistics, are left out
        unless FP8 is on.
    """
    metadata = ensure_metadata_has_dp_cp_group(metadata)
    names = ["model"] if len(model_chunks) == 1 else [f"model{i}" for i in range(len(model_chunks))]
    return {name: _chunk_state_dict(unwrap(chunk), metadata) for name, chunk in zip(names, model_chunks)}


def _chunk_state_dict(model: torch.nn.Module, metadata: dict[str, Any]) -> dict:
    state = merge_state(model, model.sharded_state_dict(metadata=metadata))
    if model.config.fp8:
        return state
    return {key: value for key, value in state.items() if not key.endswith("_extra_state")}


def save_weights(model_chunks: Sequence[torch.nn.Module], iteration_directory: str | Path) -> None:
    """Writes the weights into the existing, empty ``iteration_directory``; every rank calls it."""
    save_checkpoint(sharded_state_dict(model_chunks), iteration_directory)


def load_weights(model_chunks: Sequence[torch.nn.Module], iteration_directory: str | Path) -> None:
    """Reads the weights from a checkpoint of any TP x PP; every rank calls it.

    Rows that pad the vocabulary here and not there are zero.

    Raises:
        ValueError: a directory that is no checkpoint, or whose weights are not those of this model.
    """
    directory = str(iteration_directory)
    wanted = sharded_state_dict(model_chunks)
    try:
        stored = {
            tensor.key: tuple(tensor.global_shape)
            for tensor in _tensors(dist_checkpointing.load_tensors_metadata(directory))
        }
        shapes = _global_shapes(sharded_state_dict(model_chunks))
        _check_shapes(shapes, stored, directory, unwrap(model_chunks[0]).unpadded_vocab_size)
        loaded = load_checkpoint(wanted, directory)
    except (CheckpointingException, CheckpointException, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{directory} cannot be read as a Megatron checkpoint: {_one_line(error)}") from None
    for name, chunk in zip(wanted, model_chunks):
        missing = unwrap(chunk).load_state_dict(loaded[name], strict=False).missing_keys
        assert all(key.endswith("_extra_state") for key in missing), f"not loaded: {missing}"


def load_adapters(model_chunks: Sequence[torch.nn.Module], iteration_directory: str | Path) -> None:
    """Reads adapters and the weights below them; every rank calls it.

    A checkpoint that was not trained with adapters has none: those of the model stay as they are.

    Raises:
        ValueError: adapters of another rank.
    """
    directory = str(iteration_directory)
    wanted = {
        name: {k: v for k, v in state.items() if k.rpartition(".")[2] != MERGED and v.key.startswith(KEY_PREFIX)}
        for name, state in sharded_state_dict(model_chunks).items()
    }
    stored = {t.key: tuple(t.global_shape) for t in _tensors(dist_checkpointing.load_tensors_metadata(directory))}
    if not any(key.startswith(KEY_PREFIX) for key in stored):
        return
    for tensor in (t for t in _tensors(wanted) if t.key.endswith(".up")):
        there = stored[tensor.key][-1]
        if there != tensor.global_shape[-1]:
            raise UserError(
                f"lora_rank={tensor.global_shape[-1]} contradicts {directory}, whose adapters have rank {there}; "
                f"give --lora-rank {there}"
            )
    loaded = load_checkpoint(wanted, directory)
    for name, chunk in zip(wanted, model_chunks):
        unexpected = unwrap(chunk).load_state_dict(loaded[name], strict=False).unexpected_keys
        assert not unexpected, unexpected


def _tensors(state: dict) -> Iterator[ShardedTensor]:
    return (value for value in nested_values(state) if isinstance(value, ShardedTensor))


def _global_shapes(state: dict) -> dict[str, tuple[int, ...]]:
    """Shapes of the whole model's tensors by checkpoint key, those of the other pipeline stages included."""
    # A gated linear_fc1 is a factory of two tensors until it is applied, in place.
    apply_factories(state)
    parts: list[dict] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(parts, {t.key: tuple(t.global_shape) for t in _tensors(state)})
    return {key: shape for part in parts for key, shape in part.items()}


def _check_shapes(
    wanted: dict[str, tuple[int, ...]], stored: dict[str, tuple[int, ...]], directory: str, vocab_size: int
) -> None:
    """Raises ``ValueError`` with the first key in which a checkpoint and a model differ."""
    stored = {key: shape for key, shape in stored.items() if key.startswith(_MODEL_PREFIXES)}
    if missing := sorted(set(wanted) - set(stored)):
        raise UserError(
            f"{directory} lacks {len(missing)} tensors of this model, first {missing[0]}; "
            "build the model from the plan and the architecture that lie beside the checkpoint"
        )
    if unexpected := sorted(set(stored) - set(wanted)):
        raise UserError(
            f"{directory} holds {len(unexpected)} tensors that this model lacks, first {unexpected[0]}; "
            "build the model from the plan and the architecture that lie beside the checkpoint"
        )
    for key, shape in sorted(wanted.items()):
        there = stored[key]
        if key in _VOCABULARY_KEYS:
            if there[0] < vocab_size or there[1:] != shape[1:]:
                raise UserError(
                    f"{key} in {directory} has shape {list(there)}; the model needs {[vocab_size, *shape[1:]]}"
                )
        elif there != shape:
            raise UserError(f"{key} in {directory} has shape {list(there)}; the model needs {list(shape)}")


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
