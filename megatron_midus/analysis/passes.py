"""Passes of a model over a text: its own, with everything recorded, and changed ones that start where the change is.

A changed pass re-uses what the own pass fed into the first block that the change touches, and the arguments of every
block as the model made them, so an unchanged "changed" pass gives the model's own loss bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from megatron_midus.analysis.lookup import Read, Selected, look_up_with, read, select
from megatron_midus.analysis.windows import Windows
from megatron_midus.errors import UserError
from megatron_midus.hf.lookup_midus import plain_torch

Progress = Callable[[int], Any]


def memories(model: Any) -> dict[int, Any]:
    """``{block: MidusMemory}`` in order."""
    return {i: layer.memory for i, layer in enumerate(model.model.layers) if hasattr(layer, "memory")}


def neighbour(model: Any, block: int) -> int | None:
    """The Transformer block that stands nearest before ``block``, or else after it; ``None`` without any."""
    kinds = model.config.block_types
    places = [*range(block - 1, -1, -1), *range(block + 1, len(kinds))]
    return next((i for i in places if kinds[i] == "transformer"), None)


@dataclasses.dataclass
class Pass:
    """One batch of windows, read by the model as it is.

    Attributes:
        windows: the batch, on the model's device.
        nats: float64 ``[B]``, sum of the losses of each window.
        inputs: hidden states ``[B, S, d]`` that each block reads, by block.
        written: what each Memory block adds to them, ``[B, S, d]``, by block.
        selected: ``(slots, weights)`` of each Memory block, ``[T, M, K]`` each in one or more pieces, by block.
    """

    windows: Windows
    nats: torch.Tensor
    inputs: dict[int, torch.Tensor]
    written: dict[int, torch.Tensor]
    selected: dict[int, list[Selected]]
    _model: Any
    _arguments: dict[int, dict[str, Any]]

    def slots_and_weights(self, block: int) -> Selected:
        """``[T, M, K]`` each, T in the order of the flattened windows."""
        pieces = self.selected[block]
        return torch.cat([slots for slots, _ in pieces]), torch.cat([weights for _, weights in pieces])

    def again(self, first_block: int) -> torch.Tensor:
        """``nats`` of a pass that differs from the own one from ``first_block`` on."""
        hidden = self.inputs[first_block]
        with torch.no_grad():
            for index, layer in enumerate(self._model.model.layers[first_block:], first_block):
                output = layer(hidden, **self._arguments[index])
                hidden = output[0] if isinstance(output, tuple) else output
            return _window_nats(self._model.lm_head(self._model.model.norm(hidden)), self.windows.labels)


def own_passes(model: Any, windows: Windows, *, batch_size: int, progress: Progress | None = None) -> Iterator[Pass]:
    """The model's own pass over every batch.

    Args:
        model: a ``MidusForCausalLM``, or another decoder with ``model.layers``, ``model.norm`` and ``lm_head``.
        progress: called with the number of windows after every batch.

    Raises:
        ValueError: a loss that is not finite.
    """
    with plain_torch():  # also while the caller changes a pass: watched and unwatched memories compute the same bits
        yield from _own_passes(model, windows, batch_size, progress)


def _own_passes(model: Any, windows: Windows, batch_size: int, progress: Progress | None) -> Iterator[Pass]:
    device = next(model.parameters()).device
    for batch in windows.batches(batch_size):
        batch = Windows(batch.inputs.to(device), batch.labels.to(device))
        done = Pass(batch, torch.empty(0), {}, {}, {i: [] for i in memories(model)}, model, {})
        with torch.no_grad(), _recording(model, done):
            logits = model(input_ids=batch.inputs, use_cache=False).logits
        done.nats = _window_nats(logits, batch.labels)
        if not math.isfinite(done.nats.sum().item()):
            raise UserError("the loss is not finite; the weights hold NaN or infinity, or overflow in this dtype")
        if progress is not None:
            progress(len(batch))
        yield done


def plain_losses(model: Any, windows: Windows, *, batch_size: int, progress: Progress | None = None) -> torch.Tensor:
    """``nats`` ``[W]`` of any causal language model, of which nothing but its logits need be known."""
    device, parts = next(model.parameters()).device, []
    for batch in windows.batches(batch_size):
        with torch.no_grad():
            logits = model(input_ids=batch.inputs.to(device), use_cache=False).logits
        parts.append(_window_nats(logits, batch.labels.to(device)))
        if progress is not None:
            progress(len(batch))
    return torch.cat(parts)


def _window_nats(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Row by row: in float32 the logits of a whole batch take gigabytes at a vocabulary of 128k."""
    losses = [
        F.cross_entropy(row.float(), truth, reduction="none").double().sum() for row, truth in zip(logits, labels)
    ]
    return torch.stack(losses).cpu()


