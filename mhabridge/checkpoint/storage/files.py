"""The open files behind a checkpoint: bytes are read with ``preadv`` into buffers of the caller, from any thread."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from mhabridge.checkpoint.storage.packed import Deflated
from mhabridge.checkpoint.storage.regular import open_regular
from mhabridge.errors import CheckpointError

_MOST_BUFFERS = 1024  # of one preadv (IOV_MAX on Linux)


@dataclasses.dataclass(frozen=True, slots=True)
class Extent:
    """Bytes that lie together in a file.

    Args:
        file: which of a ``StoredFile``'s files (0 but for shards).
        offset: of the first byte.
        length: in bytes.
    """

    file: int
    offset: int
    length: int


class OpenFiles:
    """Files that are open until ``close``; a packed one is unpacked when it is first read.

    Args:
        files: the files, as extents count them.

    Raises:
        CheckpointError: one cannot be opened.
    """

    def __init__(self, files: Sequence[Path | Deflated]) -> None:
        self._files = tuple(files)
        self._descriptors: list[int | None] = []
        self._unpacking = threading.Lock()
        try:
            for file in self._files:
                self._descriptors.append(open_regular(file) if isinstance(file, Path) else None)
        except CheckpointError:
            self.close()
            raise

    def close(self) -> None:
        """Let go of all."""
        while self._descriptors:
            descriptor = self._descriptors.pop()
            if descriptor is not None:
                os.close(descriptor)

    def path(self, number: int) -> Path:
        """Where a file lies, or what it is packed in."""
        file = self._files[number]
        return file.path if isinstance(file, Deflated) else file

    def size(self, number: int) -> int:
        """The bytes of a file; of a packed one, once unpacked."""
        file = self._files[number]
        return file.size if isinstance(file, Deflated) else os.fstat(self.descriptor(number)).st_size

    def descriptor(self, number: int) -> int:
        """A file's descriptor.

        Raises:
            CheckpointError: the file had to be unpacked first, and is damaged.
        """
        found = self._descriptors[number]
        if found is not None:
            return found
        with self._unpacking:
            found, file = self._descriptors[number], self._files[number]
            if found is None and isinstance(file, Deflated):
                found = self._descriptors[number] = file.unpack()
        assert found is not None
        return found

    def fill(self, buffers: Sequence[memoryview], extent: Extent, skip: int, length: int) -> None:
        """Fill buffers with the bytes of an extent, from the skipped ones on.

        Args:
            buffers: of bytes, one after another.
            extent: where the bytes lie.
            skip: how many of its bytes to pass over.
            length: bytes of the buffers together, not more than what is left of the extent. To look at each of hundreds
                of buffers takes as long as to read them, and other threads wait meanwhile.

        Raises:
            CheckpointError: the file has become shorter since it was opened.
        """
        descriptor, position = self.descriptor(extent.file), extent.offset + skip
        while length:
            got = os.preadv(descriptor, buffers[:_MOST_BUFFERS], position)
            if not got:
                raise self.became_shorter(extent)
            length, position = length - got, position + got
            buffers = after(buffers, got) if length else ()

    def became_shorter(self, extent: Extent) -> CheckpointError:
        """The error for a file that ends before an extent does, which it did not when it was opened."""
        return CheckpointError(
            str(self.path(extent.file)),
            given="a file that became shorter while it was read",
            expected=f"{extent.length} bytes from {extent.offset} on",
            advice="Something else writes it; wait until that has ended.",
        )


def total(buffers: Sequence[memoryview]) -> int:
    """The bytes of buffers together.

    Example:
        >>> total([memoryview(b"ab"), memoryview(b"c")])
        3
    """
    return sum(map(len, buffers))


def after(buffers: Sequence[memoryview], count: int) -> Sequence[memoryview]:
    """What is left of buffers when the first bytes are filled; no empty ones.

    Example:
        >>> [bytes(left) for left in after([memoryview(b"ab"), memoryview(b"cd"), memoryview(b"ef")], 3)]
        [b'd', b'ef']
    """
    for number, buffer in enumerate(buffers):
        if count < len(buffer):
            return [buffer[count:], *buffers[number + 1 :]]
        count -= len(buffer)
    return []
