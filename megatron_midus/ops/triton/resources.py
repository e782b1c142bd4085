"""Compiles what a function launches for a GPU that need not be there, and reads registers, spills and instructions."""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction


class Launch(NamedTuple):
    """One kernel launch that was compiled and not run."""

    kernel: str
    grid: tuple[int, ...]
    num_warps: int
    cubin: bytes
    shared_bytes: int
    arguments: dict[str, Any]
    """By name; tensors are meta tensors."""


class Resources(NamedTuple):
    """What one thread or program of a kernel needs."""

    registers: int
    spill_bytes: int
    shared_bytes: int


def compiled_launches(function: Callable[[], Any], *, capability: int) -> list[Launch]:
    """Everything that ``function`` launches, compiled for compute capability ``capability`` (90 = Hopper).

    ``function`` gets its tensors on the device ``meta``: sizes and dtypes are real, so the kernels are specialised as in
    a run, and nothing is computed.

    Raises:
        RuntimeError: Triton interprets kernels in this process (``TRITON_INTERPRET``) and so compiles none.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set, so Triton compiles nothing; unset it before triton is imported")
    launches: list[Launch] = []
    with _without_device(capability), _recording(launches):
        function()
    return launches


class _NoDevice:
    """What ``triton.runtime.driver`` must answer when kernels are compiled and never run."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        # Triton keeps compiled kernels by device.
        return f"sm_{self.target.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0


@contextlib.contextmanager
def _without_device(capability: int) -> Iterator[None]:
    config = triton.runtime.driver
    before = config._active
    config.set_active(_NoDevice(capability))
    try:
        yield
    finally:
        config._active = before


@contextlib.contextmanager
def _recording(launches: list[Launch]) -> Iterator[None]:
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        arguments = dict(zip(self.arg_names, args)) | kwargs
        if callable(grid):
            grid = grid(arguments)
        metadata = compiled.metadata
        launches.append(
            Launch(self.fn.__name__, tuple(grid), metadata.num_warps, compiled.kernel, metadata.shared, arguments)
        )
        return compiled

    JITFunction.run = compile_only
    try:
        yield
    finally:
        JITFunction.run = run


def resources(launch: Launch) -> Resources:
    """Read from the compiled kernel by the cuobjdump that comes with Triton."""
    usage = _inspect(triton.knobs.nvidia.cuobjdump.path, "-res-usage", launch.cubin)
    found = dict(re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", usage))
    # Spilled registers live in the stack frame; the kernels have no local arrays.
    return Resources(int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"]), launch.shared_bytes)


def machine_code(launch: Launch) -> str:
    """SASS as text."""
    return _inspect(triton.knobs.nvidia.cuobjdump.path, "-sass", launch.cubin)


def _inspect(program: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        return subprocess.run([program, option, file.name], check=True, capture_output=True, text=True).stdout
