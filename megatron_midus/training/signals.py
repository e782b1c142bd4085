"""SIGTERM and SIGUSR1: a scheduler takes the machines back. The step is finished, a checkpoint saved, the exit code 0.

``sbatch --signal=USR1@300`` sends SIGUSR1 five minutes before the time is up; SIGTERM comes at the end, or from torchrun.
"""

from __future__ import annotations

import signal
from types import FrameType

import torch

HANDLED = (signal.SIGTERM, signal.SIGUSR1)


class TerminationSignal:
    """Remembers which signal came to this process; ranks agree on it once a step."""

    # Of the class, because signals come to the process.
    received_here = 0

    def install(self) -> None:
        """Takes over the signals, for this process."""
        for number in HANDLED:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        TerminationSignal.received_here = number

    def received_anywhere(self) -> str | None:
        """Name of a signal that told any rank to end. A collective: signals reach ranks at different times, and a rank
        that stopped alone would leave the others waiting in the next step."""
        number = torch.tensor([self.received_here], dtype=torch.int32, device="cuda")
        torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
        return signal.Signals(int(number)).name if int(number) else None
