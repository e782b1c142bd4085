"""``pretrain`` as a function: starts the driver in processes of its own and hands back what it told."""

from __future__ import annotations

import collections
import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_midus.config.run_file import words_of_entries
from megatron_midus.errors import UserError
from megatron_midus.progress import SILENT, Advance, Progress
from megatron_midus.training.arguments import build_parser

_ITERATION = re.compile(r"iteration\s+(\d+)/\s*(\d+) \|")
_LOSS = re.compile(r"\| lm loss: (\S+)")
_VALIDATION = re.compile(r"validation loss at iteration (\d+).*?lm loss value: (\S+)")
_ERROR = re.compile(r"^(?:\[rank\d+\]: ?)?error: (.*)")
_TAIL = 40


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a training told.

    Attributes:
        iteration: the last one that was logged; 0 when none was.
        losses: ``(iteration, nats/token)``, as logged.
        validation_losses: likewise, of evaluations.
        directory: of the checkpoints; ``None`` when none were kept.
    """

    iteration: int
    losses: tuple[tuple[int, float], ...]
    validation_losses: tuple[tuple[int, float], ...]
    directory: Path | None


def pretrain(
    *, processes: int = 1, progress: Progress | None = None, show_log: bool = True, **settings: Any
) -> Trained:
    """Continues the pre-training of a model; the keywords are the flags of ``midus pretrain``.

    Args:
        processes: on this machine; more than one are started with torchrun.
        progress: shows iterations; without it the log is the progress.
        show_log: print the log as it comes.
        settings: flags, for instance ``lr=1e-3``, ``tensor_model_parallel_size=2``.

    Raises:
        UserError: what the driver refused, in its words.
        RuntimeError: the driver ended otherwise; the message ends with the last lines of its log.
    """
    words = words_of_entries(build_parser(), settings, where="pretrain()")
    with (progress or SILENT)("training", total=settings.get("train_iters"), unit="iteration") as advance:
        lines = follow_ranks("pretrain", processes, words, advance=advance, show_log=show_log)
    save = settings.get("save")
    return Trained(lines.iteration, tuple(lines.losses), tuple(lines.validation), Path(save) if save else None)


def follow_ranks(
    verb: str, processes: int, words: Sequence[str], *, advance: Advance = lambda number: None, show_log: bool = True
) -> _Log:
    """Runs ``midus VERB`` in processes of its own to its end; returns what they told.

    Raises:
        UserError: what they refused, in their words.
        RuntimeError: they ended otherwise; the message ends with the last lines of the log.
    """
    if processes < 1:
        raise UserError(f"processes={processes} must be at least 1")
    lines = _Log(advance, show_log)
    code = lines.follow(_command(verb, processes, words))
    if code:
        lines.raise_failure(code)
    return lines


def _command(verb: str, processes: int, words: Sequence[str]) -> list[str]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*launcher, "-m", "megatron_midus", verb, *words]


class _Log:
    """Reads the driver's output line by line."""

    def __init__(self, advance: Advance, show: bool) -> None:
        self.advance, self.show = advance, show
        self.iteration = 0
        self.losses: list[tuple[int, float]] = []
        self.validation: list[tuple[int, float]] = []
        self.tail: collections.deque[str] = collections.deque(maxlen=_TAIL)

    def follow(self, command: list[str]) -> int:
        """Runs it to its end; an interruption is handed on, so that the driver saves."""
        environment = {"TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE", **os.environ}
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, errors="replace"
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                self._read(line.rstrip("\n"))
        except KeyboardInterrupt:
            process.terminate()
            for line in process.stdout:
                self._read(line.rstrip("\n"))
            process.wait()
            raise
        return process.wait()

    def _read(self, line: str) -> None:
        self.tail.append(line)
        if self.show:
            print(line, flush=True)
        if step := _ITERATION.search(line):
            self.advance(int(step[1]) - self.iteration)
            self.iteration = int(step[1])
            if loss := _LOSS.search(line):
                self.losses.append((self.iteration, float(loss[1])))
        elif found := _VALIDATION.search(line):
            self.validation.append((int(found[1]), float(found[2])))

    def raise_failure(self, code: int) -> None:
        for line in self.tail:
            if found := _ERROR.match(line):
                raise UserError(found[1])
        raise RuntimeError(f"training ended with exit code {code}:\n" + "\n".join(self.tail))
