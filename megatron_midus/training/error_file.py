"""What torchrun says at the very end of a failed run, from the file that it hands every process for that.

torchrun prints its own traceback and, in the last lines, what the first process to fail wrote into this file. It is what
``torch.distributed.elastic.multiprocessing.errors.record`` writes, which would need torch, and a traceback where one line
says it all.
"""

from __future__ import annotations

import contextlib
import json
import os
import time

_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"


def write_error_file(text: str, *, kind: str) -> None:
    """Leaves ``text`` for torchrun, where it asks for it.

    Args:
        text: a line beginning with ``error:``, or a traceback. It begins in a line of its own.
        kind: the name of the exception.
    """
    path = os.environ.get(_FILE_VARIABLE)
    if not path:
        return
    # torchrun reads "py_callstack" and indents what follows a line break.
    details = {"py_callstack": f"\n{text.rstrip()}", "timestamp": str(int(time.time()))}
    message = {"message": {"message": f"{kind}: {text.splitlines()[-1]}", "extraInfo": details}}
    # The error itself matters more than that torchrun repeats it.
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as stream:
        json.dump(message, stream)
