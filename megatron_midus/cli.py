"""How every entry point ends: a user's mistake is one line on stderr and exit code 1 (2: of the command line), a bug is a traceback."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from megatron_midus.errors import UsageError, is_users_mistake

REPORT = (
    "This is a bug of megatron_midus, not a mistake of yours: please report it, with the traceback above, the command and the "
    "versions of torch, transformers and megatron-core"
)
_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class _Ended(KeyboardInterrupt):
    """What SIGTERM and SIGHUP raise: everything is cleaned up as after Ctrl-C."""

    def __init__(self, number: int) -> None:
        self.number = number


def run(main: Callable[[], int | None], *, handle_signals: bool = True) -> NoReturn:
    """Runs ``main`` and exits.

    A :class:`UserError`, and an ``OSError`` of the file system or the network, is printed as one line, and
    ``MIDUS_TRACEBACK=1`` shows where it came from. Any other exception is ours: its traceback and where to report it.

    Args:
        handle_signals: SIGTERM and SIGHUP end ``main`` as Ctrl-C does, so that nothing half-written stays; a second one
            ends the process at once. ``False`` for programs that have their own way.
    """
    if handle_signals:
        _handle_signals()
    try:
        code = main()
    except KeyboardInterrupt as interrupt:
        number = interrupt.number if isinstance(interrupt, _Ended) else signal.SIGINT
        name = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
        print(name, file=sys.stderr, flush=True)
        sys.exit(128 + number)
    except Exception as error:
        is_users = is_users_mistake(error)
        if is_users and not os.environ.get("MIDUS_TRACEBACK"):
            print(describe(error), file=sys.stderr, flush=True)
        else:
            traceback.print_exc()
            if not is_users:
                print(REPORT, file=sys.stderr, flush=True)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    sys.exit(code or 0)


def describe(error: Exception) -> str:
    """The one line that a user's mistake is told with."""
    return f"error: {' '.join(str(error).split()) or type(error).__name__}"


def _handle_signals() -> None:
    mine = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        if os.getpid() != mine:  # a fork, which has nothing to clean up
            os.kill(os.getpid(), number)
        raise _Ended(number)

    for number in _SIGNALS:
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(number, end)
