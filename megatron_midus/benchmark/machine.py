"""What the machine is, and what it can do at most: a copy and a matrix product, measured in the same run."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform as python_platform
from pathlib import Path
from typing import Any

import torch

from megatron_midus.benchmark.timing import Summary, time_phases

COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
GEMM_SIZE = {"cpu": 1280, "cuda": 8192}
REPETITIONS = 9
_PACKAGES = (
    "megatron-midus",
    "torch",
    "triton",
    "numba",
    "numpy",
    "megatron-core",
    "transformer-engine",
    "product-key-memory",
)


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Best figures of this machine: bytes moved by a copy (read + written), FLOPs of a square matrix product."""

    gigabytes_per_second: float
    teraflops: float

    def best(self, other: Ceilings) -> Ceilings:
        """The higher figures: a neighbour that was busy lowers a ceiling, and nothing raises one."""
        return Ceilings(
            max(self.gigabytes_per_second, other.gigabytes_per_second), max(self.teraflops, other.teraflops)
        )

    def milliseconds(self, flops: float, num_bytes: float) -> float:
        """The roofline: the least time that so many operations, or so many bytes, take (Williams et al. 2009)."""
        return 1e3 * max(flops / (self.teraflops * 1e12), num_bytes / (self.gigabytes_per_second * 1e9))


def measure_ceilings(device: str, dtype: torch.dtype) -> Ceilings:
    """The fastest of a few copies far larger than the caches, and of a few matrix products."""
    source = torch.ones(COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    size = GEMM_SIZE[device]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)

    def copy() -> None:
        target.copy_(source)

    def multiply() -> None:
        torch.mm(left, right, out=product)

    copies, products = zip(*(time_phases([copy, multiply], device=device) for _ in range(REPETITIONS)))
    return Ceilings(
        gigabytes_per_second=2 * source.nbytes / Summary.of(copies).minimum / 1e6,
        teraflops=2 * size**3 / Summary.of(products).minimum / 1e9,
    )


def describe_machine(device: str) -> dict[str, Any]:
    """Processor, memory, threads, versions: what a figure means nothing without."""
    described: dict[str, Any] = {
        "device": device,
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{python_platform.system()} {python_platform.machine()}",
        "python": python_platform.python_version(),
        "versions": _versions(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        described |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "gpu_multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return described


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return python_platform.processor() or "unknown"
    fields = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]))
    family, model = fields.get("cpu family"), fields.get("model")
    return f"{fields.get('model name', 'unknown')} (family {family}, model {model})"


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
