"""``midus doctor``: versions, GPU, memory backend, disk, and what is missing with how to get it; or a family of models."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from megatron_midus import __version__
from megatron_midus.config.doctor import DoctorConfig
from megatron_midus.files import check_output_file, write_text_atomically
from megatron_midus.progress import Progress
from megatron_midus.verbs.verb import verb

State = Literal["ok", "absent", "problem"]
GIB = 2**30
# Below this a checkpoint of a small model with its optimizer does not fit.
_LEAST_FREE_GIB = 10
# Distribution, what needs it, and whether every verb does.
_PACKAGES = (
    ("torch", "everything", True),
    ("megatron-core", "training, conversion from and to checkpoints", True),
    ("transformers", "Hugging Face models", True),
    ("safetensors", "Hugging Face weights", True),
    ("psutil", "saving checkpoints", True),
    ("numba", "compiled loops of the memory on a CPU", False),
    ("triton", "kernels of the memory on a GPU", False),
    ("transformer-engine", "fused layers and FP8 on a GPU", False),
    ("lm-eval", "zero-shot tasks of midus evaluate", False),
    ("vllm", "serving", False),
)
_EXTRAS = {"transformer-engine": "gpu", "lm-eval": "eval"}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        name: what was looked at.
        value: what was found.
        state: ``ok``, ``absent`` (works without) or ``problem``.
        remedy: what to do about it; empty when nothing is to be done.
    """

    name: str
    value: str
    state: State = "ok"
    remedy: str = ""


@verb(DoctorConfig)
def doctor(config: DoctorConfig, progress: Progress) -> list[Finding]:
    """Looks at this machine, or at a family of models. Loads torch, and nothing onto a GPU.

    Raises:
        UserError: a family that is not known, or that has other tensors than its file says.
    """
    if config.json:
        check_output_file(config.json)
    if config.family is not None:
        findings = list(_family(config.family))
    else:
        findings = [*_software(), *_packages(), *_hardware(), _disk(config.directory)]
    if config.json:
        write_text_atomically(config.json, json.dumps([dataclasses.asdict(f) for f in findings], indent=1) + "\n")
    return findings


def _software() -> Iterator[Finding]:
    yield Finding("megatron_midus", f"{__version__}, {Path(__file__).parents[1]}")
    is_new = sys.version_info >= (3, 10)
    yield Finding(
        "Python", platform.python_version(), "ok" if is_new else "problem", "" if is_new else "use Python 3.10 or newer"
    )


def _packages() -> Iterator[Finding]:
    for name, purpose, is_needed in _PACKAGES:
        try:
            yield Finding(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            what = f"'megatron-midus[{_EXTRAS[name]}]'" if name in _EXTRAS else name
            state: State = "problem" if is_needed else "absent"
            yield Finding(name, f"not installed ({purpose})", state, f"pip install {what}")


def _hardware() -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:
        yield Finding("GPU", f"torch cannot be imported: {error}", "problem", "reinstall torch")
        return
    cores = len(os.sched_getaffinity(0))
    yield Finding("CPU", f"{cores} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            capability = f"{properties.major}.{properties.minor}"
            value = f"{properties.name}, {properties.total_memory / GIB:.0f} GiB, compute capability {capability}"
            yield Finding(f"GPU {index}", value)
    else:
        remedy = (
            "train with --distributed-backend gloo" if torch.version.cuda is None else "check the driver: nvidia-smi"
        )
        yield Finding("GPU", "none that torch can use", "absent", remedy)
    yield _backend()


def _backend() -> Finding:
    """The backend that a look-up of a usual size would take here."""
    import torch

    from megatron_midus.ops.dispatch import BACKENDS, choose_backend, unsupported_reason

    device = "cuda" if torch.cuda.is_available() else "cpu"
    query = torch.zeros(4096, 8, 64, device=device)
    keys = torch.zeros(8, 64, 32, device=device)
    settings = {"topk": 8, "variant": "block"}
    chosen = choose_backend("auto", query, keys, keys, **settings)
    reasons = {name: unsupported_reason(name, query, keys, keys, **settings) for name in BACKENDS if name != chosen}
    others = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
    return Finding("memory backend", chosen + (f" ({others})" if others else ""))


def _disk(directory: str) -> Finding:
    path = Path(directory).absolute()
    while not path.exists():
        path = path.parent
    free = shutil.disk_usage(path).free / GIB
    is_enough = free >= _LEAST_FREE_GIB
    remedy = "" if is_enough else "checkpoints hold weights and optimizer state; choose a larger --directory"
    return Finding("free disk", f"{free:,.0f} GiB at {path}", "ok" if is_enough else "problem", remedy)


def _family(directory: str) -> Iterator[Finding]:
    from megatron_midus.verbs.family import check_family

    report = check_family(directory)
    yield Finding(report.architecture, f"weights: {report.weights}")
    for name, difference in report.differences.items():
        if difference is None:
            value = f"{report.modules[name]} modules agree with transformers, to {report.largest[name]:.1e} of sigma"
            yield Finding(name, value)
        else:
            yield Finding(name, difference.describe(), "problem")


def command(config: DoctorConfig) -> int:
    """``midus doctor``: exit code 1 when something that is needed is missing, or a family differs."""
    findings = doctor(config)
    marks = {"ok": "ok", "absent": "-", "problem": "PROBLEM"}
    for finding in findings:
        remedy = f"; {finding.remedy}" if finding.remedy else ""
        print(f"{marks[finding.state]:<8} {finding.name:<19} {finding.value}{remedy}")
    problems = [finding.name for finding in findings if finding.state == "problem"]
    if config.family is not None:
        return 1 if problems else 0
    print(f"problems: {', '.join(problems)}" if problems else "everything that the verbs need is installed")
    return 1 if problems else 0
