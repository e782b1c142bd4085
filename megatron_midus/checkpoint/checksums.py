"""SHA-256 of every file of a checkpoint, written at save and compared before anything is read.

``checksums.sha256`` has the format of the tool of that name (``cd iter_0000040 && sha256sum -c checksums.sha256``), and a
last line that is a comment to it: the hash of the lines above, so that damage to the list itself is seen as well.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from megatron_midus.errors import UserError
from megatron_midus.files import write_text_atomically

CHECKSUMS_FILE = "checksums.sha256"
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_SEAL = "# sha256 of the lines above: "
_CHUNK_BYTES = 1 << 22


class DamagedError(UserError):
    """A checkpoint is not as it was written."""


def file_sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest, buffer = hashlib.sha256(), bytearray(_CHUNK_BYTES)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def write_checksums(directory: str | Path, known: Mapping[str, str] | None = None) -> None:
    """Writes the list for all files of ``directory``, the last file of a checkpoint to be written.

    Args:
        known: ``{file name: hash}`` of files that need not be read again, because those who wrote them did.
    """
    directory, known = Path(directory), known or {}
    names = sorted(
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        if path.is_file() and path.name != CHECKSUMS_FILE
    )
    _write(directory, {name: known.get(name) or file_sha256(directory / name) for name in names})


def _write(directory: Path, checksums: Mapping[str, str]) -> None:
    body = "".join(f"{checksums[name]}  {name}\n" for name in sorted(checksums))
    write_text_atomically(directory / CHECKSUMS_FILE, f"{body}{_SEAL}{_text_sha256(body)}\n")


def change_file(directory: str | Path, name: str, change: Callable[[], object]) -> None:
    """Adds or replaces one file of a whole checkpoint. Until ``change`` is done the list does not name the file, so that a
    kill at any moment leaves a checkpoint that is as its list says."""
    directory = Path(directory)
    checksums = read_checksums(directory)
    if checksums is None:
        change()
        return
    if checksums.pop(name, None) is not None:
        _write(directory, checksums)
    change()
    _write(directory, {**checksums, name: file_sha256(directory / name)})


def read_checksums(directory: str | Path) -> dict[str, str] | None:
    """``{file name: hash}``; ``None`` for a checkpoint that other programs or earlier versions wrote without the list.

    Raises:
        DamagedError: the list itself is not as it was written.
    """
    path = Path(directory) / CHECKSUMS_FILE
    if not path.is_file():
        return None
    content = path.read_bytes()
    body, found, seal = content.rpartition(_SEAL.encode())
    if not found or seal != f"{hashlib.sha256(body).hexdigest()}\n".encode():
        raise DamagedError(f"{path} is damaged")
    matches = [_LINE.fullmatch(line) for line in body.decode().splitlines()]
    return {match[2]: match[1] for match in matches if match}


def check_files(directory: str | Path, checksums: Mapping[str, str], names: Iterable[str]) -> None:
    """Raises ``DamagedError`` with the first of ``names`` that is missing or not as it was written."""
    for name in names:
        path = Path(directory) / name
        if not path.is_file():
            raise DamagedError(f"{path} is missing")
        if file_sha256(path) != checksums[name]:
            raise DamagedError(f"{path} is damaged: it has not the SHA-256 that {CHECKSUMS_FILE} says")


def check_checkpoint(directory: str | Path) -> bool:
    """Compares every file of a checkpoint, on this process alone.

    Returns:
        False when there is no list to compare with.

    Raises:
        DamagedError: the first file that is missing or not as it was written.
    """
    checksums = read_checksums(directory)
    if checksums is None:
        return False
    check_files(directory, checksums, checksums)
    return True


def _text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
