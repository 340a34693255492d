"""One tensor as it lies in a file, and one entry that is no tensor; and the dtypes that some format can hold."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mhabridge.checkpoint.storage.files import Extent
from mhabridge.errors import CheckpointError

# Bytes of one element, for every dtype that some format can hold; None: not a whole number of bytes.
ITEM_SIZES: dict[str, int | None] = {
    **dict.fromkeys(("bool", "uint8", "int8", "float8_e4m3fn", "float8_e5m2"), 1),
    **dict.fromkeys(("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"), 1),
    **dict.fromkeys(("float16", "bfloat16", "int16", "uint16"), 2),
    **dict.fromkeys(("float32", "int32", "uint32"), 4),
    **dict.fromkeys(("float64", "int64", "uint64", "complex64"), 8),
    "complex128": 16,
}
NOT_IN_NUMPY = frozenset(name for name in ITEM_SIZES if name.startswith("float8"))


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTensor:
    """One named tensor of a checkpoint, as it lies in the file.

    Args:
        name: its full name, without the keys that the whole state dict is nested under.
        dtype: a key of ``ITEM_SIZES``.
        shape: of the tensor.
        extents: where the storage's bytes lie, in order.
        storage: what two tensors have in common that share their numbers (tied parameters, views of one buffer).
        start: the first element's position in the storage, in elements.
        strides: in elements; None for C order.
        big_endian: the storage's byte order.
        checksum: CRC-32 of the storage, where the format keeps one: what it is before the storage's first byte (not 0
            when it also covers a header before that), and after its last.
        unreadable: what it is, and what to do about it, when its numbers cannot be read from the file; whoever leaves
            it out needs none.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    extents: tuple[Extent, ...]
    storage: str
    start: int = 0
    strides: tuple[int, ...] | None = None
    big_endian: bool = False
    checksum: tuple[int, int] | None = None
    unreadable: tuple[str, str] | None = None

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def item_size(self) -> int:
        """Bytes of one element."""
        return ITEM_SIZES[self.dtype] or 0

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in C order."""
        return self.size * self.item_size

    def named(self, name: str) -> StoredTensor:
        """The same tensor under a name."""
        rest = (self.big_endian, self.checksum, self.unreadable)
        return StoredTensor(name, self.dtype, self.shape, self.extents, self.storage, self.start, self.strides, *rest)

    def part(self, shape: tuple[int, ...], start: int, strides: tuple[int, ...] | None) -> StoredTensor:
        """A view of the same storage; a third of what ``dataclasses.replace`` takes."""
        rest = (self.big_endian, self.checksum, self.unreadable)
        return StoredTensor(self.name, self.dtype, shape, self.extents, self.storage, start, strides, *rest)

    @property
    def plain(self) -> bool:
        """Whether its bytes in C order, little-endian, lie in the file as they are."""
        return (self.strides is None or self.size == 0) and (not self.big_endian or self.item_size == 1)

    @property
    def place(self) -> int:
        """Where in its file the first of the tensor's own bytes lies; only for ``plain`` ones."""
        return next((extent.offset for extent in self.plain_extents()), 0)

    def require_readable(self, path: Path) -> None:
        """See that the tensor's numbers can be read.

        Raises:
            CheckpointError: they cannot.
        """
        if self.unreadable is not None:
            given, advice = self.unreadable
            raise CheckpointError(
                f"{path}: {self.name}", given=given, expected="a tensor of plain numbers", advice=advice
            )

    def plain_extents(self) -> Iterator[Extent]:
        """Where the tensor's own bytes lie, in order; only for ``plain`` ones."""
        skip, left = self.start * self.item_size, self.nbytes
        for extent in self.extents:
            here = min(max(extent.length - skip, 0), left)
            if here:
                yield Extent(extent.file, extent.offset + skip, here)
            left -= here
            skip = max(skip - extent.length, 0)


@dataclasses.dataclass(frozen=True, slots=True)
class StoredObject:
    """An entry of a checkpoint that is no tensor.

    Args:
        name: its full name.
        text: what it is, for people: ``epoch = 3`` is "3", an optimizer's state "a dict of 5 entries".
        value: the value, when JSON can hold it (None, bool, int, float, str, and lists and dicts of those).
        inert: the names of the classes or functions that it would take to make it; empty for plain data.
    """

    name: str
    text: str
    value: Any = None
    inert: tuple[str, ...] = ()
