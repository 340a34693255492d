"""The index of a zip archive: which members lie where. Read from the central directory, as everyone reads it.

Python's ``zipfile`` would do, but it takes any number of members into memory, and accepts members that overlap.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

from mhabridge.checkpoint.storage.streams import DAMAGED, ByteStream
from mhabridge.errors import CheckpointError

MAX_DIRECTORY = 64 * 1024 * 1024  # bytes: more than half a million members
STORED = 0  # the method of members that are not compressed

# The records of PKWARE's APPNOTE, sections 4.3.7, 4.3.12, 4.3.14 to 4.3.16.
LOCAL = struct.Struct("<4s5H3I2H")
CENTRAL = struct.Struct("<4s6H3I5H2I")
END = struct.Struct("<4s4H2IH")
LOCATOR64 = struct.Struct("<4sIQI")
END64 = struct.Struct("<4sQ2H2I4Q")
LOCAL_MAGIC, CENTRAL_MAGIC, END_MAGIC = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
LOCATOR64_MAGIC, END64_MAGIC = b"PK\x06\x07", b"PK\x06\x06"
_LONGEST_COMMENT = 0xFFFF
FULL16, FULL32 = 0xFFFF, 0xFFFFFFFF  # "see the 64-bit field instead"
ZIP64 = 0x0001  # the extra field with these


class Member(NamedTuple):
    """One member of an archive.

    Args:
        name: its path.
        method: how it is compressed; ``STORED``: not at all.
        encrypted: whether it is.
        crc: CRC-32 of its content; 0 where the writer kept none.
        packed: its bytes in the archive.
        size: its bytes when unpacked.
        header: where its local header starts.
    """

    name: str
    method: int
    encrypted: bool
    crc: int
    packed: int
    size: int
    header: int


class Archive:
    """The members of a zip archive by name.

    Args:
        descriptor: the open file.
        path: for messages.

    Raises:
        CheckpointError: it is no zip archive, or a damaged one.
    """

    def __init__(self, descriptor: int, path: Path) -> None:
        self.path = path
        self._stream = ByteStream(descriptor, path)
        count, size, start = self._end()
        if size > MAX_DIRECTORY:
            raise self.damaged(f"an archive whose index takes {size} bytes")
        self.members = self._members(count, start, size)
        self._ends = self._found_ends(start)

    def damaged(self, given: str, advice: str = DAMAGED) -> CheckpointError:
        """An error about the archive."""
        return CheckpointError(str(self.path), given=given, expected="a whole zip archive", advice=advice)

    def content(self, member: Member) -> int:
        """Where a stored member's bytes start in the file; they are checked to lie before the next member.

        Raises:
            CheckpointError: its local header is not one, or names another member.
        """
        name = member.name.encode()
        head = self._stream.read_at(member.header, LOCAL.size + len(name))
        magic, *_, name_length, extra_length = LOCAL.unpack_from(head)
        if magic != LOCAL_MAGIC or name_length != len(name) or head[LOCAL.size :] != name:
            raise self.damaged(f"no header of {member.name!r} at byte {member.header}")
        start: int = member.header + LOCAL.size + name_length + extra_length
        if start + member.packed > self._ends[member.header]:
            raise self.damaged(f"{member.name!r} running into what follows it")
        return start

    def _end(self) -> tuple[int, int, int]:
        """How many members there are, and the size and the start of the central directory."""
        length = min(self._stream.end, END.size + _LONGEST_COMMENT)
        base = self._stream.end - length
        tail = self._stream.read_at(base, length)
        at = tail.rfind(END_MAGIC)
        if at < 0 or len(tail) - at < END.size:
            raise self.damaged("no end of a zip archive's index")
        _, disk, first_disk, here, count, size, start, comment = END.unpack_from(tail, at)
        if at + END.size + comment != len(tail):
            raise self.damaged(f"{len(tail) - at - END.size - comment} bytes after the archive's end")
        end = base + at
        locator = self._stream.read_at(max(end - LOCATOR64.size, 0), min(end, LOCATOR64.size))
        if len(locator) == LOCATOR64.size and locator[:4] == LOCATOR64_MAGIC:
            end = int(LOCATOR64.unpack(locator)[2])
            if end + END64.size > self._stream.end:
                raise self.damaged("an archive whose 64-bit index is not there")
            magic, _, _, _, disk, first_disk, here, count, size, start = END64.unpack(
                self._stream.read_at(end, END64.size)
            )
            if magic != END64_MAGIC:
                raise self.damaged("an archive whose 64-bit index is not there")
        if disk or first_disk or here != count or start + size != end:
            raise self.damaged("an archive in several parts, or one whose index is not where it should be")
        return int(count), int(size), int(start)

    def _members(self, count: int, start: int, size: int) -> dict[str, Member]:
        directory = self._stream.read_at(start, size)
        found: dict[str, Member] = {}
        at = 0
        for _ in range(count):
            if len(directory) - at < CENTRAL.size:
                raise self.damaged(f"an index of {len(found)} members instead of {count}")
            member, at = self._member(directory, at)
            if member.name in found:
                raise self.damaged(f"two members of the name {member.name!r}", "One would hide the other.")
            found[member.name] = member
        return found

    def _member(self, directory: bytes, at: int) -> tuple[Member, int]:
        magic, _, _, flags, method, _, _, crc, packed, size, name_length, extra_length, comment, _, _, _, header = (
            CENTRAL.unpack_from(directory, at)
        )
        start = at + CENTRAL.size
        end = start + name_length + extra_length + comment
        if magic != CENTRAL_MAGIC or end > len(directory):
            raise self.damaged(f"an index that is damaged at its byte {at}")
        try:
            name = directory[start : start + name_length].decode("utf-8")
        except UnicodeDecodeError:
            raise self.damaged("a member whose name is no text") from None
        extra = directory[start + name_length : start + name_length + extra_length]
        size, packed, header = self._long(name, extra, size, packed, header)
        if method == STORED and size != packed:
            raise self.damaged(f"{name!r} with {packed} bytes stored as {size}")
        return Member(name, method, bool(flags & 1), crc, packed, size, header), end

    def _long(self, name: str, extra: bytes, *fields: int) -> list[int]:
        """The fields, with the 64-bit ones of the extra field in place of those that do not fit in 32 bits."""
        if FULL32 not in fields:
            return list(fields)
        wide = iter(())
        at = 0
        while at + 4 <= len(extra):
            kind, length = struct.unpack_from("<2H", extra, at)
            if kind == ZIP64:
                data = extra[at + 4 : at + 4 + length]
                wide = iter(struct.unpack(f"<{len(data) // 8}Q", data[: len(data) // 8 * 8]))
            at += 4 + length
        found = [next(wide, FULL32) if field == FULL32 else field for field in fields]
        if any(field >= 2**63 for field in found):
            raise self.damaged(f"{name!r} with sizes beyond any file")
        return found

    def _found_ends(self, end: int) -> dict[int, int]:
        """Where what follows a member starts, by where that one starts; they must not overlap."""
        ordered = sorted(self.members.values(), key=lambda member: member.header)
        following = [member.header for member in ordered[1:]] + [end] * min(len(ordered), 1)
        for member, limit in zip(ordered, following, strict=True):
            if member.header + LOCAL.size + len(member.name.encode()) + member.packed > limit:
                raise self.damaged(f"{member.name!r} running into what follows it")
        return {member.header: limit for member, limit in zip(ordered, following, strict=True)}
