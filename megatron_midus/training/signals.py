"""SIGTERM, SIGUSR1 and Ctrl-C: the step is finished or the evaluation left, a checkpoint saved, the exit code 0.

``sbatch --signal=USR1@300`` sends SIGUSR1 five minutes before the time is up; SIGTERM comes at the end, or from torchrun,
which also passes on Ctrl-C: the first as SIGINT, the second as SIGTERM.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

import torch

HANDLED = (signal.SIGTERM, signal.SIGUSR1)


class TerminationSignal:
    """Remembers which signal came to this process; ranks agree on it once a step, and once a batch of an evaluation."""

    # Of the class, because signals come to the process.
    received_here = 0

    def __init__(self) -> None:
        self._process = os.getpid()

    def install(self) -> None:
        """Takes over what schedulers send, for this process."""
        for number in HANDLED:
            signal.signal(number, self._on_signal)

    def install_interrupt(self) -> None:
        """Takes over Ctrl-C as well: from when there is something to save. Before, it ends the process at once."""
        signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a fork that writes a checkpoint
        TerminationSignal.received_here = TerminationSignal.received_here or number
        if number == signal.SIGINT:
            # The next one does not wait for Python, which may be waiting for another rank.
            for again in (signal.SIGINT, signal.SIGTERM):
                signal.signal(again, signal.SIG_DFL)
            _say("interrupted: ending after this step and a checkpoint; once more ends at once, without")

    def received_anywhere(self) -> str | None:
        """Name of a signal that told any rank to end. A collective: signals reach ranks at different times, and a rank
        that stopped alone would leave the others waiting in the next step."""
        number = torch.tensor([self.received_here], dtype=torch.int32, device="cuda")
        torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
        return signal.Signals(int(number)).name if int(number) else None


def _say(text: str) -> None:
    """On the first rank. A handler runs in the middle of anything, so not through Python's buffers."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"{text}\n".encode())
