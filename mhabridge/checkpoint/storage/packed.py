"""Deflated parts of a file, such as the members of a compressed .npz: unpacked into an unnamed file when first read.

A temporary file, not memory: so a large member takes no memory, and everything above reads it like any other file.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import zlib
from pathlib import Path

from mhabridge.checkpoint.storage.crc import crc32
from mhabridge.checkpoint.storage.regular import open_regular
from mhabridge.errors import CheckpointError

_PIECE = 256 * 1024


@dataclasses.dataclass(frozen=True)
class Deflated:
    """A stretch of a file that holds a raw deflate stream.

    Args:
        path: the file.
        name: of what is packed, for messages.
        offset: of the stream's first byte.
        length: of the stream, in bytes.
        size: of what is packed, in bytes.
        crc: CRC-32 of what is packed.
    """

    path: Path
    name: str
    offset: int
    length: int
    size: int
    crc: int

    def head(self, length: int) -> bytes:
        """The first bytes of what is packed, or all of it when it is shorter.

        Raises:
            CheckpointError: that is no deflate stream.
        """
        with os.fdopen(open_regular(self.path), "rb") as stream:
            stream.seek(self.offset)
            packed = stream.read(min(self.length, 2 * length + 1024))  # its own tables come first
            try:
                return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, length)
            except zlib.error as error:
                raise self._damaged(str(error)) from error

    def unpack(self) -> int:
        """An open unnamed file with what is packed; whoever asks has to close it.

        Raises:
            CheckpointError: that is no deflate stream, or its size or CRC-32 is not the one that was promised, or there
                is no room for it.
        """
        with tempfile.TemporaryFile() as unpacked:
            try:
                size, crc = self._copy_to(unpacked.fileno())
            except zlib.error as error:
                raise self._damaged(str(error)) from error
            except OSError as error:
                raise CheckpointError(
                    f"{self.path}: {self.name}",
                    given=f"{self.size} bytes that cannot be unpacked ({error.strerror})",
                    expected=f"room for them in {tempfile.gettempdir()}",
                    advice="Free some space, or name another folder in TMPDIR.",
                ) from error
            if size != self.size:
                raise self._damaged(f"it ends after {size} of {self.size} bytes")
            if crc != self.crc:
                raise self._damaged("Bad CRC-32")
            return os.dup(unpacked.fileno())

    def _copy_to(self, descriptor: int) -> tuple[int, int]:
        """Unpack at most ``size`` bytes; how many there were, and their CRC-32."""
        inflate, size, crc, left = zlib.decompressobj(-zlib.MAX_WBITS), 0, 0, self.length
        with os.fdopen(open_regular(self.path), "rb") as stream:
            stream.seek(self.offset)
            packed = b""
            while size < self.size and not inflate.eof:
                if not packed and left:
                    packed = stream.read(min(_PIECE, left))
                    left -= len(packed)
                piece = inflate.decompress(packed, min(_PIECE, self.size - size))
                if not piece and not packed:
                    break
                _write_all(descriptor, piece)
                packed, size, crc = inflate.unconsumed_tail, size + len(piece), crc32(piece, crc)
        return size, crc

    def _damaged(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: {self.name}",
            given=f"content that cannot be read ({why})",
            expected="a deflated member as it was written",
            advice="The file is damaged: copy or download it again.",
        )


def _write_all(descriptor: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]
