"""Two stored tensors beside each other, read in pieces: what they hold is compared, whatever way round it lies.

Memory is bounded: pieces of 524,288 elements of each side, and sheets of matrices that lie transposed, 132 MiB of these
in all threads together. Checksums are not looked at: where a file is damaged, its numbers differ.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator

import numpy as np

from mhabridge import dtypes
from mhabridge.checkpoint.storage import blocks, transposing
from mhabridge.checkpoint.storage.memory import Scratch, start_between
from mhabridge.checkpoint.storage.stored import StoredFile, StoredTensor, bytes_of, words_of
from mhabridge.diff.bits import are_copies
from mhabridge.diff.comparing import Comparison, Measure, decide

# Elements. Smaller ones would fit into a second-level cache, but after each step threads wait for Python's lock.
PIECE = 512 << 10
_THREADS = 168 << 20  # bytes in memory at a time, in all threads together: of these transposed matrices and
_THREAD = 18 << 20  # what each thread has beside them
_SHEET = 72 << 20  # of one of them: a matrix of 4096 x 4096 float32 is read whole, which is faster
_PARTS = {"complex64": "float32", "complex128": "float64"}
_READERS = 4  # sheets at a time where a diff is explained, beside what is left of comparing
_SMALL = 4 << 20  # bytes of a matrix that is turned at once
_LONG_ROW = 2 << 10  # bytes
_ROWS = 256  # that are read at a time
_SLICE = 4 << 20  # bytes of what is otherwise strided


@dataclasses.dataclass(frozen=True)
class Side:
    """One side of a comparison: a tensor, or a view of one, and the open file that it lies in."""

    file: StoredFile
    tensor: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return self.tensor.shape

    @property
    def dtype(self) -> str:
        """Of the tensor, by name."""
        return self.tensor.dtype

    @functools.cached_property
    def identity(self) -> tuple[object, ...]:
        """What two tensors have in common that are the same numbers of one file; of empty ones nothing is."""
        one = self.tensor
        strides = one.strides or _c_strides(one.shape)
        steps = tuple(step for step, size in zip(strides, one.shape, strict=True) if size > 1)
        sizes = tuple(size for size in one.shape if size > 1)
        return (one.storage, one.start, steps, sizes, one.dtype, "" if one.size else one.name)

    def turned(self) -> Side:
        """The same matrix with its axes swapped."""
        one = self.tensor
        shape, strides = one.shape[::-1], (one.strides or _c_strides(one.shape))[::-1]
        plain = strides == _c_strides(shape)
        return Side(self.file, dataclasses.replace(one, shape=shape, strides=None if plain else strides))

    def pieces(self, scratch: Scratch | None = None) -> Iterator[np.ndarray]:
        """All elements in C order, as arrays of one axis, each valid until the next is asked for."""
        stream = _Stream(self, scratch or Scratch(), sheet_size(_READERS))
        left = self.tensor.size
        while left:
            count = min(stream.ready(), PIECE)
            yield stream.take(count)
            left -= count


@dataclasses.dataclass
class Found:
    """What was measured of two tensors or of a stretch of them.

    Args:
        measure: the differences.
        copied: whether both hold the same numbers, as far as their dtypes can and as far as was seen.
    """

    measure: Measure
    copied: bool

    def join(self, later: Found) -> None:
        """Add what was found in the stretch that follows."""
        self.measure.join(later.measure)
        self.copied = self.copied and later.copied


def sheet_size(threads: int) -> int:
    """How much of a matrix that lies transposed each of several threads may have in memory.

    Example:
        >>> sheet_size(4) >> 20
        24
    """
    return min(_SHEET, max(_THREADS // threads - _THREAD, _SLICE))


def measure(
    first: Side,
    second: Side,
    scratch: tuple[Scratch, Scratch],
    sheet: int,
    start: int = 0,
    count: int | None = None,
) -> Found:
    """Measure two tensors of equal size, or a stretch of them.

    Args:
        first: one.
        second: the other; its elements in C order belong to those of the first, whatever its shape.
        scratch: memory to work in, for each.
        sheet: bytes of a matrix that lies transposed to have in memory.
        start: the first element of the stretch; other than 0 only where both lie in their files as they are.
        count: of elements; None for all.

    Raises:
        CheckpointError: a file cannot be read.
    """
    complex_ones = [one.dtype.startswith("complex") for one in (first, second)]
    found = Found(Measure(), first.dtype != second.dtype and {first.dtype, second.dtype} <= set(dtypes.FLOATS))
    if any(complex_ones) and first.dtype != second.dtype:
        return found  # broken whatever they hold
    one, other = _Stream(first, scratch[0], sheet, start), _Stream(second, scratch[1], sheet, start)
    left = first.tensor.size - start if count is None else count
    while left:
        here = min(one.ready(), other.ready(), PIECE, left)
        a, b = one.take(here), other.take(here)
        found.copied = found.copied and are_copies(a, b)
        found.measure.add(a, b, spent=True)
        left -= here
    if any(complex_ones):
        _halve(found.measure)
    return found


def _halve(measure: Measure) -> None:
    """Complex numbers are measured by their parts, two for each element."""
    measure.elements //= 2
    measure.worst = None if measure.worst is None else measure.worst // 2
    measure.strange = None if measure.strange is None else measure.strange // 2


def alike(first: Side, second: Side) -> tuple[Side, Side]:
    """Both the way round that is read fastest: what lies transposed in both files is compared as it lies."""
    if first.shape == second.shape and not (first.tensor.plain or second.tensor.plain):
        sources = transposing.source_of(first.tensor), transposing.source_of(second.tensor)
        if None not in sources:
            return first.turned(), second.turned()
    return first, second


def verdict(first: Side, second: Side, found: Found, turned: bool) -> Comparison:
    """The verdict on two tensors whose elements were measured.

    Args:
        first: one.
        second: the other, of the same shape or one of the same elements.
        found: of them, or of both turned.
        turned: which of these.
    """
    other = dataclasses.replace(second.tensor, shape=first.shape)
    if turned:
        one = decide(
            first.turned().tensor, Side(second.file, other).turned().tensor, found.measure, copied=found.copied
        )
        index = None if one.index is None else one.index[::-1]
        return dataclasses.replace(one, shapes=(first.shape, second.shape), index=index)
    one = decide(first.tensor, other, found.measure, copied=found.copied)
    return dataclasses.replace(one, shapes=(first.shape, second.shape))


class _Stream:
    """A tensor's elements in C order, as many at a time as are asked for.

    Args:
        side: the tensor.
        scratch: memory to work in.
        sheet: bytes of a matrix that lies transposed to have in memory.
        start: the first element; other than 0 only for plain ones.
    """

    def __init__(self, side: Side, scratch: Scratch, sheet: int, start: int = 0) -> None:
        self.file, self.tensor = side.file, side.tensor
        if self.tensor.checksum is not None:
            self.tensor = dataclasses.replace(self.tensor, checksum=None)
        self.kind, self.at = words_of(self.tensor.dtype), start
        self.plain = self.tensor.plain
        size, item = min(PIECE, self.tensor.size) if self.plain else 0, self.kind.itemsize
        place = start_between(self.tensor.place + start * item) if self.plain else 0
        self._buffer = scratch.take(size * item, place).view(self.kind)
        self._bytes = bytes_of(self._buffer)
        self._pieces = iter(()) if self.plain else _strided(self.file, self.tensor, scratch, sheet)
        self._piece = np.empty(0, self.kind)

    def ready(self) -> int:
        """How many elements can be taken at once; at least one, if one is left."""
        if self.plain:
            return self.tensor.size - self.at
        while not len(self._piece):
            self._piece = next(self._pieces)
        return len(self._piece)

    def take(self, count: int) -> np.ndarray:
        """The next elements, in the tensor's dtype; valid until the next are taken."""
        if self.plain:
            item = self.tensor.item_size
            found = self._buffer[:count]
            self.file.fill(self.tensor, self.at * item, [self._bytes[: count * item]])
        else:
            found, self._piece = self._piece[:count], self._piece[count:]
        self.at += count
        return typed(found, self.tensor.dtype)


