"""Parts of stored tensors, tensors joined, and matrices whose axes are swapped on the way from one file to another."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from mhabridge.checkpoint import blocks
from mhabridge.checkpoint.stored import StoredFile, StoredTensor, bytes_of
from mhabridge.checkpoint.writing import Outgoing, Sink, passed_through

_RESULT_BYTES = 256 << 20  # in memory at a time: a larger result is made panel by panel, which reads shorter pieces


def part(tensor: StoredTensor, start: int, shape: tuple[int, ...], name: str | None = None) -> StoredTensor:
    """Elements that follow each other in a plain tensor, as a tensor of their own that lies in the same file.

    Args:
        tensor: a plain one.
        start: the first element, counted in C order.
        shape: of the part.
        name: of the part; the tensor's own when None.

    Raises:
        ValueError: the tensor is not plain, or has no such elements.

    Example:
        >>> from mhabridge.checkpoint.stored import Extent
        >>> packed = StoredTensor("io_weight_bias", "float32", (1, 12), (Extent(0, 100, 48),), "0")
        >>> list(part(packed, 4, (2, 2)).plain_extents())
        [Extent(file=0, offset=116, length=16)]
    """
    end = start + math.prod(shape)
    if not tensor.plain or not 0 <= start <= end <= tensor.size:
        raise ValueError(f"elements {start} to {end} of {tensor.name}, {tensor.shape}, strides {tensor.strides}")
    if end == start:
        start = 0
    # The checksum covers the whole storage, of which this is a part: ``StoredFile`` sees that and does not compare it.
    return dataclasses.replace(tensor, name=name or tensor.name, shape=shape, start=tensor.start + start, strides=None)


def rows(tensor: StoredTensor, start: int, stop: int, name: str | None = None) -> StoredTensor:
    """Some rows (the first axis) of a plain tensor.

    Raises:
        ValueError: the tensor is not plain, has no axis, or no such rows.

    Example:
        >>> from mhabridge.checkpoint.stored import Extent
        >>> packed = StoredTensor("in_proj_weight", "float32", (6, 2), (Extent(0, 0, 48),), "0")
        >>> rows(packed, 2, 4, "k_proj.weight").start
        4
    """
    if not tensor.shape or not 0 <= start <= stop <= tensor.shape[0]:
        raise ValueError(f"rows {start} to {stop} of {tensor.name}, {tensor.shape}")
    length = math.prod(tensor.shape[1:])
    return part(tensor, start * length, (stop - start, *tensor.shape[1:]), name)


def joined(parts: Sequence[Outgoing], name: str, shape: tuple[int, ...]) -> Outgoing:
    """One tensor whose elements are those of several, one after another.

    Raises:
        ValueError: there are none, their dtypes differ, or their elements do not fill the shape.
    """
    kinds = {one.dtype for one in parts}
    if len(kinds) != 1 or sum(one.size for one in parts) != math.prod(shape):
        given = ", ".join(f"{one.name} {one.dtype} {one.shape}" for one in parts)
        raise ValueError(f"{name} of shape {shape} cannot be joined from {given or 'nothing'}")

    def emit(sink: Sink) -> None:
        for one in parts:
            one.write_to(sink)

    ties = [one.tied for one in parts]
    return Outgoing(name, kinds.pop(), shape, emit, None if None in ties else " + ".join(map(str, ties)))


def transposed(file: StoredFile, tensor: StoredTensor, name: str) -> Outgoing:
    """A matrix (R, C) of a file that is written as (C, R).

    In memory at a time are the result, but never more than 256 MiB of it, and a block of the source of 8 MiB at most;
    unless the source is a view that is not plain: that is read whole.

    Raises:
        ValueError: the tensor has not two axes.
    """
    if len(tensor.shape) != 2:
        raise ValueError(f"{tensor.name} of shape {tensor.shape} is no matrix")
    turned = _turned(tensor)
    if turned.plain or not tensor.plain:
        return passed_through(file, turned, name)
    tied = f"transposed {tensor.storage} {tensor.start} {tensor.shape} {tensor.dtype}"
    return Outgoing(name, tensor.dtype, turned.shape, lambda sink: _emit(file, tensor, sink), tied)


def _turned(tensor: StoredTensor) -> StoredTensor:
    """The same storage with its axes swapped: plain when the tensor was itself saved as a transposed view."""
    count, length = tensor.shape
    step, stride = tensor.strides or (length, 1)
    in_order = (stride == count or length < 2) and (step == 1 or count < 2)
    return dataclasses.replace(tensor, shape=(length, count), strides=None if in_order else (stride, step))


def _emit(file: StoredFile, tensor: StoredTensor, sink: Sink) -> None:
    """Panel by panel of columns, so that what is written is in order; one panel unless the matrix is large."""
    count, length = tensor.shape
    width = min(length, max(_RESULT_BYTES // max(count * tensor.item_size, 1), 16))
    kind = np.dtype(f"u{tensor.item_size}") if tensor.item_size <= 8 else np.dtype("complex128")
    out_bytes = count * width * kind.itemsize
    memory = sink.scratch(out_bytes + blocks.scratch_size(width, kind.itemsize))
    for first in range(0, length, max(width, 1)):
        here = min(width, length - first)
        out = memory[: here * count * kind.itemsize].view(kind).reshape(here, count)
        _read_turned(file, tensor, first, out, memory[out_bytes:])
        sink.write(bytes_of(out))


def _read_turned(file: StoredFile, tensor: StoredTensor, first: int, out: np.ndarray, scratch: np.ndarray) -> None:
    """Read the columns from ``first`` on, as many as ``out`` has rows."""
    length, (width, count) = tensor.shape[1], out.shape
    block = blocks.padded(scratch, width, out.dtype)
    lines = [memoryview(line.view(np.uint8)) for line in block]
    for row in range(0, count, len(block)):
        here = min(len(block), count - row)
        position = (row * length + first) * out.itemsize
        if width == length:
            file.fill(tensor, position, lines[:here])
        else:
            for number in range(here):
                file.fill(tensor, position + number * length * out.itemsize, [lines[number]])
        out[:, row : row + here] = block[:here].T
