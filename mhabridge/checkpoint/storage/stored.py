"""What an open checkpoint of any format looks like: named tensors that lie somewhere in files, not yet read.

Every format's module turns a file into a ``StoredFile``; everything above (inspecting, planning, converting, comparing)
knows no format. Bytes are read with ``pread`` into buffers of bounded size: pages of a mapped file would count as this
process's memory, and a file that shrinks while it is mapped kills the process.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from mhabridge import dtypes
from mhabridge.checkpoint.storage import blocks, memory
from mhabridge.checkpoint.storage.checksums import Checksum
from mhabridge.checkpoint.storage.crc import crc32
from mhabridge.checkpoint.storage.files import Extent as Extent
from mhabridge.checkpoint.storage.files import OpenFiles, after, total
from mhabridge.checkpoint.storage.packed import Deflated
from mhabridge.checkpoint.storage.tensors import ITEM_SIZES as ITEM_SIZES
from mhabridge.checkpoint.storage.tensors import NOT_IN_NUMPY as NOT_IN_NUMPY
from mhabridge.checkpoint.storage.tensors import StoredObject as StoredObject
from mhabridge.checkpoint.storage.tensors import StoredTensor as StoredTensor
from mhabridge.errors import CheckpointError

CHUNK = 128 * 1024  # bytes of a buffer for what one thread reads; larger ones fall out of the second-level cache

_MOST_EXPANDED = 16 << 20  # bytes of all views together that have more elements than the file has numbers for them
_EXPANDED = (
    "an expanded view, which has more elements than the file has numbers for it (16 MiB of such in a file are read)",
    "Save tensor.contiguous() instead, or leave it out (--drop).",
)
_MOST_SHARED = 4 << 30  # bytes of all tensors, if it is more than a hundred times the file's


class StoredFile(Mapping[str, StoredTensor]):
    """An open checkpoint: its tensors by name, in the file's order. Use it in a ``with`` statement, or call ``close``.

    Args:
        path: what was opened: the file, or the index of a sharded one.
        format: the format's name.
        tensors: all of them.
        objects: the entries that are no tensors.
        metadata: what the format keeps beside the tensors (string to string).
        nested: the keys under which the state dict was found, such as ("state_dict",).
        files: the files that extents count; the path itself unless given. A packed one is unpacked when first read.
        notes: what the reader noticed and people should know.
        checksums: those of a whole file; those of single storages are in the tensors.

    Raises:
        CheckpointError: an extent goes beyond its file, or a file cannot be opened.
    """

    def __init__(
        self,
        path: Path,
        format: str,
        tensors: list[StoredTensor],
        objects: tuple[StoredObject, ...] = (),
        metadata: Mapping[str, str] | None = None,
        nested: tuple[str, ...] = (),
        files: tuple[Path | Deflated, ...] = (),
        notes: tuple[str, ...] = (),
        checksums: tuple[Checksum, ...] = (),
    ) -> None:
        self.path, self.format, self.objects, self.nested, self.notes = path, format, objects, nested, notes
        self.metadata, self.checksums = dict(metadata or {}), checksums
        self.files = files or (path,)
        self._tensors = _by_name(path, tensors)
        self._sound: set[tuple[Extent, ...]] = set()  # storages whose checksum was right
        self._open = OpenFiles(self.files)
        try:
            self._check_extents()
        except CheckpointError:
            self.close()
            raise

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files that it is read from: what was opened, and of several files each."""
        return (self.path, *(self._open.path(number) for number in range(len(self.files))))

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __enter__(self) -> StoredFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files."""
        self._open.close()

    def became_shorter(self, extent: Extent) -> CheckpointError:
        """The error for a file that ends before an extent does, which it did not when it was opened."""
        return self._open.became_shorter(extent)

    def descriptor(self, extent: Extent) -> int:
        """The open file that an extent lies in.

        Raises:
            CheckpointError: it had to be unpacked first, and is damaged.
        """
        return self._open.descriptor(extent.file)

    def fill(
        self, tensor: StoredTensor, position: int, buffers: Sequence[memoryview], length: int | None = None
    ) -> None:
        """Fill buffers with a plain tensor's bytes, from a position in it on; no checksum is looked at.

        Args:
            tensor: plain.
            position: how many of its bytes to pass over.
            buffers: of bytes, one after another.
            length: bytes of the buffers together, where somebody knows: to ask hundreds of them takes a while.

        Raises:
            CheckpointError: the file has become shorter since it was opened.
        """
        tensor.require_readable(self.path)
        left, wanted = buffers, total(buffers) if length is None else length
        for extent in tensor.plain_extents():
            here = min(wanted, max(extent.length - position, 0))
            if here:
                now, left = (left, ()) if here == wanted else _divided(left, here)
                self._open.fill(now, extent, position, here)
                wanted -= here
            position = max(position - extent.length, 0)

    def fill_from(self, extent: Extent, skip: int, buffer: memoryview) -> None:
        """Fill a buffer with bytes of an extent, from the skipped ones on.

        Raises:
            CheckpointError: the file has become shorter since it was opened.
        """
        self._open.fill([buffer], extent, skip, len(buffer))

    def chunks(self, tensor: StoredTensor, size: int = CHUNK) -> Iterator[memoryview]:
        """The tensor's bytes in C order, little-endian, in pieces; each piece is valid until the next is asked for.

        Raises:
            CheckpointError: the file ends too early, or the storage's checksum is wrong.
        """
        tensor.require_readable(self.path)
        if not tensor.plain:
            yield bytes_of(self.words(tensor))
            return
        buffer = memory.from_a_page_on(min(size, max(tensor.nbytes, 1))).data
        crc = tensor.checksum[0] if tensor.checksum else 0
        for extent in tensor.plain_extents():
            for offset in range(0, extent.length, len(buffer)):
                piece = buffer[: min(len(buffer), extent.length - offset)]
                self._open.fill([piece], extent, offset, len(piece))
                crc = crc32(piece, crc) if tensor.checksum else 0
                yield piece
        self._require_checksum(tensor, tensor.nbytes, crc)

    def read(self, name: str) -> np.ndarray:
        """One tensor as an array of its own; bfloat16 as ``ml_dtypes.bfloat16``.

        Raises:
            CheckpointError: the file ends too early, or NumPy has no such dtype.
        """
        tensor = self[name]
        words = self.words(tensor)
        if tensor.dtype == "bfloat16":
            return dtypes.to_public(words.view(dtypes.BFLOAT16_WORDS))
        if tensor.dtype in NOT_IN_NUMPY:
            raise CheckpointError(
                f"{self.path}: {name}",
                given=f"dtype {tensor.dtype}, which NumPy does not have",
                expected="bool, integers, or floats of 16 bits and more",
                advice="Quantised weights have to be dequantised first, by the library that wrote them.",
            )
        return words.view(np.dtype(tensor.dtype))

    def words(self, tensor: StoredTensor) -> np.ndarray:
        """The tensor as unsigned integers of its item's size (complex128 as complex128), in C order."""
        tensor.require_readable(self.path)
        kind = words_of(tensor.dtype)
        if tensor.plain:
            array = memory.from_a_page_on(tensor.size * kind.itemsize).view(kind)
            self.fill(tensor, 0, [bytes_of(array)])
            self._sum_up(tensor, array)
            return array.reshape(tensor.shape)
        return blocks.contiguous(self._strided(tensor, kind))

    def _strided(self, tensor: StoredTensor, kind: np.dtype[Any]) -> np.ndarray:
        """A view of what lies between its first and last element; only that is read, unless a checksum is of all."""
        strides = tensor.strides or _c_strides(tensor.shape)
        whole = sum(extent.length for extent in tensor.extents) // tensor.item_size
        span = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, strides, strict=True)) if tensor.size else 0
        summed = tensor.checksum is not None and tensor.extents not in self._sound
        start, length = (0, whole) if summed else (tensor.start, span)
        storage = memory.from_a_page_on(length * kind.itemsize).view(kind)
        lying = dataclasses.replace(tensor, shape=(length,), start=start, strides=None, big_endian=False)
        self.fill(lying, 0, [bytes_of(storage)])
        if summed:  # once: thousands of views of one storage would read it thousands of times
            self._sum_up(tensor, storage)
            self._sound.add(tensor.extents)
        if tensor.big_endian:
            parts = np.dtype("complex64") if tensor.dtype == "complex64" else kind  # two numbers, each turned round
            storage = storage.view(parts).byteswap().view(kind)
        steps = tuple(stride * tensor.item_size for stride in strides)
        first = storage[tensor.start - start :] if tensor.size else storage
        return np.lib.stride_tricks.as_strided(first, tensor.shape, steps)

    def _sum_up(self, tensor: StoredTensor, array: np.ndarray) -> None:
        if tensor.checksum:
            self._require_checksum(tensor, array.nbytes, crc32(bytes_of(array), tensor.checksum[0]))

    def _require_checksum(self, tensor: StoredTensor, length: int, crc: int) -> None:
        """The checksum covers the whole storage: it says nothing of a part of it."""
        whole = length == sum(extent.length for extent in tensor.extents)
        if tensor.checksum and whole and crc != tensor.checksum[1]:
            raise CheckpointError(
                f"{self.path}: {tensor.name}",
                given=f"content that cannot be read (Bad CRC-32: {crc:08x})",
                expected=f"bytes whose CRC-32 is {tensor.checksum[1]:08x}",
                advice="The file is damaged: copy or download it again.",
            )

    def _check_extents(self) -> None:
        sizes, reach, self._expanded = [self._open.size(number) for number in range(len(self.files))], 0, 0
        for tensor in self._tensors.values():
            if tensor.dtype not in ITEM_SIZES:
                raise CheckpointError(
                    f"{self.path}: {tensor.name}", given=f"dtype {tensor.dtype}", expected=", ".join(ITEM_SIZES)
                )
            for extent in tensor.extents:
                if extent.offset < 0 or extent.length < 0 or extent.offset + extent.length > sizes[extent.file]:
                    raise CheckpointError(
                        f"{self.path}: {tensor.name}",
                        given=f"{extent.length} bytes from {extent.offset} on in a file of {sizes[extent.file]} bytes",
                        expected="bytes that are in the file",
                        advice="The file is cut off or damaged: copy or download it again.",
                    )
            reach += self._check_view(tensor) * tensor.item_size
        if reach > max(_MOST_SHARED, 100 * sum(sizes)):
            raise CheckpointError(
                str(self.path),
                given=f"tensors of {reach} bytes together in a file of {sum(sizes)}",
                expected="tensors that share their numbers, if at all, with a few others",
                advice="Save only one of the tensors that are views of the same numbers.",
            )

    def _check_view(self, tensor: StoredTensor) -> int:
        """A view must lie inside its storage; those that are larger than that could ask for any memory: some are read.

        Returns:
            From its first element to its last, how many there are in the storage; 0 when it is not read.
        """
        length = sum([extent.length for extent in tensor.extents])
        shape, strides, item = tensor.shape, tensor.strides, tensor.item_size
        whole = all(map(_is_count, (*shape, tensor.start)))
        if whole and (strides is None or (len(strides) == len(shape) and all(map(_is_count, strides)))):
            size = tensor.size
            if size == 0 or tensor.unreadable is not None:
                return 0
            span = size
            if strides is not None:
                span = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
            if (tensor.start + span) * item <= length:
                self._expanded += size * item if size * item > length else 0
                if size * item <= length or self._expanded <= _MOST_EXPANDED:
                    return max(span, size)
                self._tensors[tensor.name] = dataclasses.replace(tensor, unreadable=_EXPANDED)
                return 0
        raise CheckpointError(
            f"{self.path}: {tensor.name}",
            given=f"shape {tensor.shape}, strides {tensor.strides} and start {tensor.start} in {length} bytes",
            expected=f"a tensor of {tensor.dtype} inside its storage",
            advice="The file is damaged: copy or download it again.",
        )


