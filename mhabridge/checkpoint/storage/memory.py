"""Memory that files are read into and written from, and whether two pieces of it are the same."""

from __future__ import annotations

import ctypes
import os
from typing import Any

import numpy as np

_PAGE = 4096
_STARTS = (0, 64, 128)  # bytes into a page, where memory may start
_MANY = 16 * _PAGE
_MOST_LINES = 16 << 10  # rows whose memoryviews are kept: 3 MB of them
_C = ctypes.CDLL(None if os.name == "posix" else "msvcrt")
_C.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


def from_a_page_on(size: int) -> np.ndarray:
    """So many bytes, not yet written to; the first of many is the first of a page.

    ``np.empty`` gives large memory that starts 16 bytes into one, and tensors often start with a page of their file:
    see ``start_between``.

    Example:
        >>> from_a_page_on(1 << 20).__array_interface__["data"][0] % 4096
        0
    """
    if size < _MANY:
        return np.empty(size, np.uint8)
    memory = np.empty(size + _PAGE, np.uint8)
    start = -_address(memory) % _PAGE
    return memory[start : start + size]


def start_between(source: int, target: int | None = None) -> int:
    """How far into a page memory should start that is read from one place of a file, and written to one of another.

    Some processors (measured on AMD's Zen 4) take two to seven times as long to copy to a place that is 1 to 31 bytes
    further into a page than where the bytes come from.

    Args:
        source: where in a file the first byte is read.
        target: where it is written; None: nowhere.

    Example:
        >>> start_between(0), start_between(4088), start_between(4096 - 64 - 8, 72)
        (0, 64, 0)
    """
    for start in _STARTS[:-1]:  # of three that are 64 apart each copy can be slow from or to one, so the last will do
        if not _is_slow(start - source) and (target is None or not _is_slow(target - start)):
            return start
    return _STARTS[-1]


def clear_of(memory: np.ndarray, target: int) -> np.ndarray:
    """Bytes from their start on, or from the 64th on where it would be slow to write them to this place of a file.

    Example:
        >>> memory = from_a_page_on(1 << 20)
        >>> len(memory) - len(clear_of(memory, 4096)), len(memory) - len(clear_of(memory, 4096 + 8))
        (0, 64)
    """
    return memory[_STARTS[1] :] if _is_slow(target - _address(memory)) else memory


def _is_slow(further: int) -> bool:
    return 0 < further % _PAGE < 32


def same(first: memoryview | np.ndarray, second: memoryview | np.ndarray) -> bool:
    """Whether two buffers hold the same bytes.

    C's memcmp lets go of Python's lock and writes nothing; NumPy's == makes an array of bools, and takes twice as long
    (measured, where threads compare pieces of 2 MiB); Python's own on memoryviews takes 35 times as long.

    Args:
        first: in C order.
        second: likewise.

    Example:
        >>> same(np.arange(3), np.arange(3)), same(np.arange(3), np.arange(4)), same(np.empty(0), np.empty(0))
        (True, False, True)
    """
    if first.nbytes != second.nbytes or not first.nbytes:
        return first.nbytes == second.nbytes
    one, other = (np.frombuffer(piece, np.uint8) for piece in (first, second))
    return bool(_C.memcmp(_address(one), _address(other), one.size) == 0)


class Scratch:
    """Memory to work in: the same each time it is asked for, since fresh pages cost time."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)
        self._lines: tuple[Any, list[memoryview]] = (None, [])
        self._beside: Scratch | None = None

    @property
    def beside(self) -> Scratch:
        """More of it, for who needs two at a time."""
        if self._beside is None:
            self._beside = Scratch()
        return self._beside

    def take(self, size: int, start: int = 0) -> np.ndarray:
        """So many bytes; what was taken before is no longer valid.

        Args:
            size: how many.
            start: how far into a page the first of many is, as ``start_between`` says.
        """
        if len(self._memory) < start + size:
            self._lines = (None, [])
            self._memory = np.empty(0, np.uint8)  # let go of it before there is more
            self._memory = from_a_page_on(size + _STARTS[-1])
        return self._memory[start : start + size]

    def lines(self, matrix: np.ndarray, start: int, stop: int) -> list[memoryview]:
        """The bytes of some rows of a matrix in this memory, each by itself.

        Those of the last matrix are kept, as long as they are not too many: the next one often lies where it lay.
        """
        if len(matrix) > _MOST_LINES:
            return _lines(matrix[start:stop])
        place = (matrix.__array_interface__["data"], matrix.shape, matrix.strides, matrix.itemsize)
        if self._lines[0] != place:
            self._lines = (place, _lines(matrix))
        return self._lines[1][start:stop]


def _lines(matrix: np.ndarray) -> list[memoryview]:
    return [memoryview(line.view(np.uint8)) for line in matrix]


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])
