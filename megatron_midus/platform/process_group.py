"""Rendezvous: ``torch.distributed`` from torchrun's environment, and names that keep two starts apart."""

from __future__ import annotations

import datetime
import os
import time
import uuid
from typing import Any, Literal

import torch

from megatron_midus.errors import UserError
from megatron_midus.platform.cpu_mapping import activate_cpu_mapping, is_active, refuse_beside_cuda
from megatron_midus.platform.device import apex_available, transformer_engine_available
from megatron_midus.platform.fused_adam import install_fused_adam


def initialize_distributed(backend: Literal["nccl", "gloo"], *, timeout_minutes: float = 10) -> None:
    """Starts ``torch.distributed`` from torchrun's environment, or for one process when there is none.

    Args:
        backend: ``gloo`` runs on the CPU and calls ``activate_cpu_mapping``; ``nccl`` takes GPU ``LOCAL_RANK``.
        timeout_minutes: how long a collective may wait for the other ranks.

    Raises:
        ValueError: a backend that cannot run here, or a torchrun environment that is incomplete.
    """
    if backend not in ("nccl", "gloo"):
        raise UserError(f"distributed backend {backend!r} is not known; choose nccl or gloo")
    alone = "RANK" not in os.environ and "WORLD_SIZE" not in os.environ
    missing = [n for n in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    if missing and not alone:
        raise UserError(f"the environment lacks {', '.join(missing)}; start the program with torchrun")
    if backend == "gloo":
        activate_cpu_mapping()
    else:
        _select_gpu()
    if not (transformer_engine_available() or apex_available()):
        install_fused_adam()
    if torch.distributed.is_initialized():
        return
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if alone:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        return
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        torch.distributed.init_process_group(backend, timeout=timeout)
        return
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = torch.distributed.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world_size, is_master=False, timeout=timeout
    )
    fresh = torch.distributed.PrefixStore(name_of_this_start(store, rank, world_size, timeout), store)
    torch.distributed.init_process_group(backend, store=fresh, rank=rank, world_size=world_size, timeout=timeout)


def name_of_this_start(store: Any, rank: int, world_size: int, timeout: datetime.timedelta) -> str:
    """A name that exactly the processes of this start of a job share.

    torchrun keeps its store when it starts ranks again, with the addresses of the dead ones in it; a rank that connects
    to those fails or hangs. Its count of restarts does not tell starts apart either: launchers of several hosts count
    each for itself. So rank 0 draws a name, and hands it to whoever says hello under a name of its own drawing; it is
    done when all have taken it, which the dead cannot.

    Args:
        store: that all processes reach.
        timeout: until the last process has come.

    Raises:
        ValueError: a process that does not come.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    if rank:
        store.set(f"hello/{rank}", own)
    name = own if rank == 0 else ""
    missing = set(range(1, world_size)) if rank == 0 else {0}
    while missing:
        if time.monotonic() > deadline:
            raise UserError(f"rank {rank} waited {timeout} for ranks {sorted(missing)}, which never started")
        if rank == 0:
            for other in missing:
                if store.check([f"hello/{other}"]):
                    store.set(f"welcome/{store.get(f'hello/{other}').decode()}", own)
            missing = {other for other in missing if not store.check([f"taken/{own}/{other}"])}
        elif store.check([f"welcome/{own}"]):
            name, missing = store.get(f"welcome/{own}").decode(), set()
            store.set(f"taken/{name}/{rank}", "")
        time.sleep(0.005 if missing else 0)
    return name


def check_backend(backend: Literal["nccl", "gloo"]) -> None:
    """Raises ``ValueError`` for a backend that cannot run on this machine; changes nothing."""
    if backend == "gloo":
        if not is_active():
            refuse_beside_cuda()
        return
    if not torch.cuda.is_available():
        raise UserError("backend nccl needs a CUDA device and there is none; choose --distributed-backend gloo")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"LOCAL_RANK={local_rank} but this machine has {torch.cuda.device_count()} CUDA devices; "
            "start at most one process per device"
        )


def _select_gpu() -> None:
    check_backend("nccl")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
