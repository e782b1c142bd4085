"""Streaming of tensors: work on several of them at a time, sizes without reading, and values that cannot be meant."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

import torch

from megatron_midus.errors import UserError
from megatron_midus.upscaling.tensors import TensorSource

Task = TypeVar("Task")
Result = TypeVar("Result")


def default_workers() -> int:
    """Cores that this process may use, at most 4: a disk is busy by then, and every worker takes memory."""
    return min(4, len(os.sched_getaffinity(0)))


def resolve_workers(workers: int | None) -> int:
    """The number that was given, else the default; ``UserError`` for a number of workers that nobody means."""
    if workers is None:
        return default_workers()
    if not 1 <= workers <= 64:
        raise UserError(f"--workers {workers} is out of range; choose 1 to 64")
    return workers


def in_parallel(work: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """Results of ``work`` as they come, in no certain order; the first failure ends it and is raised.

    Threads are enough: reading, writing, casting and hashing of tensors all happen outside the interpreter lock.
    """
    if workers == 1:
        yield from map(work, tasks)
        return
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, task) for task in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def num_bytes(source: TensorSource, name: str) -> int:
    """Bytes of one tensor, without reading it."""
    return torch.Size(source.shape(name)).numel() * source.dtype(name).itemsize


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor as they lie in a file."""
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def read_finite(source: TensorSource, name: str) -> torch.Tensor:
    """The tensor ``name``; ``ValueError`` when it holds NaN or infinities, which no trained model does."""
    tensor = source.read(name)
    if tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):  # NaN goes through both bounds
        broken = tensor.numel() - int(tensor.isfinite().sum())
        raise UserError(
            f"tensor {name} ({str(tensor.dtype).removeprefix('torch.')}) holds {broken} values that are NaN or "
            "infinite; use weights from before they broke, or a --dtype with enough range"
        )
    return tensor
