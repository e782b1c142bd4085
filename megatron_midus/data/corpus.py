"""Documents from files: .jsonl and .txt, plain or compressed (.gz, .zst), and .parquet; directories and glob patterns.

A ``.jsonl`` file holds one JSON object a line, a ``.parquet`` file one document a row. A ``.txt`` file is one document,
unless it contains the separator, by default a form feed, which no ordinary prose contains: blank lines are part of a
text and do not end it. Everything is UTF-8 (a byte-order mark is dropped). Imports no Megatron.
"""

from __future__ import annotations

import dataclasses
import glob
import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from megatron_midus.data.compression import DamagedStream, Gzip, PackedStream, Zstandard
from megatron_midus.errors import UserError
from megatron_midus.json_files import parse_json

DEFAULT_SEPARATOR = "\f"
TEXT_KEY = "text"

_SUFFIXES = (*(kind + packed for kind in (".jsonl", ".txt") for packed in ("", ".gz", ".zst")), ".parquet")
_BOM = b"\xef\xbb\xbf"
_CHUNK = 1 << 20
_PARQUET_ROWS = 1024


class MalformedDocument(UserError):
    """One record that is no document; the message starts with ``file:line``."""


@dataclasses.dataclass(frozen=True)
class RawDocument:
    """A record as it lies in the file, not decoded yet: cheap to hand to a worker process."""

    path: str
    line: int
    """1-based line on which the record starts."""
    content: bytes
    is_json: bool

    @property
    def where(self) -> str:
        return f"{self.path}:{self.line}"

    @property
    def size(self) -> int:
        """Bytes of the record."""
        return len(self.content)

    def parse(self, keys: Sequence[str]) -> list[str]:
        """The texts under ``keys``; raises :class:`MalformedDocument`."""
        if not self.is_json:
            text = _decode(self.content, self.where)
            return [text for _ in keys]
        record = self.parse_object()
        for key in keys:
            if key not in record:
                there = ", ".join(map(repr, list(record)[:8])) or "none"
                raise MalformedDocument(f"{self.where}: no key {key!r}; keys there: {there}")
        return [_text_of(record[key], key, self.where) for key in keys]

    def parse_object(self) -> dict[str, Any]:
        """The JSON object of the line; raises :class:`MalformedDocument`."""
        try:
            record = parse_json(_decode(self.content, self.where), self.where)
        except MalformedDocument:
            raise
        except UserError as error:
            raise MalformedDocument(str(error)) from None
        if not isinstance(record, dict):
            raise MalformedDocument(f"{self.where}: a {type(record).__name__}, not a JSON object")
        return record


@dataclasses.dataclass(frozen=True)
class RowDocument:
    """A row of a .parquet file, its strings not decoded yet."""

    path: str
    row: int
    """1-based."""
    values: tuple[object, ...]
    """What the columns hold; strings as UTF-8 bytes."""
    columns: tuple[str, ...] = ()
    """Their names."""

    @property
    def where(self) -> str:
        return f"{self.path}:{self.row}"

    @property
    def size(self) -> int:
        """Bytes of the strings."""
        return sum(len(value) for value in self.values if isinstance(value, bytes))

    def parse(self, keys: Sequence[str]) -> list[str]:
        """The texts of the columns ``keys``, which are those that were read; raises :class:`MalformedDocument`."""
        values = (_decode(v, f"{self.where}: {k!r}") if isinstance(v, bytes) else v for k, v in zip(keys, self.values))
        return [_text_of(value, key, self.where) for key, value in zip(keys, values)]

    def parse_object(self) -> dict[str, Any]:
        """The columns by name; raises :class:`MalformedDocument`."""
        return {
            key: _decode(value, f"{self.where}: {key!r}") if isinstance(value, bytes) else value
            for key, value in zip(self.columns, self.values)
        }


