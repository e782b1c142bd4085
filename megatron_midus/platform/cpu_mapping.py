"""Megatron-Core without CUDA: its ``cuda`` calls act on the CPU. Importing this changes nothing."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from megatron_midus.errors import UserError
from megatron_midus.platform.deferred_compile import deferred_compile

CPU = torch.device("cpu")

_FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full", "full_like", "linspace", "ones",
    "ones_like", "rand", "rand_like", "randint", "randint_like", "randn", "randn_like", "randperm", "scalar_tensor",
    "tensor", "zeros", "zeros_like",
)  # fmt: skip
_TENSOR_FACTORIES = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")

_mapping_active = False


def is_active() -> bool:
    """Whether ``cuda`` means the CPU in this process."""
    return _mapping_active


def refuse_beside_cuda() -> None:
    if torch.cuda.is_available():
        raise UserError(
            "the CPU mapping (backend gloo) is refused where CUDA is available; choose --distributed-backend nccl, "
            "or hide the GPUs with CUDA_VISIBLE_DEVICES=''"
        )


def activate_cpu_mapping() -> None:
    """Makes the ``cuda`` calls of Megatron-Core act on the CPU, for this process and the threads in it.

    Functions are replaced, not a ``TorchFunctionMode`` pushed: a mode is off in other threads and inside
    ``backward()``. A second call does nothing.

    Raises:
        ValueError: when CUDA is available, because real GPU calls would be redirected.
    """
    global _mapping_active
    if _mapping_active:
        return
    refuse_beside_cuda()
    import torch._dynamo  # before anything is replaced: it indexes torch's functions by identity

    with deferred_compile():
        from megatron.core.tensor_parallel import random

    _mapping_active = True
    for name in _FACTORIES:
        setattr(torch, name, _with_cpu_device(getattr(torch, name)))
    for name in _TENSOR_FACTORIES:
        setattr(torch.Tensor, name, _with_cpu_device(getattr(torch.Tensor, name)))
    _map_tensor_methods()
    _map_cuda_namespace()
    _map_megatron_random(random)
    _map_average()
    _map_split_sizes()


def _cpu_for_cuda(value: Any) -> Any:
    """``"cpu"`` for whatever names a CUDA device (string, ``torch.device``, ordinal); anything else unchanged."""
    if isinstance(value, str):
        return CPU if value.split(":")[0] == "cuda" else value
    if isinstance(value, torch.device):
        return CPU if value.type == "cuda" else value
    if isinstance(value, int) and not isinstance(value, bool):
        return CPU
    return value


def _with_cpu_device(function: Callable) -> Callable:
    @functools.wraps(function)
    def mapped(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None:
            kwargs["device"] = _cpu_for_cuda(kwargs["device"])
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False  # pinning needs the CUDA driver
        return function(*args, **kwargs)

    return mapped


def _map_tensor_methods() -> None:
    original_to, original_type = torch.Tensor.to, torch.Tensor.type

    @functools.wraps(original_to)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args:
            args = (_cpu_for_cuda(args[0]), *args[1:])
        if "device" in kwargs:
            kwargs["device"] = _cpu_for_cuda(kwargs["device"])
        return original_to(self, *args, **kwargs)

    @functools.wraps(original_type)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original_type(self, *args, **kwargs)
        # Megatron's optimizers compare with 'torch.cuda.FloatTensor'.
        return original_type(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.to = to  # type: ignore[method-assign]
    torch.Tensor.type = type_  # type: ignore[method-assign, assignment]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


class _Stream:
    """Stands in for a CUDA stream where everything runs in order anyway."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def synchronize(self) -> None:
        pass


class _Event:
    """Stands in for a CUDA event; always complete."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


def _map_cuda_namespace() -> None:
    stream = _Stream()

    def get_rng_state(device: Any = "cuda") -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(new_state: torch.Tensor, device: Any = "cuda") -> None:
        torch.set_rng_state(new_state)

    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    replacements: dict[str, Any] = {
        # A device, not an ordinal: Megatron hands it to `device=` everywhere.
        "current_device": lambda: CPU,
        "device_count": lambda: 1,
        "set_device": lambda *args, **kwargs: None,
        "synchronize": lambda *args, **kwargs: None,
        "empty_cache": lambda *args, **kwargs: None,
        "get_rng_state": get_rng_state,
        "set_rng_state": set_rng_state,
        "manual_seed": manual_seed,
        "manual_seed_all": manual_seed,
        "current_stream": lambda *args, **kwargs: stream,
        "default_stream": lambda *args, **kwargs: stream,
        "stream": lambda *args, **kwargs: contextlib.nullcontext(),
        "Stream": _Stream,
        "Event": _Event,
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    for name in ("get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all"):
        setattr(torch.cuda.random, name, replacements[name])


def _map_megatron_random(random: ModuleType) -> None:
    """Megatron's tracker swaps generator states; here the CPU generator is the one that it swaps."""

    def get_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    random._get_cuda_rng_state = get_state
    random._set_cuda_rng_state = set_state
    # That the CPU generator moves inside a fork is what the mapping is for; upstream warns of it every time.
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _map_average() -> None:
    """Makes a mean over ranks of a sum: older Gloo backends refuse ``ReduceOp.AVG``, and some that followed divide
    wrongly without a word (https://github.com/pytorch/pytorch/issues/162338)."""
    original = torch.distributed.all_reduce

    @functools.wraps(original)
    def all_reduce(
        tensor: torch.Tensor, op: Any = torch.distributed.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        if op != torch.distributed.ReduceOp.AVG:
            return original(tensor, op, group, async_op)
        assert not async_op, "the sum is to be divided after it has arrived"
        original(tensor, torch.distributed.ReduceOp.SUM, group)
        tensor.div_(torch.distributed.get_world_size(group))
        return None

    torch.distributed.all_reduce = all_reduce


def _map_split_sizes() -> None:
    """Megatron-Core turns sizes of an exchange into numbers when they come from a GPU; on a CPU they stay tensors."""
    original = torch.distributed.all_to_all_single

    @functools.wraps(original)
    def all_to_all_single(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        **options: Any,
    ) -> Any:
        sizes = [s.tolist() if isinstance(s, torch.Tensor) else s for s in (output_split_sizes, input_split_sizes)]
        return original(output, input, *sizes, **options)

    torch.distributed.all_to_all_single = all_to_all_single
