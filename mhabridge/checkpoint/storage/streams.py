"""Reads a part of an open file in order, through a small buffer, and says where things lie in it.

The buffer is filled with ``pread``: bytes that are skipped are never read, so the index of a file of many gigabytes
is walked in bounded memory.
"""

from __future__ import annotations

import os
from pathlib import Path

from mhabridge.errors import CheckpointError

BLOCK = 64 * 1024
DAMAGED = "The file is cut off or damaged: copy or download it again."


class ByteStream:
    """The bytes from ``start`` to ``end`` of an open file.

    Args:
        descriptor: the open file; its own position is neither used nor moved.
        path: for messages.
        start: the first byte's offset in the file.
        end: one past the last byte's; None for the file's own end.

    Attributes:
        buffer: the bytes that are in memory; ``look_ahead`` brings them there.
        at: the place of the next byte in the buffer, for who reads so many small values that calls count: they may
            read up to the buffer's end, and move it on.
    """

    def __init__(self, descriptor: int, path: Path, start: int = 0, end: int | None = None) -> None:
        self.descriptor, self.path = descriptor, path
        self.end = os.fstat(descriptor).st_size if end is None else end
        self.buffer, self.at, self._base = b"", 0, start

    @property
    def position(self) -> int:
        """The offset in the file of the next byte."""
        return self._base + self.at

    @property
    def left(self) -> int:
        """How many bytes follow."""
        return self.end - self.position

    def take(self, count: int) -> bytes:
        """The next bytes.

        Raises:
            CheckpointError: there are not so many.
        """
        stop = self.at + count
        if stop > len(self.buffer):
            self._fill(count)
            stop = count
        found = self.buffer[self.at : stop]
        self.at = stop
        return found

    def look_ahead(self, count: int) -> None:
        """Have the next bytes in the buffer: so many, or as many as there are."""
        if len(self.buffer) - self.at < count and self._base + len(self.buffer) < self.end:
            self._fill(min(count, self.left))

    def skip(self, count: int) -> int:
        """Goes past the next bytes without reading them.

        Returns:
            The offset in the file at which they start.

        Raises:
            CheckpointError: there are not so many.
        """
        start = self.position
        if count < 0 or count > self.left:
            raise self.cut_off(count)
        if self.at + count <= len(self.buffer):
            self.at += count
        else:
            self.buffer, self.at, self._base = b"", 0, start + count
        return start

    def line(self, limit: int) -> bytes:
        """The next line, without its newline.

        Raises:
            CheckpointError: no newline follows.
            ValueError: the line is longer than the limit.
        """
        newline = self.buffer.find(b"\n", self.at, self.at + limit + 1)
        if newline >= 0:
            found = self.buffer[self.at : newline]
            self.at = newline + 1
            return found
        offset, length = self.skip_line()
        if length > limit:
            raise ValueError(f"a line of {length} bytes")
        return self.read_at(offset, length)

    def skip_line(self) -> tuple[int, int]:
        """Goes past the next newline.

        Returns:
            The offset in the file at which the line starts, and its length without the newline.

        Raises:
            CheckpointError: no newline follows.
        """
        start = self.position
        while True:
            newline = self.buffer.find(b"\n", self.at)
            if newline >= 0:
                self.at = newline + 1
                return start, self._base + newline - start
            self.skip(len(self.buffer) - self.at)
            self._fill(1)

    def read_at(self, offset: int, length: int) -> bytes:
        """Bytes anywhere in the file; the stream stays where it is."""
        found = os.pread(self.descriptor, length, offset)
        while len(found) < length:
            more = os.pread(self.descriptor, length - len(found), offset + len(found))
            if not more:
                raise self.cut_off(length - len(found))
            found += more
        return found

    def cut_off(self, wanted: int) -> CheckpointError:
        """The error for a file that ends too early."""
        return CheckpointError(
            str(self.path),
            given=f"{max(self.left, 0)} bytes after offset {self.position}",
            expected=f"{wanted} more",
            advice=DAMAGED,
        )

    def _fill(self, count: int) -> None:
        """Makes the next ``count`` bytes (and more) the buffer's first."""
        if count < 0 or count > self.left:
            raise self.cut_off(count)
        position = self.position
        buffer = self.read_at(position, min(max(count, BLOCK), self.left))
        self.buffer, self.at, self._base = buffer, 0, position
