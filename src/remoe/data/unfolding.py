"""Compressed files as streams, read in pieces; one that unfolds to more than text does is refused."""

import io
import lzma
from pathlib import Path
from typing import IO, Any

from remoe.errors import DataError, MissingExtraError

MAX_UNFOLDING = 200
"""How many bytes one byte of a compressed file may become: text becomes up to 20, a bomb a thousand or more."""
FREE_BYTES = 64 << 20
"""That many may come out whatever the size of the file."""


def decompressed(path: Path, raw: IO[bytes]) -> IO[bytes]:
    """The content of a file by its ending; `raw` itself where that names no compression."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        import gzip

        return _bounded(path, gzip.GzipFile(fileobj=raw))
    if suffix == ".xz":
        return _bounded(path, lzma.LZMAFile(raw))
    return _bounded(path, _ZstdStream(raw)) if suffix == ".zst" else raw


def _bounded(path: Path, stream: Any) -> IO[bytes]:
    return io.BufferedReader(_BoundedStream(path, stream), 1 << 20)  # type: ignore[return-value]


def check_unfolding(path: Path, size: int) -> None:
    """Raise DataError where so many bytes came out of a file that it can hold no text."""
    if size > FREE_BYTES and size > MAX_UNFOLDING * path.stat().st_size:
        raise DataError(
            f"{path} unfolds to more than {MAX_UNFOLDING} times its size, as no text does (a zip bomb?); if it is "
            "text, decompress it and name the result"
        )


class _BoundedStream(io.RawIOBase):
    """Passes a decompressed stream on, as long as it is no bomb (DataError): nothing holds more than a piece of it."""

    def __init__(self, path: Path, stream: Any) -> None:
        self._path, self._stream, self._size = path, stream, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = self._stream.readinto(buffer)
        self._size += size
        check_unfolding(self._path, self._size)
        return size


class _ZstdStream(io.RawIOBase):
    """Decompresses frame after frame. Unlike zstandard's own reader it notices a file that was cut off."""

    def __init__(self, raw: IO[bytes]) -> None:
        try:
            import zstandard
        except ImportError:
            raise MissingExtraError("zstandard", "data") from None
        self._raw, self._compressed, self._plain = raw, b"", b""
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frame: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain and self._fill():
            pass
        size = min(len(buffer), len(self._plain))
        buffer[:size], self._plain = self._plain[:size], self._plain[size:]
        return size

    def _fill(self) -> bool:
        """Decompress some more; False at the end of the file."""
        self._compressed = self._compressed or self._raw.read(1 << 10)  # what it becomes is held at once
        if not self._compressed:
            if self._frame is not None:
                raise EOFError("it ends in the middle of a frame")
            return False
        frame = self._frame or self._decompressor.decompressobj()
        self._plain = frame.decompress(self._compressed)
        self._compressed = frame.unused_data if frame.eof else b""
        self._frame = None if frame.eof else frame
        return True
