"""JSON that users give: every way in which it cannot be read is one line that names the file, and the line in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_midus.errors import UserError


def parse_json(text: str, where: str) -> Any:
    """What ``text`` says.

    Args:
        where: ``file:line``, with which messages begin.

    Raises:
        UserError: it is not JSON, nested deeper than Python goes, or has an integer of thousands of digits.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({_reason(error)})") from None


def read_json_object(path: str | Path) -> dict[str, Any]:
    """The object in a file; raises :class:`UserError` when it holds none, and ``OSError`` when it cannot be opened."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {_reason(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content


def _reason(error: Exception) -> str:
    # ValueError: JSONDecodeError, UnicodeDecodeError, and that of int() for more than 4300 digits, which speaks of Python.
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return str(error).split(";")[0]
