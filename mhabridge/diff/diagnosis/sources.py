"""Parameters that are read row by row or column by column, wherever they lie, and what tells their rows apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from mhabridge import dtypes


class Source(Protocol):
    """One parameter, read as often as is needed."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter: (out, in), or (out,)."""
        ...

    @property
    def dtype(self) -> str:
        """One of ``dtypes.FLOATS``, or the search leaves it out."""
        ...

    def blocks(self, turned: bool = False) -> Iterator[np.ndarray]:
        """Its rows, or its columns as rows, some at a time: (any number, columns)."""
        ...


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """A parameter that is an array.

    Args:
        array: (out, in) or (out,).
    """

    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return self.array.shape

    @property
    def dtype(self) -> str:
        """Of the array."""
        return dtypes.name_of(self.array)

    def blocks(self, turned: bool = False) -> Iterator[np.ndarray]:
        """All of it at once."""
        rows = self.array if self.array.ndim == 2 else self.array.reshape(len(self.array), -1)
        yield rows.T if turned else rows


def hashes(block: np.ndarray, narrow: str, negated: bool) -> list[int]:
    """One number for each row, of its values rounded to the narrower dtype; zeros have no sign."""
    values = block if block.dtype.name == "float64" else block.astype(np.float32)
    values = (0.0 - values if negated else values + 0.0).astype(values.dtype)
    rounded = np.ascontiguousarray(_narrowed(values, narrow))
    row = rounded.shape[1] * rounded.itemsize
    if row <= 8 and rounded.shape[1] == 1:
        return rounded.view(f"u{row}").ravel().tolist()  # type: ignore[no-any-return]
    data = rounded.tobytes()
    return [hash(data[start : start + row]) for start in range(0, len(data), row)] if row else []


def _narrowed(values: np.ndarray, narrow: str) -> np.ndarray:
    kind = dtypes.numpy_dtype(narrow)
    if values.dtype == kind or dtypes.UNIT_ROUNDOFF[narrow] <= dtypes.UNIT_ROUNDOFF[values.dtype.name]:
        return values.astype(kind)
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(kind) if values.dtype == np.float32 else dtypes.round_to(values, narrow)


def order_of(own: Sequence[int], rows: Sequence[int]) -> list[int] | None:
    """For each row its place among others, when each is there once and all are used; None otherwise."""
    if len(own) != len(rows) or (own and own[0] not in rows):  # before much is made of many numbers
        return None
    place = {row: number for number, row in enumerate(rows)}
    if len(place) != len(rows) or not all(map(place.__contains__, own)):
        return None
    found = [place[row] for row in own]
    return found if len(set(found)) == len(found) else None


def together(first: Iterator[np.ndarray], second: Iterator[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The same rows of both, whatever the sizes of their blocks."""
    one = other = np.empty((0, 0))
    while True:
        one = one if len(one) else next(first, one)
        other = other if len(other) else next(second, other)
        count = min(len(one), len(other))
        if not count:
            return
        yield one[:count], other[:count]
        one, other = one[count:], other[count:]
