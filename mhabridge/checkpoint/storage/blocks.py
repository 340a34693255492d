"""A matrix with its axes swapped in memory, block by block.

Why this is written out: ``np.ascontiguousarray(matrix.T)`` reads down columns, and where the length of a row is a power
of two all elements of a column fall into the same few cache sets. The same loop is four to nine times as fast on
a block of rows that was first copied to a scratch whose rows are a little longer (1024² and 4096² float32, one core;
``make bench`` measures it).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mhabridge.checkpoint.storage.memory import from_a_page_on

_ROWS = 512  # at a time; of more, each in pages of its own, the processor forgets the places (measured)
_COLUMNS = 128  # a block of so many fits into a second-level cache; fewer rows of more are a tenth slower (measured)
_PADDING = 64  # bytes behind each row of the scratch: one cache line


def transpose_into(source: np.ndarray, out: np.ndarray, scratch: np.ndarray | None = None) -> None:
    """Write a matrix with its axes swapped.

    Args:
        source: (R, C).
        out: (C, R), of the same dtype.
        scratch: bytes to work in, as many as ``scratch_size`` says; None to make some.

    Example:
        >>> out = np.empty((3, 2), "u4")
        >>> transpose_into(np.arange(6, dtype="u4").reshape(2, 3), out)
        >>> out.tolist()
        [[0, 3], [1, 4], [2, 5]]
    """
    if scratch is None:
        scratch = from_a_page_on(scratch_size(source.shape[1], source.itemsize))
    sheet = padded(scratch, min(source.shape[1], _COLUMNS), source.dtype, _ROWS)
    for row in range(0, len(source), _ROWS):
        rows, turned = source[row : row + _ROWS], out[:, row : row + _ROWS]
        for column in range(0, source.shape[1], _COLUMNS):
            columns = rows[:, column : column + _COLUMNS]
            block = sheet[: columns.shape[0], : columns.shape[1]]
            block[...] = columns
            turned[column : column + _COLUMNS] = block.T


def turn_into(rows: np.ndarray, out: np.ndarray) -> None:
    """As ``transpose_into`` for rows that have a cache line between them already."""
    for row in range(0, len(rows), _ROWS):
        out[:, row : row + _ROWS] = rows[row : row + _ROWS].T


def contiguous(array: np.ndarray) -> np.ndarray:
    """An array in C order: itself when it is, else a copy, which is made fast for a transposed matrix.

    Example:
        >>> contiguous(np.arange(6).reshape(2, 3).T).tolist()
        [[0, 3], [1, 4], [2, 5]]
    """
    if array.ndim != 2 or array.flags.c_contiguous or not array.T.flags.c_contiguous:
        return np.ascontiguousarray(array).reshape(array.shape)
    out: np.ndarray = from_a_page_on(array.nbytes).view(array.dtype).reshape(array.shape)
    transpose_into(array.T, out)
    return out


def scratch_size(columns: int, item_size: int) -> int:
    """The bytes of the scratch for a matrix of so many columns."""
    return padded_size(_ROWS, min(columns, _COLUMNS) * item_size)


def padded_size(count: int, row_bytes: int) -> int:
    """The bytes of so many rows with a cache line between them."""
    return count * (row_bytes + _PADDING)


def padded(scratch: np.ndarray, columns: int, kind: np.dtype[Any], count: int) -> np.ndarray:
    """So many rows of so many columns in the scratch, with a cache line between them."""
    row = columns * kind.itemsize
    return scratch[: padded_size(count, row)].reshape(count, row + _PADDING)[:, :row].view(kind)