@contextlib.contextmanager
def _recording(model: Any, into: Pass) -> Iterator[None]:
    def keep_input(index: int) -> Any:
        def hook(_layer: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            into.inputs[index], into._arguments[index] = arguments[0], named

        return hook

    def keep_output(index: int) -> Any:
        def hook(_memory: Any, _arguments: Any, output: torch.Tensor) -> None:
            into.written[index] = output

        return hook

    with contextlib.ExitStack() as stack:
        for index, layer in enumerate(model.model.layers):
            stack.callback(layer.register_forward_pre_hook(keep_input(index), with_kwargs=True).remove)
        for index, memory in memories(model).items():
            stack.callback(memory.register_forward_hook(keep_output(index)).remove)
            stack.enter_context(_recording_selection(memory, into.selected[index]))
        yield


def _recording_selection(memory: Any, into: list[Selected]) -> contextlib.AbstractContextManager[None]:
    def recorded(memory: Any, query_TMD: torch.Tensor) -> Selected:
        into.append(select(memory, query_TMD))
        return into[-1]

    return look_up_with(memory, select=recorded)


# -- changed passes ----------------------------------------------------------------------------------------------
Change = Callable[[Pass], contextlib.AbstractContextManager[Any]]


@dataclasses.dataclass(frozen=True)
class Variant:
    """A change of the model.

    Attributes:
        first_block: no block before this one computes anything else than in the own pass.
        change: given the own pass, changes the model for as long as the context lasts.
    """

    first_block: int
    change: Change


def measure(
    model: Any, windows: Windows, variants: Mapping[Any, Variant], *, batch_size: int, progress: Progress | None = None
) -> tuple[torch.Tensor, dict[Any, torch.Tensor]]:
    """``nats`` ``[W]`` of the model as it is, and of every variant by its key.

    Args:
        progress: called with the number of windows after every pass over a batch, the own ones included.
    """
    own: list[torch.Tensor] = []
    changed: dict[Any, list[torch.Tensor]] = {key: [] for key in variants}
    for done in own_passes(model, windows, batch_size=batch_size, progress=progress):
        own.append(done.nats)
        for key, variant in variants.items():
            with variant.change(done):
                changed[key].append(done.again(variant.first_block))
            if progress is not None:
                progress(len(done.windows))
    return torch.cat(own), {key: torch.cat(parts) for key, parts in changed.items()}


@contextlib.contextmanager
def replaced(module: Any, **tensors: torch.Tensor) -> Iterator[None]:
    """Other numbers in parameters of ``module``, cast to the dtype of what they replace; shapes may differ."""
    original = {name: getattr(module, name) for name in tensors}
    for name, tensor in tensors.items():
        like = original[name]
        setattr(module, name, torch.nn.Parameter(tensor.to(like.device, like.dtype), requires_grad=False))
    try:
        yield
    finally:
        for name, parameter in original.items():
            setattr(module, name, parameter)


def zeroed_memory_heads(memory: Any, heads: Sequence[int]) -> contextlib.AbstractContextManager[None]:
    """These heads read nothing: their weights are zero, so gate and mixer get nothing from them either."""

    def silenced(memory: Any, query_TMD: torch.Tensor) -> Selected:
        slots, weights = select(memory, query_TMD)
        return slots, weights.index_fill(1, torch.tensor(list(heads), device=weights.device), 0)

    return look_up_with(memory, select=silenced)


@contextlib.contextmanager
def memories_off(these: Iterable[Any]) -> Iterator[None]:
    """These memories write nothing."""
    with contextlib.ExitStack() as stack:
        for memory in these:
            stack.enter_context(zeroed_memory_heads(memory, range(memory.config.num_lookup_heads())))
        yield


@contextlib.contextmanager
def zeroed_attention_head(layer: Any, head: int, head_dim: int) -> Iterator[None]:
    """The output projection of a Transformer block's attention gets nothing from this head."""

    def hook(_projection: Any, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        attended = arguments[0].clone()
        attended[..., head * head_dim : (head + 1) * head_dim] = 0
        return (attended, *arguments[1:])

    handle = layer.self_attn.o_proj.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def fixed_retrieval(model: Any, done: Pass, reads: Mapping[int, Read] | None = None) -> Iterator[None]:
    """Every memory reads the slots of the own pass with the weights of the own pass, whatever its queries are.

    Args:
        reads: what some blocks make of the slots instead of their own ``read``.
    """
    with contextlib.ExitStack() as stack:
        for index, memory in memories(model).items():
            pieces = iter(done.selected[index])
            stack.enter_context(
                look_up_with(
                    memory,
                    select=lambda _memory, _query, pieces=pieces: next(pieces),
                    read=(reads or {}).get(index, read),
                )
            )
        yield
