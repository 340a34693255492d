"""The checksums (CRC-32) that files keep of their own content, compared when somebody asks for it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from mhabridge.checkpoint.storage.crc import crc32
from mhabridge.checkpoint.storage.files import Extent
from mhabridge.checkpoint.storage.memory import Scratch
from mhabridge.errors import CheckpointError

if TYPE_CHECKING:
    from mhabridge.checkpoint.storage.stored import StoredFile

_PIECE = 1 << 20  # bytes


@dataclasses.dataclass(frozen=True)
class Checksum:
    """A CRC-32 that a file keeps.

    Args:
        of: what it is of, for messages; "" for the whole file.
        parts: what it covers, in order: bytes of the file, and bytes that are known.
        stated: what the file says that it is.
        start: what it is before the first part.
    """

    of: str
    parts: tuple[Extent | bytes, ...]
    stated: int
    start: int = 0


def kept_by(file: StoredFile) -> list[Checksum]:
    """All checksums that an open file has: of whole files, and one for each storage that tensors lie in."""
    found = {
        tensor.extents: Checksum(tensor.name, tensor.extents, tensor.checksum[1], tensor.checksum[0])
        for tensor in file.values()
        if tensor.checksum
    }
    return [*file.checksums, *found.values()]


class SumError(CheckpointError):
    """A checksum is another one: the file is damaged."""


def require(file: StoredFile, checksum: Checksum, scratch: Scratch | None = None) -> None:
    """Read what a checksum covers, and compare it.

    Raises:
        CheckpointError: it is another one, or the file cannot be read.
    """
    buffer = (scratch or Scratch()).take(_PIECE).data
    running = Running(checksum)
    for part in checksum.parts:
        if isinstance(part, bytes):
            running.add(part)
            continue
        for offset in range(0, part.length, _PIECE):
            piece = buffer[: min(_PIECE, part.length - offset)]
            file.fill_from(part, offset, piece)
            running.add(piece)
    running.require(file)


class Running:
    """A checksum that is summed up by whoever reads what it covers anyway.

    Args:
        checksum: it.
    """

    def __init__(self, checksum: Checksum) -> None:
        self._checksum, self._crc = checksum, checksum.start

    def add(self, piece: bytes | memoryview) -> None:
        """The next bytes."""
        self._crc = crc32(piece, self._crc)

    def require(self, file: StoredFile) -> None:
        """Compare it, once all was added.

        Raises:
            SumError: it is another one.
        """
        if self._crc != self._checksum.stated:
            raise SumError(
                f"{file.path}: {self._checksum.of}".removesuffix(": "),
                given=f"content that cannot be read (its CRC-32 is {self._crc:08x})",
                expected=f"bytes whose CRC-32 is {self._checksum.stated:08x}",
                advice="The file is damaged: copy or download it again.",
            )


def require_all(file: StoredFile) -> None:
    """Compare all checksums of a file that was just opened; it is closed when one is wrong.

    Raises:
        CheckpointError: one is wrong.
    """
    try:
        for checksum in kept_by(file):
            require(file, checksum)
    except CheckpointError:
        file.close()
        raise