Record = RawDocument | RowDocument


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedDocument(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from None


def _text_of(value: object, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise MalformedDocument(f"{where}: {key!r} is {type(value).__name__}, not a string")
    check_encodable(value, repr(key), where)
    return value


def check_encodable(text: str, name: str, where: str) -> None:
    """Raises :class:`MalformedDocument` for half of a surrogate pair: ``"\\ud800"`` alone is valid JSON and no text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise MalformedDocument(f"{where}: {name} contains half of a surrogate pair") from None


def find_inputs(inputs: Sequence[str]) -> list[Path]:
    """The files that ``inputs`` mean, in a fixed order.

    Args:
        inputs: files, directories (all files below them with a known suffix, sorted by path) and glob
            patterns. Order is kept; a file that is named twice is read once.

    Raises:
        ValueError: nothing matches, or a named file has another suffix.
    """
    files: dict[Path, None] = {}
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(_SUFFIXES))
            if not found:
                raise UserError(f"directory {name} holds no {', '.join(_SUFFIXES)} file")
        elif path.is_file():
            found = [path]
        elif glob.has_magic(name):
            found = sorted(p for p in map(Path, glob.glob(name, recursive=True)) if p.is_file())
            if not found:
                raise UserError(f"no file matches {name}")
        else:
            raise UserError(f"input {name} does not exist")
        for file in found:
            if not file.name.endswith(_SUFFIXES):
                raise UserError(
                    f"{file} is neither JSON lines nor text nor parquet; expected one of {', '.join(_SUFFIXES)}"
                )
            files.setdefault(file)
    if not files:
        raise UserError("no input file was given")
    return list(files)


def read_raw(
    path: Path, *, keys: Sequence[str] = (TEXT_KEY,), separator: str = DEFAULT_SEPARATOR, start: int = 0
) -> Iterator[Record]:
    """The records of one file in order; blank lines of JSON lines are passed over.

    Args:
        path: one of :func:`find_inputs`.
        keys: columns of a .parquet file.
        separator: what divides a .txt file.
        start: records to pass over.

    Raises:
        ValueError: a file that is damaged, cut off or not of its kind, a missing column, or a missing package.
    """
    if not separator:
        raise UserError("the document separator is empty")
    if path.suffix == ".parquet":
        yield from _read_rows(path, keys, start)
        return
    is_json = ".jsonl" in path.name
    try:
        with _open(path) as stream:
            records = _read_lines(path, stream) if is_json else _read_separated(path, stream, separator.encode())
            yield from itertools.islice(records, start, None)
    except DamagedStream as error:
        raise UserError(f"{path} is damaged or cut off: {error}") from None


def read_documents(
    inputs: Sequence[str], *, key: str = TEXT_KEY, separator: str = DEFAULT_SEPARATOR
) -> Iterator[tuple[str, str]]:
    """``(file:line, text)`` of every document that is not empty.

    Raises:
        ValueError: an input that does not exist, a malformed record (with ``file:line``), or no document at all.
    """
    any_document = False
    for path in find_inputs(inputs):
        for raw in read_raw(path, keys=[key], separator=separator):
            (text,) = raw.parse([key])
            if text.strip():
                any_document = True
                yield raw.where, text
    if not any_document:
        raise UserError(f"{', '.join(inputs)}: no document with any text")


def unescape(text: str) -> str:
    r"""Turns the ``\n``, ``\t``, ``\f``, ``\r`` and ``\\`` of a command line into the characters they stand for."""
    pieces = {"n": "\n", "t": "\t", "f": "\f", "r": "\r", "\\": "\\"}
    out, characters = [], iter(text)
    for character in characters:
        if character == "\\":
            following = next(characters, "")
            if following not in pieces:
                raise UserError(f"the escape \\{following} in {text!r} is not known; use one of \\n \\t \\f \\r \\\\")
            character = pieces[following]
        out.append(character)
    return "".join(out)


def _open(path: Path) -> BinaryIO:
    if path.name.endswith(".gz"):
        return io.BufferedReader(PackedStream(path, Gzip(path)), _CHUNK)  # type: ignore[type-var, return-value]
    if path.name.endswith(".zst"):
        return io.BufferedReader(PackedStream(path, Zstandard(path)), _CHUNK)  # type: ignore[type-var, return-value]
    return open(path, "rb")


def _read_lines(path: Path, stream: BinaryIO) -> Iterator[RawDocument]:
    for number, line in enumerate(stream, start=1):
        content = line.removeprefix(_BOM) if number == 1 else line
        content = content.strip()
        if content:
            yield RawDocument(str(path), number, content, is_json=True)


def _read_separated(path: Path, stream: BinaryIO, separator: bytes) -> Iterator[RawDocument]:
    """Holds one document and one chunk at a time; UTF-8 lets bytes be searched for a separator."""
    buffer = bytearray(stream.read(_CHUNK).removeprefix(_BOM))
    number, searched, more = 1, 0, True
    while more:
        start = 0
        while (end := buffer.find(separator, max(start, searched))) >= 0:
            content, start = bytes(buffer[start:end]), end + len(separator)
            yield RawDocument(str(path), number, content, is_json=False)
            number += content.count(b"\n") + separator.count(b"\n")
        del buffer[:start]
        # A separator may lie across two chunks, so the last bytes are searched again.
        searched = max(0, len(buffer) - len(separator) + 1)
        chunk = stream.read(_CHUNK)
        buffer += chunk
        more = bool(chunk)
    yield RawDocument(str(path), number, bytes(buffer), is_json=False)


def open_parquet(path: Path, keys: Sequence[str]) -> Any:
    """The opened ``pyarrow.parquet.ParquetFile``; raises ``ValueError`` when it is none or lacks one of ``keys``."""
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError:
        raise UserError(f"{path} needs the package pyarrow: pip install pyarrow") from None
    try:
        file = parquet.ParquetFile(path, page_checksum_verification=True)
    except (ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is damaged or not a parquet file: {str(error).strip()}") from None
    columns = file.schema_arrow.names
    for key in keys:
        if key not in columns:
            file.close()
            raise UserError(f"{path}: no column {key!r}; columns there: {', '.join(map(repr, columns[:8])) or 'none'}")
    return file


def columns_of(path: Path) -> list[str]:
    """The names of the columns of a .parquet file."""
    with open_parquet(path, []) as file:
        return list(file.schema_arrow.names)


def _read_rows(path: Path, keys: Sequence[str], start: int) -> Iterator[RowDocument]:
    """Holds one row group at a time; groups before ``start`` are not read."""
    row = 0
    with open_parquet(path, keys) as file:
        from pyarrow import ArrowException

        for group in range(file.num_row_groups):
            num_rows = file.metadata.row_group(group).num_rows
            if row + num_rows <= start:
                row += num_rows
                continue
            try:
                for batch in file.iter_batches(_PARQUET_ROWS, row_groups=[group], columns=list(keys)):
                    skipped = min(max(start - row, 0), batch.num_rows)
                    yield from rows_of(batch.slice(skipped), keys, str(path), row + skipped)
                    row += batch.num_rows
            # ValueError, OverflowError: a column of another type, whose values Python has no equal of.
            except (ArrowException, OSError, ValueError, OverflowError) as error:
                raise UserError(f"{path} is damaged after row {row}: {str(error).strip()}") from None


def rows_of(table: Any, keys: Sequence[str], path: str, rows_before: int) -> Iterator[RowDocument]:
    """The rows of an Arrow table or batch as records of ``path``, where ``rows_before`` stand before them."""
    cells = zip(*(_cells(table.column(key)) for key in keys))
    for row, values in enumerate(cells, start=rows_before + 1):
        yield RowDocument(path, row, values, tuple(keys))


def _cells(column: Any) -> list[object]:
    """The values of a column; strings as bytes, which pyarrow does not check to be UTF-8 (the parser does)."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pyarrow.types.is_string(column.type) or pyarrow.types.is_string_view(column.type):
        column = column.cast(pyarrow.binary())
    elif pyarrow.types.is_large_string(column.type):
        column = column.cast(pyarrow.large_binary())
    return column.to_pylist()
