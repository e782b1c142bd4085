"""Which rank says what: setup and warnings come from the first rank, losses from the last (it holds the last stage)."""

from __future__ import annotations

import os
import sys


def rank() -> int:
    """Rank of this process, also before torch is imported or torch.distributed is initialised."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", 0))


def is_last_rank() -> bool:
    """Whether this process writes losses."""
    import torch

    return rank() == torch.distributed.get_world_size() - 1


def print_rank_0(text: str) -> None:
    """Prints on the first rank."""
    if rank() == 0:
        print(text, flush=True)


def warn_rank_0(text: str) -> None:
    """Prints a warning on stderr of the first rank."""
    if rank() == 0:
        print(f"warning: {text}", file=sys.stderr, flush=True)
