"""SIGTERM: a scheduler takes the machines back. The step is finished, a checkpoint saved, and the exit code is 0."""

from __future__ import annotations

import signal
from types import FrameType

import torch


class TerminationSignal:
    """Remembers that SIGTERM came to this process; ranks agree on it once a step."""

    def __init__(self) -> None:
        self._received = False

    def install(self) -> None:
        """Takes over SIGTERM, for this process."""
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def received_anywhere(self) -> bool:
        """Whether any rank was told to end. A collective: signals reach ranks at different times, and a rank that
        stopped alone would leave the others waiting in the next step."""
        flag = torch.tensor([int(self._received)], dtype=torch.int32, device="cuda")
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag.item())
