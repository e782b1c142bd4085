"""What the machine and its software are: figures of time mean nothing without it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

_PACKAGES = (
    "megatron-midus",
    "megatron-core",
    "torch",
    "transformers",
    "transformer-engine",
    "triton",
    "numba",
    "numpy",
    "product-key-memory",
)


def machine_facts() -> dict[str, Any]:
    """Processor, memory, threads, GPUs, versions, by name; for JSON."""
    import torch

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY"),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": _gpus(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **_versions()},
    }


def device_name(facts: dict[str, Any]) -> str:
    """The GPUs where there are any, else the processor."""
    gpus = facts.get("gpus") or []
    if not gpus:
        return facts.get("processor") or "unknown processor"
    names = [gpu["name"] if isinstance(gpu, dict) else gpu for gpu in gpus]
    return ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))


def versions_text(facts: dict[str, Any]) -> str:
    """``torch 2.13.0, …``."""
    return ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items())


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {"name": p.name, "memory_gib": round(p.total_memory / 2**30, 1), "multiprocessors": p.multi_processor_count}
        for p in found
    ]


def _processor() -> str:
    """Its name; family and model as well, where the name alone does not tell."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return platform.processor() or platform.machine()
    pairs = (line.partition(":") for line in path.read_text().splitlines() if ":" in line)
    # From the end, so that the first processor's lines are those that stay.
    fields = {key.strip(): value.strip() for key, _, value in reversed(list(pairs))}
    if "cpu family" not in fields:
        return fields.get("model name", platform.machine())
    return f"{fields.get('model name', 'unknown')} (family {fields['cpu family']}, model {fields.get('model')})"


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
