"""An exponential moving average of the weights that learn (``--ema-decay``), in fp32 beside the model.

Update number ``t = 1, 2, …`` makes it ``a + (1 - d) * (w - a)`` with ``d = min(decay, t / (t + 9))``. It begins as the weights that the run
begins with, and by this warm-up forgets them: after ten updates their share is 1e-5.

A checkpoint holds the average under the keys of the weights behind ``ema.`` (``checkpoint.layout.AVERAGE_PREFIX``), so any layout of
processes reads it. With adapters, the merged weights made of averaged adapters lie there too.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_midus.checkpoint.layout import AVERAGE_PREFIX
from megatron_midus.megatron_compat import load_checkpoint
from megatron_midus.model.builder import unwrap
from megatron_midus.model.checkpoint import sharded_state_dict
from megatron_midus.model.lora import MERGED, adapters


class WeightAverage:
    """Of the parameters that learn on this rank, shaped as they are; replicas hold the same.

    An update waits until the weights of its step are whole: under ``--overlap-param-gather`` that is the end of the next forward
    pass, or the gather before a checkpoint.

    Args:
        model_chunks: of this rank, loaded and frozen where nothing learns.
        decay: share of the old average that stays in an update, from the end of the warm-up on.
    """

    def __init__(self, model_chunks: Sequence[torch.nn.Module], decay: float) -> None:
        self.model_chunks = model_chunks
        self.decay = decay
        self.updates = 0
        self._is_due = False
        self._parameters = [
            {name: p for name, p in unwrap(chunk).named_parameters() if p.requires_grad} for chunk in model_chunks
        ]
        self._averages = [
            {name: p.detach().float().clone() for name, p in parameters.items()} for parameters in self._parameters
        ]

    def count_step(self) -> None:
        """The optimizer has changed the weights; ``catch_up`` comes before it does so again."""
        self._is_due = True

    @torch.no_grad()
    def catch_up(self) -> None:
        """Takes in the weights of the last step, which are whole by now."""
        if not self._is_due:
            return
        self._is_due = False
        self.updates += 1
        decay = min(self.decay, self.updates / (self.updates + 9))
        for parameter, average in self._pairs():
            average.lerp_(parameter.float(), 1 - decay)

    def _pairs(self) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
        for parameters, averages in zip(self._parameters, self._averages):
            yield from ((parameters[name], average) for name, average in averages.items())

    @contextlib.contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """The model computes with the average, rounded to the dtype of its weights, which come back bit by bit. Takes the memory
        of a second copy of the weights that learn."""
        with torch.no_grad():
            kept = [parameter.detach().clone() for parameter, _ in self._pairs()]
            for parameter, average in self._pairs():
                parameter.copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for (parameter, _), weight in zip(self._pairs(), kept):
                    parameter.copy_(weight)

    # -- checkpoints ---------------------------------------------------------------------------------------------
    def state(self) -> dict[str, Any]:
        """For a checkpoint, of sharded tensors."""
        return {"weight_average": self._sharded(with_merged=True)}

    def load(self, directory: Path, updates: int) -> None:
        """Goes on from the average of a checkpoint that was trained alike. Collective over all ranks.

        Args:
            updates: that the stored average has seen.
        """
        loaded = load_checkpoint(self._sharded(with_merged=False), directory)
        for index, averages in enumerate(self._averages):
            for name, average in averages.items():
                average.copy_(loaded[str(index)][name])
        self.updates = updates

    def num_bytes(self) -> int:
        """On this rank."""
        return sum(average.numel() * average.element_size() for _, average in self._pairs())

    def _sharded(self, *, with_merged: bool) -> dict[str, dict[str, Any]]:
        """``{chunk: {parameter: sharded average}}``, and the merged weights of averaged adapters."""
        is_merging = with_merged and any(True for chunk in self.model_chunks for _ in adapters(unwrap(chunk)))
        with self.in_place_of_weights() if is_merging else contextlib.nullcontext():
            # Merged weights are made of the adapters here and now; all other entries get their tensors below.
            chunks = list(sharded_state_dict(self.model_chunks).values())
        found: dict[str, dict[str, Any]] = {}
        for index, (state, averages) in enumerate(zip(chunks, self._averages)):
            found[str(index)] = {
                name: _renamed(state[name], data=average, dtype=torch.float32) for name, average in averages.items()
            }
            if with_merged:
                merged = {name: entry for name, entry in state.items() if name.endswith(f".{MERGED}")}
                found[str(index)] |= {name: _renamed(entry) for name, entry in merged.items()}
        return found


def _renamed(entry: Any, **changes: Any) -> Any:
    """A sharded tensor, or a factory of several, under the key of its average."""
    known = {field.name for field in dataclasses.fields(entry)}
    changes = {name: value for name, value in changes.items() if name in known}
    return dataclasses.replace(entry, key=AVERAGE_PREFIX + entry.key, **changes)
