"""How far a long step is: bars on a terminal or in a notebook, whole lines in a log, calls of a function, or nothing."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Protocol, TextIO

# Seconds between two lines of one step where the output is no terminal.
LOG_INTERVAL = 60.0

Advance = Callable[[int], None]


class Progress(Protocol):
    """Called at the start of a step; what it yields is called with the units done since."""

    def __call__(
        self, title: str, *, total: int | None = None, unit: str = "it", initial: int = 0
    ) -> contextlib.AbstractContextManager[Advance]: ...


class Bars:
    """tqdm's bar with total and time left on a terminal and in a notebook; elsewhere a line a minute, none for shorter steps.

    Args:
        file: where to; stderr when absent.
    """

    def __init__(self, file: TextIO | None = None) -> None:
        self.file = file

    @contextlib.contextmanager
    def __call__(
        self, title: str, *, total: int | None = None, unit: str = "it", initial: int = 0
    ) -> Iterator[Advance]:
        file = self.file or sys.stderr
        if not (file.isatty() or _in_notebook()):
            yield _Lines(title, total, unit, initial, file).advance
            return
        from tqdm.auto import tqdm

        # Many units are told in thousands; a step's bar goes when the step is done.
        with tqdm(
            total=total, desc=title, unit=unit, unit_scale=(total or 0) > 100_000, initial=initial,
            file=file, leave=False, dynamic_ncols=True,
        ) as bar:  # fmt: skip
            yield lambda count: None if bar.update(count) else None


class Callback:
    """Hands progress to a function.

    Args:
        function: called as ``function(title, done, total)``; ``total`` is ``None`` where nobody knows it.
    """

    def __init__(self, function: Callable[[str, int, int | None], object]) -> None:
        self.function = function

    @contextlib.contextmanager
    def __call__(
        self, title: str, *, total: int | None = None, unit: str = "it", initial: int = 0
    ) -> Iterator[Advance]:
        done = initial

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self.function(title, done, total)

        yield advance


@contextlib.contextmanager
def SILENT(title: str, *, total: int | None = None, unit: str = "it", initial: int = 0) -> Iterator[Advance]:
    """Shows nothing."""
    yield lambda count: None


class _Lines:
    """A line every ``LOG_INTERVAL`` seconds: how far, and how long it will take at this pace."""

    def __init__(self, title: str, total: int | None, unit: str, initial: int, file: TextIO) -> None:
        self.title, self.total, self.unit, self.file = title, total, unit, file
        self.initial = self.done = initial
        self.start = self.last = time.monotonic()

    def advance(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.last < LOG_INTERVAL:
            return
        self.last = now
        print(self._line(now - self.start), file=self.file, flush=True)

    def _line(self, seconds: float) -> str:
        rate = (self.done - self.initial) / seconds
        if not self.total:
            return f"{self.title}: {self.done:,} {self.unit}, {rate:,.0f} {self.unit}/s"
        left = (self.total - self.done) / rate if rate else float("inf")
        return (
            f"{self.title}: {self.done:,} of {self.total:,} {self.unit} ({100 * self.done / self.total:.0f} %), "
            f"{rate:,.0f} {self.unit}/s, {_duration(left)} left"
        )


def _duration(seconds: float) -> str:
    if seconds == float("inf"):
        return "unknown time"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _in_notebook() -> bool:
    shell = sys.modules.get("IPython")
    return shell is not None and getattr(shell.get_ipython(), "kernel", None) is not None