@functools.cache
def words_of(dtype: str) -> np.dtype[Any]:
    """Unsigned integers of the size of a dtype's items; complex128 for itself.

    Example:
        >>> words_of("bfloat16"), words_of("complex64")
        (dtype('uint16'), dtype('uint64'))
    """
    size = ITEM_SIZES[dtype] or 0
    return np.dtype(f"u{size}") if size <= 8 else np.dtype("complex128")


def shapes_of(tensors: Mapping[str, StoredTensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of tensors, by name."""
    return {name: tensor.shape for name, tensor in tensors.items()}


def bytes_of(array: np.ndarray) -> memoryview:
    """The memory of an array in C order, as bytes.

    Example:
        >>> list(bytes_of(np.array([1, 2], "<u2")))
        [1, 0, 2, 0]
    """
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _by_name(path: Path, tensors: list[StoredTensor]) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for tensor in tensors:
        if tensor.name in found:
            raise CheckpointError(
                f"{path}: {tensor.name}", given="two tensors of this name", expected="one", advice="One would be lost."
            )
        found[tensor.name] = tensor
    return found


def _divided(buffers: Sequence[memoryview], count: int) -> tuple[Sequence[memoryview], Sequence[memoryview]]:
    """The first bytes of buffers, and what is left."""
    for number, buffer in enumerate(buffers):
        if count <= len(buffer):
            return [*buffers[:number], buffer[:count]], after(buffers[number:], count)
        count -= len(buffer)
    return buffers, ()


def _is_count(number: Any) -> bool:
    return isinstance(number, int) and number >= 0


def _c_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step)
        step *= max(length, 1)
    return tuple(reversed(strides))
