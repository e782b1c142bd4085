"""An exponential moving average of the weights that learn (``--ema-decay``), in fp32 beside the model.

Update number ``t = 1, 2, …`` makes it ``a + (1 - d) * (w - a)`` with ``d = min(decay, t / (t + 9))``. It begins as the weights that the run
begins with, and by this warm-up forgets them: after ten updates their share is 1e-5.

``w`` is what the optimizer updates: of a model in 16 bits the fp32 master weights, which show steps that are smaller than a unit of the
model's own weights. Under the distributed optimizer each rank averages the part that it updates. The parts are joined for an evaluation and
for a checkpoint.

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
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer

from megatron_midus.checkpoint.layout import AVERAGE_PREFIX
from megatron_midus.megatron_compat import load_checkpoint
from megatron_midus.model.builder import unwrap
from megatron_midus.model.checkpoint import sharded_state_dict
from megatron_midus.model.lora import MERGED, adapters
from megatron_midus.training.masters import find_master
from megatron_midus.training.replicas import is_of_expert


@dataclasses.dataclass(frozen=True)
class _Part:
    """What this rank averages of a parameter.

    Attributes:
        source: what the optimizer updates here; flat where it is a part, else of the parameter's shape.
        average: of it, fp32, shaped alike.
        begin: where in the flattened parameter the part begins.
        replicas: the ranks that hold the other parts; ``None`` where this is the whole.
    """

    parameter: torch.nn.Parameter
    source: torch.Tensor
    average: torch.Tensor
    begin: int
    replicas: torch.distributed.ProcessGroup | None

    def whole(self) -> torch.Tensor:
        """The average in the parameter's shape. Collective over ``replicas``."""
        if self.replicas is None:
            return self.average
        whole = torch.zeros(self.parameter.shape, dtype=torch.float32, device=self.average.device)
        self.of(whole).copy_(self.average)
        torch.distributed.all_reduce(whole, group=self.replicas)  # the others have zeros there
        return whole

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """A view of this part."""
        return whole.view(-1)[self.begin : self.begin + self.average.numel()].view_as(self.average)


def _part(parameter: torch.nn.Parameter, optimizer: MegatronOptimizer | None) -> _Part:
    source, begin, replicas = parameter.detach(), 0, None
    if optimizer is not None:
        master = find_master(optimizer, parameter)
        source, begin = (source.new_empty(0), 0) if master is None else (master.tensor.detach(), master.begin)
        if optimizer.config.use_distributed_optimizer and is_of_expert(parameter):
            replicas = parallel_state.get_expert_data_parallel_group()
        elif optimizer.config.use_distributed_optimizer:
            replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return _Part(parameter, source, source.float().clone(), begin, replicas)


class WeightAverage:
    """Of the parameters that learn on this rank.

    Args:
        model_chunks: of this rank, loaded and frozen where nothing learns.
        decay: share of the old average that stays in an update, from the end of the warm-up on.
        optimizer: of the same; ``None`` = the weights do not change.
    """

    def __init__(
        self, model_chunks: Sequence[torch.nn.Module], decay: float, optimizer: MegatronOptimizer | None
    ) -> None:
        self.model_chunks = model_chunks
        self.decay = decay
        self.updates = 0
        self._chunks = [
            {name: _part(p, optimizer) for name, p in unwrap(chunk).named_parameters() if p.requires_grad}
            for chunk in model_chunks
        ]

    @torch.no_grad()
    def restart(self) -> None:
        """Becomes the weights as they are."""
        self.updates = 0
        for part in self._parts():
            part.average.copy_(part.source)

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights of a step of the optimizer, which need not have been gathered yet."""
        self.updates += 1
        decay = min(self.decay, self.updates / (self.updates + 9))
        for part in self._parts():
            part.average.lerp_(part.source.float(), 1 - decay)

    def _parts(self) -> Iterator[_Part]:
        for parts in self._chunks:
            yield from parts.values()

    @contextlib.contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """The model computes with the average, rounded to the dtype of its weights, which come back bit by bit. Takes the memory
        of a second copy of the weights that learn. The weights must be whole. Collective over data parallelism."""
        kept = []
        with torch.no_grad():
            for part in self._parts():
                kept.append(part.parameter.detach().clone())
                part.parameter.copy_(part.whole())
        try:
            yield
        finally:
            with torch.no_grad():
                for part, weight in zip(self._parts(), kept):
                    part.parameter.copy_(weight)

    # -- checkpoints ---------------------------------------------------------------------------------------------
    def state(self) -> dict[str, Any]:
        """For a checkpoint, of sharded tensors. The weights must be whole. Collective over data parallelism."""
        return {"weight_average": self._sharded(with_merged=True)}

    def load(self, directory: Path, updates: int) -> None:
        """Goes on from the average of a checkpoint that was trained alike. Collective over all ranks.

        Args:
            updates: that the stored average has seen.
        """
        loaded = load_checkpoint(self._sharded(with_merged=False), directory)
        for index, parts in enumerate(self._chunks):
            for name, part in parts.items():
                part.average.copy_(part.of(loaded[str(index)][name]))
        self.updates = updates

    def num_bytes(self) -> int:
        """On this rank."""
        return sum(part.average.nbytes for part in self._parts())

    def _sharded(self, *, with_merged: bool) -> dict[str, dict[str, Any]]:
        """``{chunk: {parameter: sharded average}}``, and the merged weights of averaged adapters."""
        is_merging = with_merged and any(True for chunk in self.model_chunks for _ in adapters(unwrap(chunk)))
        with self.in_place_of_weights() if is_merging else contextlib.nullcontext():
            # Merged weights are made of the adapters here and now; all other entries get their tensors below.
            chunks = list(sharded_state_dict(self.model_chunks).values())
        found: dict[str, dict[str, Any]] = {}
        for index, (state, parts) in enumerate(zip(chunks, self._chunks)):
            found[str(index)] = {
                # What was joined waits for the writer in the memory of the host.
                name: _renamed(
                    state[name],
                    data=part.whole() if part.replicas is None else part.whole().cpu(),
                    dtype=torch.float32,
                )
                for name, part in parts.items()
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
