"""The journal of a recording: an append-only file in which every record stands for itself.

An 8-byte magic, then records: the length of a JSON header (u32, little-endian), the length of the payload (u64), the
CRC-32 of both (u32), the header, the payload. A header is ``{"tensor": name, "dtype": "F32", "shape": [...]}`` with the
tensor's bytes as payload, or ``{"event": {...}}`` without one. A record reaches the operating system before the next
begins, so whatever ends the process leaves all records but the last one whole; not so a power failure.

Also part of the record kit (Python 3.8, the standard library only).
"""

from __future__ import annotations

import dataclasses
import json
import os
import struct
import zlib
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAGIC = b"MHAREC01"
ENDING = ".journal"
LONGEST_HEADER = 16 << 20  # bytes; a recording has at most 32 MiB of JSON altogether
_FIXED = struct.Struct("<IQI")
_PIECE = 1 << 20

# Bytes of an element, by the codes of safetensors; large ones first.
ITEM_SIZES = {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4}
ITEM_SIZES.update({"F16": 2, "BF16": 2, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1})


@dataclasses.dataclass(frozen=True)
class Record:
    """One whole record of a journal.

    Args:
        header: what it says.
        offset: where its payload begins in the file.
        length: of the payload, in bytes.
    """

    header: dict[str, Any]
    offset: int
    length: int


class Journal:
    """A journal that is being written.

    Args:
        path: a file that does not exist yet.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115 - it stays open as long as the recording
        self.size = 0
        try:
            self._write(MAGIC)
        except BaseException:  # a few bytes say nothing, and would be in the next recording's way
            self.close()
            os.unlink(path)
            raise

    def event(self, what: dict[str, Any]) -> None:
        """Append something that happened."""
        self._append({"event": what}, memoryview(b""))

    def tensor(self, name: str, code: str, shape: tuple[int, ...], data: memoryview) -> None:
        """Append a tensor's bytes, C order and little-endian."""
        self._append({"tensor": name, "dtype": code, "shape": list(shape)}, data)

    def close(self) -> None:
        """Close the file; it stays where it is."""
        self._file.close()

    def _append(self, header: dict[str, Any], payload: memoryview) -> None:
        text = json.dumps(header, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode("ascii")
        crc = zlib.crc32(payload, zlib.crc32(text))
        try:
            self._write(_FIXED.pack(len(text), payload.nbytes, crc) + text, payload)
        except BaseException:
            # Also for Ctrl-C: behind half a record nothing could be read.
            self._file.seek(self.size)
            self._file.truncate()
            raise

    def _write(self, *parts: bytes | memoryview) -> None:
        for part in parts:
            left = memoryview(part)
            while left:
                left = left[self._file.write(left) :]
        self.size = self._file.tell()


class Scan:
    """The whole records of a journal, in order; afterwards ``broken`` says why there are no more ("" at its end).

    Args:
        file: an open journal, at its beginning.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.broken = ""

    def __iter__(self) -> Iterator[Record]:
        self.broken = ""
        size = os.fstat(self.file.fileno()).st_size
        self.file.seek(0)
        if self.file.read(len(MAGIC)) != MAGIC:
            self.broken = "it does not begin as a journal does"
            return
        position = len(MAGIC)
        while position < size:
            record = self._record(position, size)
            if record is None:
                return
            position = record.offset + record.length
            yield record

    def _record(self, position: int, size: int) -> Record | None:
        self.file.seek(position)
        fixed = self.file.read(_FIXED.size)
        length, payload, crc = _FIXED.unpack(fixed) if len(fixed) == _FIXED.size else (0, 0, 0)
        start = position + _FIXED.size + length
        if length == 0 or length > LONGEST_HEADER or start + payload > size:
            self.broken = f"the record at byte {position} is cut off"
            return None
        text = self.file.read(length)
        if self._crc(payload, zlib.crc32(text)) != crc:
            self.broken = f"the record at byte {position} is damaged (its checksum does not fit)"
            return None
        return Record(json.loads(text), start, payload)

    def _crc(self, length: int, crc: int) -> int:
        while length:
            piece = self.file.read(min(length, _PIECE))
            if not piece:
                return -1
            crc, length = zlib.crc32(piece, crc), length - len(piece)
        return crc


def scan(file: BinaryIO) -> Scan:
    """The whole records of an open journal, up to the first that is cut off or damaged.

    Example:
        >>> import pathlib, tempfile
        >>> journal = Journal(pathlib.Path(tempfile.mkdtemp()) / "a.journal")
        >>> journal.event({"end": {"complete": True}})
        >>> journal.close()
        >>> with journal.path.open("rb") as file:
        ...     [record.header for record in scan(file)]
        [{'event': {'end': {'complete': True}}}]
    """
    return Scan(file)
