"""What a killed process leaves of an output: a partial that nobody holds the lock of."""

from __future__ import annotations

from pathlib import Path

from megatron_midus.partials import make_partial


def leave_partial(
    parent: Path,
    name: str,
    *,
    content: dict[str, str] | None = None,
    old: dict[str, str] | None = None,
    host: str | None = None,
) -> Path:
    """``.NAME.00000000dead.partial`` with files ``{name: text}`` in what was being written and in what was set aside."""
    directory, lock = make_partial(parent, name, "00000000dead")
    lock.close()
    if host is not None:
        (directory / "lock").write_text(host)
    for kind, files in (("content", content), ("old", old)):
        if files is not None:
            (directory / kind).mkdir()
            for file, text in files.items():
                (directory / kind / file).write_text(text)
    return directory
