"""An unfinished run on disk: files that only grow, and one small state that says how much of each counts.

A kill may leave more in the files than the state knows; the next run cuts that off and goes on from the state, so that
the finished files are those of a run that nobody killed. Finishing is a list of renames that can be repeated.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO

from megatron_midus.errors import UserError
from megatron_midus.files import write_text_atomically

_STATE = "state.json"
_LOCK = "lock"


class Journal:
    """A directory for one run, a context manager.

    Args:
        directory: made when absent; holds everything until ``finish``. On the file system of the targets.
        settings: what determines the output. A journal of other settings is not gone on from.
        restart: throw away a journal of other settings instead of refusing.

    Raises:
        ValueError: another process works in ``directory``, or it was left by a run with other settings.

    Attributes:
        state: what the last ``commit`` was given; ``None`` at the beginning.
    """

    def __init__(self, directory: Path, settings: dict[str, Any], *, restart: bool = False) -> None:
        self.directory = directory
        # Through JSON and back, so that it compares with what is read from disk.
        self.settings = json.loads(json.dumps(settings))
        self.restart = restart
        self.state: dict[str, Any] | None = None
        self._sizes: dict[str, int] = {}
        self._streams: dict[str, BinaryIO] = {}
        self._lock: BinaryIO | None = None

    def __enter__(self) -> Journal:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._acquire()
            self._read()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Keeps what was committed; a run that committed nothing leaves nothing."""
        for stream in self._streams.values():
            stream.close()
        if self.state is None:
            shutil.rmtree(self.directory, ignore_errors=True)
        self._release()

    def stream(self, name: str) -> BinaryIO:
        """A file to append to, at the end of what was committed of it."""
        if name not in self._streams:
            stream = open(self.directory / name, "ab")  # noqa: SIM115
            stream.truncate(self._sizes.get(name, 0))
            stream.seek(0, os.SEEK_END)
            self._streams[name] = stream
        return self._streams[name]

    def commit(self, state: dict[str, Any]) -> None:
        """Makes everything written so far, and ``state``, what the next run finds."""
        for stream in self._streams.values():
            stream.flush()
            os.fsync(stream.fileno())
        sizes = {name: stream.tell() for name, stream in self._streams.items()}
        text = json.dumps({"settings": self.settings, "sizes": sizes, "state": state})
        write_text_atomically(self.directory / _STATE, text)
        self.state = state

    def finish(self, targets: dict[str, str]) -> None:
        """Moves the files ``{name: target}`` that are still here to their targets, in this order, and ends."""
        for name, target in targets.items():
            if (self.directory / name).exists():
                os.replace(self.directory / name, target)
        self.state = None  # __exit__ removes the rest

    def _acquire(self) -> None:
        self._lock = open(self.directory / _LOCK, "wb")  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is working in {self.directory}; wait for it, or choose another --output-prefix"
            ) from None
        except OSError:
            # Some network file systems have no locks. They still work, for those who start one process.
            pass

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
        self._streams, self._lock = {}, None

    def _read(self) -> None:
        path = self.directory / _STATE
        if not path.is_file():
            return
        try:
            content = json.loads(path.read_text())
            settings, sizes, state = content["settings"], content["sizes"], content["state"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is damaged; delete {self.directory} to start again") from None
        if settings != self.settings:
            if not self.restart:
                raise UserError(
                    f"{self.directory} is an unfinished run that differs: {_difference(settings, self.settings)}; give "
                    "its settings to continue it, or --overwrite to start again"
                )
            path.unlink()
            return
        for name, size in sizes.items():
            # A stream that has been moved to its target already is no loss.
            with contextlib.suppress(FileNotFoundError):
                if (self.directory / name).stat().st_size < size:
                    raise UserError(f"{self.directory / name} is shorter than its run left it; delete {self.directory}")
        self._sizes, self.state = sizes, state


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """``append_eod true there, false here`` for the first setting that differs."""
    name = next(name for name in [*before, *now] if before.get(name) != now.get(name))
    there, here = before.get(name), now.get(name)
    if isinstance(there, list) and isinstance(here, list):
        # Of a thousand inputs, the one that changed.
        there, here = next(pair for pair in itertools.zip_longest(there, here) if pair[0] != pair[1])
    return f"{name} {json.dumps(there)} there, {json.dumps(here)} here"