def typed(words: np.ndarray, dtype: str) -> np.ndarray:
    """Words as numbers. What NumPy and ml_dtypes do not have stays words; complex numbers are measured by their parts.

    Example:
        >>> typed(np.array([0x3F80], "u2"), "bfloat16")
        array([1], dtype=bfloat16)
    """
    if dtype.startswith(("bfloat16", "float8")):
        import ml_dtypes

        kind = getattr(ml_dtypes, dtype, None)
        found = words if kind is None else words.view(kind)
        return found if dtype == "bfloat16" or kind is None else found.astype(np.float32)
    return words.view(_PARTS.get(dtype, dtype))


def _strided(file: StoredFile, tensor: StoredTensor, scratch: Scratch, sheet: int) -> Iterator[np.ndarray]:
    """The words of a tensor that does not lie in the file as it is."""
    matrix = transposing.source_of(tensor)
    if matrix is None:
        yield from _slices(file, tensor)
        return
    if matrix.plain and matrix.nbytes <= _SMALL:
        yield _turned_whole(file, matrix, scratch)
        return
    count, length = matrix.shape
    stride = (matrix.strides or matrix.shape[1:])[0]
    width = max(min(sheet // max(count * matrix.item_size, 1), length), 1)
    for first in range(0, length, width):
        shape = (count, min(width, length - first))
        strides = None if shape[1] == stride else (stride, 1)
        part = dataclasses.replace(matrix, shape=shape, start=matrix.start + first, strides=strides)
        for panel in transposing.panels(file, part, scratch):
            yield np.frombuffer(panel, words_of(tensor.dtype))


def _turned_whole(file: StoredFile, matrix: StoredTensor, scratch: Scratch) -> np.ndarray:
    """A small matrix, all of it."""
    kind = words_of(matrix.dtype)
    if matrix.shape[1] * matrix.item_size >= _LONG_ROW:
        return _turned_in_rows(file, matrix, scratch)
    # Read at once: to put each of its rows in its place would take longer than one more copy.
    size, work = matrix.nbytes, blocks.scratch_size(matrix.shape[1], matrix.item_size)
    memory = scratch.take(2 * size + work)
    rows, out = memory[:size], memory[size : 2 * size].view(kind)
    file.fill(matrix, 0, [rows.data])
    turned = out.reshape(matrix.shape[::-1])
    blocks.transpose_into(rows.view(kind).reshape(matrix.shape), turned, memory[2 * size :])
    return out


def _turned_in_rows(file: StoredFile, matrix: StoredTensor, scratch: Scratch) -> np.ndarray:
    """Rows are read to where they are turned from, so many at a time that they stay in a second-level cache."""
    kind, row = words_of(matrix.dtype), matrix.shape[1] * matrix.item_size
    count = min(matrix.shape[0], _ROWS)
    memory = scratch.take(matrix.nbytes + blocks.padded_size(count, row))
    out = memory[: matrix.nbytes].view(kind)
    turned = out.reshape(matrix.shape[::-1])
    block = blocks.padded(memory[matrix.nbytes :], matrix.shape[1], kind, count)
    lines = scratch.lines(block, 0, count)
    for first in range(0, matrix.shape[0], count):
        here = min(count, matrix.shape[0] - first)
        file.fill(matrix, first * row, lines[:here], here * row)
        blocks.turn_into(block[:here], turned[:, first : first + here])
    return out


def _slices(file: StoredFile, tensor: StoredTensor) -> Iterator[np.ndarray]:
    """By the first axis, where a slice of it lies together in the file; else all at once."""
    strides = tensor.strides or _c_strides(tensor.shape)
    if not tensor.shape or strides[0] != max(strides):
        yield file.words(tensor).reshape(-1)
        return
    row = math.prod(tensor.shape[1:])
    step = max(1, _SLICE // max(row * tensor.item_size, 1))
    for first in range(0, tensor.shape[0], step):
        shape = (min(step, tensor.shape[0] - first), *tensor.shape[1:])
        part = dataclasses.replace(tensor, shape=shape, start=tensor.start + first * strides[0], strides=strides)
        yield file.words(part).reshape(-1)


def _c_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
