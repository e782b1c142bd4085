"""Figures of GPUs and networks that times are estimated with; every one can be replaced on the command line."""

from __future__ import annotations

import dataclasses

from megatron_midus.upscaling.pipeline_layout import Device

# What training reaches of a peak; measured shares differ by model and version, so they are settings too.
MATMUL_SHARE = 0.42
MEMORY_SHARE = 0.75
LINK_SHARE = 0.75


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One kind of GPU node. Peaks, as makers state them.

    Attributes:
        memory_gib: of a GPU, GiB.
        matmul_tflops: dense bf16, TFLOP/s.
        memory_gb_s: GB/s.
        lanes_tera: single-lane instructions a second, in 10^12: multiprocessors x 128 lanes x boost clock.
        node_gb_s: between the GPUs of a node, one direction, GB/s a GPU.
        network_gb_s: between nodes, one direction, GB/s a GPU.
    """

    memory_gib: float
    matmul_tflops: float
    memory_gb_s: float
    lanes_tera: float
    node_gb_s: float
    network_gb_s: float

    def device(self) -> Device:
        """What of it training reaches."""
        return Device(
            matmul=self.matmul_tflops * 1e12 * MATMUL_SHARE,
            bandwidth=self.memory_gb_s * 1e9 * MEMORY_SHARE,
            selection=self.lanes_tera * 1e12,
        )

    def link(self, *, inside_node: bool) -> float:
        """Bytes a second that a GPU sends."""
        return (self.node_gb_s if inside_node else self.network_gb_s) * 1e9 * LINK_SHARE


# Data sheets of NVIDIA (SXM forms); networks: one adapter a GPU, 200 Gbit/s with A100 and 400 Gbit/s with the others.
HARDWARE = {
    "a100": Hardware(80, 312, 2039, 19.5, 300, 25),
    "h100": Hardware(80, 989, 3350, 29.9, 450, 50),
    "h200": Hardware(141e9 / 2**30, 989, 4800, 29.9, 450, 50),
    "b200": Hardware(180e9 / 2**30, 2250, 8000, 35.0, 900, 50),
}
