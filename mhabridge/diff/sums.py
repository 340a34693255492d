"""The sums over one piece of two tensors that ``Measure`` adds up, as fast as memory gives the numbers.

A checkpoint has hundreds of millions of elements, and float64 copies of them take longer to make than to read. So
numbers of at most 32 bits are subtracted and added up in float32, in rows of ``_ROW`` elements whose sums are added up
in float64: where two numbers are close their float32 difference is exact (Sterbenz), elsewhere it is off by less than
one part in 10^7, and the sums by a few such parts. The largest difference is taken again in float64, from its own two
numbers.
Whatever float32 cannot hold (NaN, infinity, squares beyond its range on either end) is left to the exact way.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from typing import Any

import numpy as np

from mhabridge import dtypes

FEWEST = 1024  # elements; for fewer the exact way is as fast
_ROW = 1024
_SMALLEST_SQUARES = 1e-24  # of a row: squares of its small elements would be lost beside it otherwise
_LARGEST_SQUARES = 1e36
_TINY = {np.dtype(np.float32): 1e-38, np.dtype(np.float64): 1e-300}


@dataclasses.dataclass(frozen=True)
class Sums:
    """Of one piece.

    Args:
        worst: the place of the largest difference.
        values: both, there.
        largest: that difference.
        sum_abs: of all absolute differences.
        max_rel: the largest of |a - b| / max(|a|, |b|).
        sum_rel: of these.
        dot: of the two.
        first: of the first with itself.
        second: likewise.
    """

    worst: int
    values: tuple[float, float]
    largest: float
    sum_abs: float
    max_rel: float
    sum_rel: float
    dot: float
    first: float
    second: float


def of_equal(a: np.ndarray) -> float | None:
    """The sum of squares of a piece, which is finite if this is a number.

    Args:
        a: one axis.

    Returns:
        None when it has to be taken the exact way.

    Example:
        >>> of_equal(np.full(5000, 2, np.float32)), of_equal(np.full(5000, np.nan, np.float32))
        (20000.0, None)
    """
    kind = _working(a.dtype, a.dtype)
    if kind is None or a.size < FEWEST:
        return None
    with np.errstate(all="ignore"):
        x = _as(a, kind, 0)
        (square,) = _products((x, x))
        return square if _all_seen(square, x) else None


def of(a: np.ndarray, b: np.ndarray, spent: bool = False) -> Sums | None:
    """The sums of two pieces.

    Args:
        a: one axis.
        b: likewise, as long.
        spent: whether nobody needs the arrays any more: they are then written over, which spares memory other arrays,
            unless None is returned.

    Returns:
        None when they have to be taken the exact way.

    Example:
        >>> a = np.arange(5000, dtype=np.float32)
        >>> found = of(a, a + np.float32(0.5))
        >>> found.largest, found.sum_abs, found.max_rel
        (0.5, 2500.0, 1.0)
    """
    kind = _working(a.dtype, b.dtype)
    if kind is None or a.size < FEWEST:
        return None
    with np.errstate(all="ignore"):
        x, y = _as(a, kind, 0), _as(b, kind, 1)
        first, second, dot = _products((x, x), (y, y), (x, y))
        if not (_all_seen(first, x) and _all_seen(second, y)):
            return None
        apart = _taken(2, kind, a.size)
        np.subtract(x, y, out=apart)
        np.abs(apart, out=apart)
        worst = int(apart.argmax())
        values = float(x[worst]), float(y[worst])
        larger, other = (_to_write(one, own, number, spent) for number, (one, own) in enumerate(((x, a), (y, b))))
        np.abs(x, out=larger)
        np.abs(y, out=other)
        np.maximum(larger, other, out=larger)
        max_rel = _relative(apart, larger, other)
        sum_abs, sum_rel = _totals(apart, other)
    largest = abs(values[0] - values[1])
    return Sums(worst, values, largest, sum_abs, max_rel, sum_rel, dot, first, second)


@functools.lru_cache(maxsize=256)
def _working(first: np.dtype[Any], second: np.dtype[Any]) -> np.dtype[Any] | None:
    """What holds every difference of two dtypes well enough."""
    found = [_width(one) for one in (first, second)]
    if None in found:
        return None
    return np.dtype(np.float64 if 64 in found else np.float32)


def _width(dtype: np.dtype[Any]) -> int | None:
    """Of the float that holds every number of a dtype; None where that is none of NumPy's."""
    if dtype == dtypes.BFLOAT16_WORDS or dtype.name in ("bfloat16", "float16", "float32"):
        return 32
    if dtype.kind in "iub" and dtype.itemsize <= 2:
        return 32
    return 64 if dtype.name == "float64" or (dtype.kind in "iu" and dtype.itemsize == 4) else None


