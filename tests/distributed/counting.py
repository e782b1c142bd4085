"""What real processes hold and exchange in one training step: bytes of tensors, counted as they pass."""

from __future__ import annotations

import collections
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operators of torch.distributed -> kind of message. Receiving is the other side of sending.
_KINDS = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "send": "send",
    "recv_": None,
}


class CountMessages(TorchDispatchMode):
    """Sums the bytes of the messages of this rank by kind and size of the group; groups of one are left out.

    The size is that of the larger side: what is reduced, the gathered result, what is scattered, what is sent.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: collections.Counter[tuple[str, int]] = collections.Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function.namespace == "c10d":
            kind = _KINDS[function._schema.name.split("::")[1]]
            ranks = next(_group(a).size() for a in args if isinstance(a, torch.ScriptObject) and _is_group(a))
            sides = [_bytes(argument) for argument in args]
            if kind is not None and ranks > 1:
                self.bytes[kind, ranks] += max(sides)
        return function(*args, **(kwargs or {}))


def _is_group(value: torch.ScriptObject) -> bool:
    return "ProcessGroup" in str(value._type())


def _group(value: torch.ScriptObject) -> torch.distributed.ProcessGroup:
    return torch.distributed.ProcessGroup.unbox(value)


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(_bytes(entry) for entry in value) if isinstance(value, (list, tuple)) else 0


class KeptForBackward(torch.autograd.graph.saved_tensors_hooks):
    """Bytes of the distinct memories that autograd keeps inside the context, parameters and inputs left out."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._kept: dict[int, torch.UntypedStorage] = {}
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known and tensor.is_floating_point() or tensor.dtype == torch.int32:
            self._kept[storage.data_ptr()] = storage
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._kept.values())
