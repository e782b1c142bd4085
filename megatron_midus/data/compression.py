"""Compressed files as their own programs read them: everything that ``gzip`` and ``zstd`` can write, and no cut-off one."""

from __future__ import annotations

import io
import sys
import zlib
from pathlib import Path
from typing import Any, Protocol

from megatron_midus.errors import UserError

# Compressed bytes at a time: text that repeats itself grows a thousandfold.
_CHUNK = 1 << 16


class DamagedStream(Exception):
    """The file is damaged or ends too early; the message says how, not where."""


class Format(Protocol):
    """A compression whose files are frames, one behind the other."""

    errors: tuple[type[Exception], ...]

    def frame(self) -> Any:
        """A decompressor of one frame: ``decompress(data)``, ``eof``, ``unused_data``."""

    def is_over(self, rest: bytes) -> bool:
        """Whether ``rest``, what follows the last frame, is no further one and to be left alone."""

    def explain(self, error: Exception) -> str:
        """One line about what a decompressor raised."""


class Gzip:
    """Members of gzip (RFC 1952)."""

    errors = (zlib.error,)

    def __init__(self, path: Path) -> None:
        self._path = path

    def frame(self) -> Any:
        return zlib.decompressobj(wbits=31)

    def is_over(self, rest: bytes) -> bool:
        """``gzip`` takes zeros (the padding of a tape) without a word, and leaves out anything else with a warning."""
        if rest.startswith(b"\x1f\x8b"[: len(rest)]):
            return False
        if rest.strip(b"\0"):
            print(
                f"{self._path}: what follows the compressed data is no gzip and left out, as gzip does", file=sys.stderr
            )
        return True

    def explain(self, error: Exception) -> str:
        return str(error)


class Zstandard:
    """Frames of Zstandard (RFC 8878), skippable ones among them, with windows up to the 2 GiB of ``zstd --long=31``."""

    def __init__(self, path: Path) -> None:
        try:
            import zstandard
        except ImportError:
            raise UserError(f"{path} needs the package zstandard: pip install zstandard") from None
        self._path = path
        self.errors = (zstandard.ZstdError,)
        # The memory for a window is taken when a frame has one.
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << zstandard.WINDOWLOG_MAX)

    def frame(self) -> Any:
        return self._decompressor.decompressobj()

    def is_over(self, rest: bytes) -> bool:
        return False

    def explain(self, error: Exception) -> str:
        if "ictionary" in str(error):
            raise UserError(
                f"{self._path} was compressed with a dictionary, which is not in it; compress it again with: "
                f"zstd -d -D DICTIONARY {self._path} --stdout | zstd -o NEW.zst"
            ) from None
        # Frames name a trained dictionary. Of other files (-D FILE, --patch-from) they say nothing.
        return f"{error}; or it was compressed against another file (zstd -D or --patch-from): write it anew without"


class PackedStream(io.RawIOBase):
    """What the frames of a compressed file hold; raises :class:`DamagedStream` where one of them is broken or cut off."""

    def __init__(self, path: Path, packing: Format) -> None:
        self._file = open(path, "rb")  # noqa: SIM115
        self._packing = packing
        self._frame: Any = None
        self._rest = b""  # compressed, not looked at yet
        self._pending = memoryview(b"")  # decompressed, not handed out yet
        self._frames = 0
        self._is_over = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending and not self._is_over:
            self._pending = memoryview(self._next_piece())
        count = min(len(buffer), len(self._pending))
        buffer[:count], self._pending = self._pending[:count], self._pending[count:]
        return count

    def _next_piece(self) -> bytes:
        if not self._rest:
            self._rest = self._file.read(_CHUNK)
        if not self._rest:
            if self._frame is not None:
                raise DamagedStream("the last frame is not complete")
            self._is_over = True
            return b""
        if self._frame is None:
            if self._frames and self._packing.is_over(self._rest):
                self._is_over = True
                return b""
            self._frame = self._packing.frame()
            self._frames += 1
        try:
            piece = self._frame.decompress(self._rest)
        except self._packing.errors as error:
            raise DamagedStream(self._packing.explain(error)) from None
        self._rest = self._frame.unused_data
        if self._frame.eof:
            self._frame = None
        return piece

    def close(self) -> None:
        self._file.close()
        super().close()