_memory = threading.local()


def _taken(number: int, kind: np.dtype[Any], size: int) -> np.ndarray:
    """Memory of this thread, the same each time: fresh pages take longer than the sums."""
    kept: dict[Any, np.ndarray] = _memory.__dict__
    found = kept.get((number, kind.char))
    if found is None or found.size < size:
        found = kept[number, kind.char] = np.empty(size, kind)
    return found[:size]


def _as(a: np.ndarray, kind: np.dtype[Any], number: int) -> np.ndarray:
    """In the dtype that is worked in, which changes no value."""
    if a.dtype == kind:
        return a
    out = _taken(number, kind, a.size)
    if a.dtype.name == "bfloat16" or a.dtype == dtypes.BFLOAT16_WORDS:  # its bits are the upper half of a float32's
        words = np.ascontiguousarray(a).view(np.uint16)
        bits = out.view(np.uint32) if kind == np.float32 else _taken(number, np.dtype(np.float32), a.size).view("u4")
        np.copyto(bits, words)
        np.left_shift(bits, 16, out=bits)
        if kind != np.float32:
            np.copyto(out, bits.view(np.float32))
        return out
    np.copyto(out, a)
    return out


def _to_write(x: np.ndarray, own: np.ndarray, number: int, spent: bool) -> np.ndarray:
    """Memory for what is made of x: its own, unless that is the caller's."""
    return x if spent or x is not own else _taken(number, x.dtype, x.size)


def _all_seen(square: float, x: np.ndarray) -> bool:
    """Whether a sum of squares says that all is finite and that nothing was lost."""
    if x.dtype == np.float64:
        return bool(np.isfinite(square)) and (square > 1e-200 or not x.any())
    return _SMALLEST_SQUARES < square < _LARGEST_SQUARES or (square == 0.0 and not x.any())


def _products(*pairs: tuple[np.ndarray, np.ndarray]) -> list[float]:
    """Dot products; row by row, since BLAS would start threads of its own for more."""
    size = pairs[0][0].size
    whole = size // _ROW * _ROW
    rows = np.empty((len(pairs), size // _ROW, 1, 1), pairs[0][0].dtype)
    for out, (x, y) in zip(rows, pairs, strict=True):
        np.matmul(x[:whole].reshape(-1, 1, _ROW), y[:whole].reshape(-1, _ROW, 1), out=out)
    return _added_up(rows, [float(np.dot(x[whole:], y[whole:])) for x, y in pairs] if whole < size else [])


def _totals(*arrays: np.ndarray) -> list[float]:
    size = arrays[0].size
    whole = size // _ROW * _ROW
    rows = np.empty((len(arrays), size // _ROW), arrays[0].dtype)
    for out, x in zip(rows, arrays, strict=True):
        np.einsum("ij->i", x[:whole].reshape(-1, _ROW), out=out)  # more than twice as fast as sum
    return _added_up(rows, [float(x[whole:].sum()) for x in arrays] if whole < size else [])


def _added_up(rows: np.ndarray, rest: list[float]) -> list[float]:
    """In float64: the sums of rows, and of what is left after them."""
    found: list[float] = np.add.reduce(rows.reshape(len(rows), -1), axis=1, dtype=np.float64).tolist()
    return [one + other for one, other in zip(found, rest, strict=True)] if rest else found


def _relative(apart: np.ndarray, larger: np.ndarray, out: np.ndarray) -> float:
    """The relative differences and the largest of them; where both numbers are 0, theirs is 0."""
    np.divide(apart, larger, out=out)
    largest = float(np.maximum.reduce(out))
    if largest != largest:  # 0 / 0 somewhere
        np.maximum(larger, _TINY[larger.dtype], out=larger)
        np.divide(apart, larger, out=out)
        largest = float(np.maximum.reduce(out))
    return largest
