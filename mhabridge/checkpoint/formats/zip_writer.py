"""Writes a zip archive of stored members in one pass, laid out exactly as PyTorch's own writer does it.

PyTorch can be told to compute where a storage lies instead of looking it up (``calculate_storage_offsets``), so padding
and data descriptors follow its rules: a member's content starts at a multiple of 64 bytes, behind an extra field "FB"
of as many "Z" as it takes, and is followed by a descriptor of 16 bytes, or 24 for members beyond 4 GiB. The CRC-32 is
known only when the content has been written, which is what descriptors are for.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from mhabridge.checkpoint.formats import zips
from mhabridge.checkpoint.storage.writing import Sink

ALIGNMENT = 64
_DESCRIPTOR_MAGIC = b"PK\x07\x08"
_HAS_DESCRIPTOR, _UTF8 = 0x0008, 0x0800
_VERSION, _VERSION64 = 20, 45
_FIRST_DAY = 0x0021  # 1 January 1980: the same input gives the same file


class ZipWriter:
    """An archive that is being written.

    Args:
        sink: where to; the archive starts at its position 0.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._entries: list[tuple[bytes, int, int, int]] = []  # name, flags, size, header
        self._sums: dict[int, int] = {}  # by the entry's number

    def add(self, name: str, content: bytes) -> None:
        """Writes a member."""
        self.add_emitted(name, len(content), lambda sink: sink.write(content))

    def add_emitted(self, name: str, size: int, emit: Callable[[Sink], None]) -> None:
        """Writes a member whose bytes are made now.

        Args:
            name: the member's path.
            size: how many bytes ``emit`` writes.
            emit: writes them.
        """
        header = self._sink.position
        encoded = name.encode("utf-8")
        flags = _UTF8 | (_HAS_DESCRIPTOR if size else 0)
        self._sink.write(local_header(encoded, flags, size, header))
        number, form = len(self._entries), "<4sI2Q" if _is_long(size, header) else "<4s3I"
        self._entries.append((encoded, flags, size, header))

        def emit_all(sink: Sink) -> None:
            sink.start_crc()
            emit(sink)
            self._sums[number] = crc = sink.end_crc()
            if size:
                sink.write(struct.pack(form, _DESCRIPTOR_MAGIC, crc, size, size))

        self._sink.later(size + (struct.calcsize(form) if size else 0), emit_all)

    def finish(self) -> None:
        """Writes the index; nothing can be added afterwards."""
        self._sink.wait()
        start = self._sink.position
        for number, (name, flags, length, header) in enumerate(self._entries):
            self._sink.write(_central_header(name, flags, self._sums[number], length, header))
        size, count = self._sink.position - start, len(self._entries)
        if count >= zips.FULL16 or start + size >= zips.FULL32:
            end = self._sink.position
            self._sink.write(
                zips.END64.pack(
                    zips.END64_MAGIC, zips.END64.size - 12, _VERSION64, _VERSION64, 0, 0, count, count, size, start
                )
            )
            self._sink.write(zips.LOCATOR64.pack(zips.LOCATOR64_MAGIC, 0, end, 1))
        short = min(count, zips.FULL16)
        self._sink.write(
            zips.END.pack(zips.END_MAGIC, 0, 0, short, short, min(size, zips.FULL32), min(start, zips.FULL32), 0)
        )


def local_header(name: bytes, flags: int, size: int, header: int) -> bytes:
    """What stands before a member's content, up to its aligned first byte.

    Args:
        name: the member's path.
        flags: of the member.
        size: of its content.
        header: where this header starts.

    Example:
        >>> len(local_header(b"archive/data/0", 0, 8, header=100)) + 100
        192
    """
    extra = _wide([size, size] if size >= zips.FULL32 else [], header)
    # At least the four bytes of the padding's own head.
    filled = header + zips.LOCAL.size + len(name) + len(extra) + 4
    padding = b"FB" + struct.pack("<H", -filled % ALIGNMENT) + b"Z" * (-filled % ALIGNMENT)
    long = _is_long(size, header)
    short = zips.FULL32 if size >= zips.FULL32 else 0  # 0: see the descriptor
    return (
        zips.LOCAL.pack(
            zips.LOCAL_MAGIC, _VERSION64 if long else _VERSION, flags, zips.STORED, 0, _FIRST_DAY, 0, short, short,
            len(name), len(extra) + len(padding),
        )
        + name + extra + padding
    )  # fmt: skip


def _central_header(name: bytes, flags: int, crc: int, size: int, header: int) -> bytes:
    extra = _wide([size, size] if size >= zips.FULL32 else [], header)
    version = _VERSION64 if _is_long(size, header) else _VERSION
    short = min(size, zips.FULL32)
    return (
        zips.CENTRAL.pack(
            zips.CENTRAL_MAGIC, version, version, flags, zips.STORED, 0, _FIRST_DAY, crc, short, short, len(name),
            len(extra), 0, 0, 0, 0, min(header, zips.FULL32),
        )
        + name + extra
    )  # fmt: skip


def _wide(sizes: list[int], header: int) -> bytes:
    """The extra field with what does not fit into 32 bits; nothing when all does."""
    fields = [*sizes, header] if header >= zips.FULL32 else sizes
    return struct.pack(f"<2H{len(fields)}Q", zips.ZIP64, 8 * len(fields), *fields) if fields else b""


def _is_long(size: int, header: int) -> bool:
    return size >= zips.FULL32 or header >= zips.FULL32
