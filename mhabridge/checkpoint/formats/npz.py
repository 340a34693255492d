"""NumPy's .npz: a zip archive of .npy files, one for each array. Members that are not compressed are read in place.

A compressed member is unpacked, once and only when its numbers are asked for. Arrays of Python objects are refused.
"""

from __future__ import annotations

import itertools
import math
import operator
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from mhabridge.checkpoint.formats import npy_header, scalars
from mhabridge.checkpoint.formats.npy_header import Header
from mhabridge.checkpoint.formats.zips import STORED, Archive, Member
from mhabridge.checkpoint.storage import checking
from mhabridge.checkpoint.storage.crc import crc32
from mhabridge.checkpoint.storage.packed import Deflated
from mhabridge.checkpoint.storage.stored import CHUNK, ITEM_SIZES, Extent, StoredFile, StoredObject, StoredTensor
from mhabridge.errors import CheckpointError

NAME = "npz"
_DEFLATED = 8
_MOST_DEFLATED = 1032  # deflate makes nothing smaller than by this factor (https://zlib.net/zlib_tech.html)
_MOST_UNPACKED = 4 << 30
_LONGEST_OF_TORCH = 255 + len("/data.pkl")
_SUFFIX = ".npy"


def sniff(head: bytes) -> bool:
    r"""Whether a file that begins so is probably an .npz: an archive that is empty, or whose first member is a .npy.

    Example:
        >>> sniff(b"PK\x05\x06"), sniff(b"PK\x03\x04")
        (True, False)
    """
    if head[:4] != b"PK\x03\x04":
        return head[:4] == b"PK\x05\x06"
    length = int.from_bytes(head[26:28], "little")
    # Of a longer name we do not see the end; PyTorch's first member is a folder's name of 255 bytes and data.pkl.
    return length > _LONGEST_OF_TORCH or head[30 : 30 + length].endswith(_SUFFIX.encode())


def read(path: str | os.PathLike[str], nested: Sequence[str] | None = None, verify: bool = False) -> StoredFile:
    """Open an .npz archive.

    Args:
        path: the file.
        nested: nothing can be nested in this format; accepted since every format's reader takes it.
        verify: also compare every member's checksum now, which reads (and unpacks) the whole file.

    Returns:
        Its numeric arrays as tensors, and everything else (strings, dates) as objects.

    Raises:
        CheckpointError: the archive is cut off or damaged, holds Python objects, or claims more than can be in it.
    """
    path = Path(path)
    with checking.opened(path) as descriptor:
        reader = _Reader(path, descriptor)
        for member in reader.archive.members.values():
            reader.add(member)
    file = StoredFile(path, NAME, reader.tensors, tuple(reader.objects), files=tuple(reader.files))
    if verify:
        checking.require_checksums(file)
    return file


class _Reader:
    """Goes through the members of an open archive."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self.descriptor = path, descriptor
        self.archive = Archive(descriptor, path)
        self.files: list[Path | Deflated] = [path]
        self.tensors: list[StoredTensor] = []
        self.objects: list[StoredObject] = []
        self._require_no_bomb()

    def add(self, member: Member) -> None:
        if not member.name.endswith(_SUFFIX):
            raise damaged(self.path, f"{member.name!r} in the archive, which is no .npy")
        start = self.archive.content(member)
        packed = None
        if member.method == _DEFLATED and not member.encrypted:
            packed = Deflated(self.path, member.name, start, member.packed, member.size, member.crc)
        elif member.method != STORED or member.encrypted:
            raise damaged(self.path, f"{member.name} is encrypted, or packed by method {member.method}")

        def head(count: int) -> bytes:
            count = min(count, member.size)
            return packed.head(count) if packed else os.pread(self.descriptor, count, start)

        try:
            header = npy_header.parse(head)
        except ValueError as error:
            raise damaged(self.path, f"{member.name} has {error}") from None
        self._add(member, header, head, packed, start)

    def _add(
        self, member: Member, header: Header, head: Callable[[int], bytes], packed: Deflated | None, start: int
    ) -> None:
        name, size = member.name[: -len(_SUFFIX)], member.size - header.length
        if size != math.prod(header.shape) * header.item_size:
            takes = f"shape {header.shape} of {header.dtype} takes"
            raise damaged(self.path, f"{member.name} has {size} bytes of numbers, which is not what {takes}")
        if header.dtype not in ITEM_SIZES:
            self._require_checksum(member, packed, start)
            self.objects.append(_object(name, header, head(member.size) if size <= scalars.LONGEST_TEXT else b""))
            return
        strides = _columns_first(header.shape) if header.fortran_order and len(header.shape) > 1 else None
        if packed:
            self.files.append(packed)
        extent = Extent(len(self.files) - 1, header.length, size) if packed else Extent(0, start + header.length, size)
        checksum = None if packed else (crc32(head(header.length)), member.crc)
        self.tensors.append(
            StoredTensor(name, header.dtype, header.shape, (extent,), name, 0, strides, header.big_endian, checksum)
        )

    def _require_checksum(self, member: Member, packed: Deflated | None, start: int) -> None:
        """Of what is no tensor; those are compared when they are read."""
        if packed:
            os.close(packed.unpack())
            return
        crc = 0
        for offset in range(0, member.size, CHUNK):
            piece = os.pread(self.descriptor, min(CHUNK, member.size - offset), start + offset)
            crc = crc32(piece, crc)
        if crc != member.crc:
            raise damaged(self.path, f"{member.name} has a Bad CRC-32")

    def _require_no_bomb(self) -> None:
        """A small archive must not make us fill the disk when it is unpacked."""
        unpacked = 0
        for member in self.archive.members.values():
            if member.size > _MOST_DEFLATED * member.packed:
                raise damaged(self.path, f"{member.name} claims {member.size} bytes, more than can be in the archive")
            unpacked += member.size if member.method != STORED else 0
        if unpacked > max(_MOST_UNPACKED, 100 * os.fstat(self.descriptor).st_size):
            raise damaged(self.path, f"its members claim {unpacked} bytes, more than a hundred times the archive's")


def damaged(path: Path, why: str) -> CheckpointError:
    """The error for a file that is no .npz, or no whole one."""
    return checking.damaged(path, why, "a whole .npz file of numeric arrays")


def _columns_first(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(itertools.accumulate((max(length, 1) for length in shape[:-1]), operator.mul, initial=1))


def _object(name: str, header: Header, data: bytes) -> StoredObject:
    text = scalars.text_of(data[header.length :]) if header.dtype == "text" and header.shape == () else None
    if text is None:
        return StoredObject(name, f"an array of dtype {header.dtype} and shape {header.shape}")
    return StoredObject(name, text, text)
