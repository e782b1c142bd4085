"""Where a process computes: the CPU or its CUDA device, and what is installed for it."""

from __future__ import annotations

import importlib.util
import platform as host

import torch

from megatron_midus.errors import UserError
from megatron_midus.platform.cpu_mapping import CPU, is_active


def is_cpu() -> bool:
    """Whether models of this process live on the CPU."""
    return is_active() or not torch.cuda.is_available()


def device() -> torch.device:
    """The device of this process: its CUDA device, or the CPU."""
    return CPU if is_cpu() else torch.device("cuda", torch.cuda.current_device())


def cpu_multiplies_bf16() -> bool:
    """Whether torch has fast bf16 products for this processor; without AVX-512 it adds them up in plain loops on x86."""
    is_x86 = host.machine().lower() in ("x86_64", "amd64")
    return not is_x86 or torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def transformer_engine_available() -> bool:
    """Whether Transformer Engine's torch part is installed and there is a GPU to run it on."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def apex_available() -> bool:
    """Whether NVIDIA Apex with its optimizers is installed."""
    # The package index carries an unrelated project named apex; only NVIDIA's has apex.optimizers.
    return importlib.util.find_spec("apex") is not None and importlib.util.find_spec("apex.optimizers") is not None


def require_transformer_engine() -> None:
    """Raises ``ValueError`` with what to install when Transformer Engine cannot be used."""
    if not torch.cuda.is_available():
        raise UserError("Transformer Engine needs a CUDA device and there is none; choose --transformer-impl local")
    if not transformer_engine_available():
        raise UserError(
            "Transformer Engine is not installed; pip install 'megatron-midus[gpu]' "
            "(or 'transformer-engine[pytorch]'), or choose --transformer-impl local"
        )


def require_apex() -> None:
    """Raises ``ValueError`` with how to build it when NVIDIA Apex is missing."""
    if not apex_available():
        raise UserError(
            "NVIDIA Apex is not installed, and the package index has an unrelated project under that name: build it "
            "with git clone https://github.com/NVIDIA/apex && cd apex && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install "
            "-v --no-build-isolation ."
        )


def describe() -> str:
    """Versions and devices that this environment has, one a line."""
    import importlib.metadata

    names = ("megatron-midus", "megatron-core", "torch", "transformers", "transformer-engine", "apex", "triton")
    lines = []
    for name in names:
        try:
            lines.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name} -")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    lines += [f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in range(count)] or ["no CUDA device"]
    return "\n".join(lines)
