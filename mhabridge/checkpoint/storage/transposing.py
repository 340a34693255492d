"""Matrices whose axes are swapped on the way from one file to another, a panel at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from mhabridge.checkpoint.storage import blocks
from mhabridge.checkpoint.storage.memory import Scratch, clear_of
from mhabridge.checkpoint.storage.stored import CHUNK, StoredFile, StoredTensor, bytes_of, words_of
from mhabridge.checkpoint.storage.writing import Outgoing, Sink, passed_through

_SHEET_BYTES = (
    128 << 20
)  # in memory at a time: of a larger matrix some columns are read after the others, which is slow
_PANEL_BYTES = 2 << 20  # of what is turned at a time
_PANEL_ROW = 4096  # bytes of each row of the source in a panel: whole cache lines, and few steps to wait after
_LINE = 64  # bytes of a line of the cache
_SHORT_ROW = 1 << 10  # bytes
_LINES = 256  # longer rows that are read at a time


def transposed(file: StoredFile, tensor: StoredTensor, name: str) -> Outgoing:
    """A matrix (R, C) of a file that is written as (C, R).

    In memory at a time are the matrix, but never more than 128 MiB of it, and a panel of 2 MiB; unless its rows do not
    lie in the file as they are: then it is read whole.

    Raises:
        ValueError: the tensor has not two axes.
    """
    if len(tensor.shape) != 2:
        raise ValueError(f"{tensor.name} of shape {tensor.shape} is no matrix")
    tensor.require_readable(file.path)
    turned = _turned(tensor)
    if turned.plain or not _in_rows(tensor):
        return passed_through(file, turned, name)

    def emit(sink: Sink) -> None:
        for panel in panels(file, tensor, sink.scratch, sink.position):
            sink.write(panel)

    tied = f"transposed {tensor.storage} {tensor.start} {tensor.strides} {tensor.shape} {tensor.dtype}"
    return Outgoing(name, tensor.dtype, turned.shape, emit, tied)


def source_of(view: StoredTensor) -> StoredTensor | None:
    """The matrix that a view is the transpose of, when its rows lie in the file as they are; else None."""
    if len(view.shape) != 2 or view.strides is None or view.size == 0:
        return None
    found = _turned(view)
    return found if _in_rows(found) else None


def panels(file: StoredFile, tensor: StoredTensor, scratch: Scratch, target: int = 0) -> Iterator[memoryview]:
    """The bytes of a matrix (R, C) with its axes swapped, in order; each piece is valid until the next is asked for.

    Args:
        file: the open file.
        tensor: a matrix whose rows lie in the file as they are (``source_of`` gives such).
        scratch: memory to work in.
        target: where in a file the first is written.

    Raises:
        CheckpointError: the file has become shorter since it was opened.
    """
    count, length = tensor.shape
    kind, item = words_of(tensor.dtype), tensor.item_size
    width = max(min(length, _SHEET_BYTES // max(count * item, 1)), 1)
    across = max(min(_PANEL_ROW // item, _PANEL_BYTES // max(count * item, 1)), 16)
    sizes = (blocks.padded_size(count, width * item), min(across, width) * count * item + _LINE, CHUNK)
    sheet_memory, panel_memory, buffer = _divided(scratch, sizes)
    panel_memory = clear_of(panel_memory, target)
    for first in range(0, length, width):
        sheet = blocks.padded(sheet_memory, min(width, length - first), kind, count)
        _read_columns(file, tensor, first, sheet, scratch, buffer)
        for column in range(0, sheet.shape[1], across):
            columns = sheet[:, column : column + across]
            panel = panel_memory[: columns.nbytes].view(kind).reshape(columns.shape[::-1])
            blocks.turn_into(columns, panel)
            yield bytes_of(panel)


def _turned(tensor: StoredTensor) -> StoredTensor:
    """The same storage with its axes swapped: plain when the tensor was itself saved as a transposed view."""
    count, length = tensor.shape
    step, stride = tensor.strides or (length, 1)
    in_order = (stride == count or length < 2) and (step == 1 or count < 2)
    return dataclasses.replace(tensor, shape=(length, count), strides=None if in_order else (stride, step))


def _in_rows(tensor: StoredTensor) -> bool:
    """Whether each row's bytes lie together, as they are, and a row after the one before it."""
    row = tensor.strides or (tensor.shape[1], 1)
    return row[1] == 1 and row[0] >= tensor.shape[1] and (not tensor.big_endian or tensor.item_size == 1)


def _divided(scratch: Scratch, sizes: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Memory of these sizes, each from a cache line on."""
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // _LINE) * _LINE)
    memory = scratch.take(starts[-1])
    return (memory[start : start + size] for start, size in zip(starts, sizes, strict=False))


def _read_columns(
    file: StoredFile,
    tensor: StoredTensor,
    first: int,
    sheet: np.ndarray,
    scratch: Scratch,
    buffer: np.ndarray,
) -> None:
    """Fill the sheet's rows with the columns from ``first`` on."""
    count, width = sheet.shape
    stride, item = (tensor.strides or tensor.shape[1:])[0], tensor.item_size
    span = (tensor.shape[0] - 1) * stride + tensor.shape[1]
    lying = dataclasses.replace(tensor, shape=(span,), strides=None)
    if width == stride and width * item <= _SHORT_ROW:
        _read_short_rows(file, lying, sheet, buffer)
        return
    step = _LINES if width == stride else 1
    for row in range(0, count, step):
        lines = scratch.lines(sheet, row, row + step)
        file.fill(lying, (row * stride + first) * item, lines, len(lines) * width * item)


def _read_short_rows(file: StoredFile, lying: StoredTensor, sheet: np.ndarray, buffer: np.ndarray) -> None:
    """Many rows into one buffer, and from there to the sheet: a call for each would take longer than copying it."""
    count, width = sheet.shape
    row_bytes = width * lying.item_size
    step = len(buffer) // row_bytes
    for row in range(0, count, step):
        rows = buffer[: min(step, count - row) * row_bytes]
        file.fill(lying, row * row_bytes, [rows.data])
        sheet[row : row + step] = rows.view(sheet.dtype).reshape(-1, width)
