"""A second tensor for every weight that learns, in fp32, kept by the rank that updates the weight and stored in checkpoints.

What it is a copy of is what the optimizer updates: of a model in 16 bits the fp32 master weights, which show steps that are smaller than
a unit of the model's own weights. Under the distributed optimizer each rank keeps the part that it updates. The parts are joined for an
evaluation and for a checkpoint, which holds them under the keys of the weights behind a prefix, so any layout of processes reads them.
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

from megatron_midus.megatron_compat import load_checkpoint
from megatron_midus.model.builder import unwrap
from megatron_midus.model.checkpoint import sharded_state_dict
from megatron_midus.model.lora import MERGED, adapters
from megatron_midus.training.masters import Master, find_master
from megatron_midus.training.replicas import is_of_expert


@dataclasses.dataclass(frozen=True)
class Part:
    """What this rank keeps of a parameter.

    Attributes:
        master: what the optimizer updates here; ``None`` where it updates nothing of the parameter here, or there is no optimizer.
        source: the weights there; flat where they are a part, else of the parameter's shape.
        copy: fp32, shaped as ``source``.
        replicas: the ranks that hold the other parts; ``None`` where this is the whole.
    """

    parameter: torch.nn.Parameter
    master: Master | None
    source: torch.Tensor
    copy: torch.Tensor
    replicas: torch.distributed.ProcessGroup | None

    def whole(self) -> torch.Tensor:
        """The copy in the parameter's shape. Collective over ``replicas``."""
        if self.replicas is None:
            return self.copy
        whole = torch.zeros(self.parameter.shape, dtype=torch.float32, device=self.copy.device)
        self.of(whole).copy_(self.copy)
        torch.distributed.all_reduce(whole, group=self.replicas)  # the others have zeros there
        return whole

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """A view of this part."""
        begin = 0 if self.master is None else self.master.begin
        return whole.view(-1)[begin : begin + self.copy.numel()].view_as(self.copy)


def _part(parameter: torch.nn.Parameter, optimizer: MegatronOptimizer | None) -> Part:
    master, source, replicas = None, parameter.detach(), None
    if optimizer is not None:
        master = find_master(optimizer, parameter)
        source = source.new_empty(0) if master is None else master.tensor.detach()
        if optimizer.config.use_distributed_optimizer and is_of_expert(parameter):
            replicas = parallel_state.get_expert_data_parallel_group()
        elif optimizer.config.use_distributed_optimizer:
            replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return Part(parameter, master, source, source.float().clone(), replicas)


class WeightCopies:
    """Copies of the parameters that learn on this rank, equal to the weights until somebody changes them.

    Args:
        model_chunks: of this rank, in DDP or not, loaded and frozen where nothing learns.
        optimizer: of the same; ``None`` = the weights do not change.
        prefix: of the keys in checkpoints.
    """

    def __init__(
        self, model_chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer | None, prefix: str
    ) -> None:
        self.model_chunks = model_chunks
        self._prefix = prefix
        self._chunks = [
            {name: _part(p, optimizer) for name, p in unwrap(chunk).named_parameters() if p.requires_grad}
            for chunk in model_chunks
        ]

    @torch.no_grad()
    def restart(self) -> None:
        """Become the weights as they are."""
        for part in self.parts():
            part.copy.copy_(part.source)

    def parts(self) -> Iterator[Part]:
        for parts in self._chunks:
            yield from parts.values()

    @contextlib.contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """The model computes with the copies, rounded to the dtype of its weights, which come back bit by bit. Takes the memory
        of a second copy of the weights that learn. The weights must be whole. Collective over data parallelism."""
        kept = []
        with torch.no_grad():
            for part in self.parts():
                kept.append(part.parameter.detach().clone())
                part.parameter.copy_(part.whole())
        try:
            yield
        finally:
            with torch.no_grad():
                for part, weight in zip(self.parts(), kept):
                    part.parameter.copy_(weight)

    def num_bytes(self) -> int:
        """On this rank."""
        return sum(part.copy.nbytes for part in self.parts())

    def load_copies(self, directory: Path) -> None:
        """From a checkpoint that was trained alike. Collective over all ranks."""
        loaded = load_checkpoint(self.sharded(with_merged=False), directory)
        for index, parts in enumerate(self._chunks):
            for name, part in parts.items():
                part.copy.copy_(part.of(loaded[str(index)][name]))

    def sharded(self, *, with_merged: bool) -> dict[str, dict[str, Any]]:
        """``{chunk: {parameter: sharded copy}}`` for a checkpoint. The weights must be whole. Collective over data parallelism.

        Args:
            with_merged: add the merged weights made of copied adapters.
        """
        is_merging = with_merged and any(True for chunk in self.model_chunks for _ in adapters(unwrap(chunk)))
        with self.in_place_of_weights() if is_merging else contextlib.nullcontext():
            # Merged weights are made of the adapters here and now; all other entries get their tensors below.
            chunks = list(sharded_state_dict(self.model_chunks).values())
        found: dict[str, dict[str, Any]] = {}
        for index, (state, parts) in enumerate(zip(chunks, self._chunks)):
            found[str(index)] = {
                # What was joined waits for the writer in the memory of the host.
                name: self._renamed(
                    state[name],
                    data=part.whole() if part.replicas is None else part.whole().cpu(),
                    dtype=torch.float32,
                )
                for name, part in parts.items()
            }
            if with_merged:
                merged = {name: entry for name, entry in state.items() if name.endswith(f".{MERGED}")}
                found[str(index)] |= {name: self._renamed(entry) for name, entry in merged.items()}
        return found

    def _renamed(self, entry: Any, **changes: Any) -> Any:
        """A sharded tensor, or a factory of several, under the key of its copy."""
        known = {field.name for field in dataclasses.fields(entry)}
        changes = {name: value for name, value in changes.items() if name in known}
        return dataclasses.replace(entry, key=self._prefix + entry.key, **changes)
