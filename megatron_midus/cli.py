"""How every entry point ends: a user's mistake is one line on stderr and exit code 1 (2: of the command line), a bug is a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from megatron_midus.errors import UsageError


def run(main: Callable[[], int | None]) -> NoReturn:
    """Runs ``main`` and exits.

    ``ValueError`` (ours, names the value and the remedy) and ``OSError`` (missing file, full disk, no permission) are
    printed as one line. Set ``MIDUS_TRACEBACK=1`` to see where they came from. Everything else propagates.
    """
    try:
        code = main()
    except (ValueError, OSError) as error:
        if os.environ.get("MIDUS_TRACEBACK"):
            raise
        print(describe(error), file=sys.stderr, flush=True)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    sys.exit(code or 0)


def describe(error: Exception) -> str:
    """The one line that a user's mistake is told with."""
    return f"error: {' '.join(str(error).split()) or type(error).__name__}"
