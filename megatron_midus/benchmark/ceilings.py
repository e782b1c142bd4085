"""What the machine can do at most: a copy and a matrix product, measured in the same run."""

from __future__ import annotations

import dataclasses

import torch

from megatron_midus.benchmark.timing import Summary, time_phases

COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
GEMM_SIZE = {"cpu": 1280, "cuda": 8192}
REPETITIONS = 9


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
