"""Whether two arrays have the same bits, or would but for their floating dtypes: then only a conversion is between."""

from __future__ import annotations

import numpy as np

from mhabridge import dtypes
from mhabridge.checkpoint.storage.memory import same

_FIRST = 16  # elements that are looked at first: most tensors that differ do there
_SMALLEST = {"float16": -14, "bfloat16": -126}  # exponent of the smallest normal number


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays have one dtype and the same bits.

    Example:
        >>> same_bits(np.float32([0.0]), np.float32([-0.0])), same_bits(np.float32([1]), np.float32([1]))
        (False, True)
    """
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    x, y = np.ascontiguousarray(a), np.ascontiguousarray(b)
    if x.reshape(-1)[:_FIRST].tobytes() != y.reshape(-1)[:_FIRST].tobytes():
        return False
    return same(x.reshape(-1).view(np.uint8), y.reshape(-1).view(np.uint8))


def are_copies(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two arrays of one shape and different floating dtypes hold the same numbers, as far as their dtypes can.

    The wider one, rounded to the narrower, is the other, bit for bit. Neither float16 nor bfloat16 is the wider:
    of these two there has to be a number, for each pair, of which both are the rounded value.

    Example:
        >>> are_copies(np.float32([0.1]), np.float16([0.1])), are_copies(np.float32([0.1]), np.float16([0.2]))
        (True, False)
    """
    names = dtypes.name_of(first), dtypes.name_of(second)
    if names[0] == names[1] or not all(name in dtypes.FLOATS for name in names):
        return False
    if set(names) == {"float16", "bfloat16"}:
        return _of_the_same_numbers(first, second)
    narrow, wide = sorted((first, second), key=lambda array: -dtypes.UNIT_ROUNDOFF[dtypes.name_of(array)])
    if wide.dtype != np.float32 or narrow.dtype == dtypes.BFLOAT16_WORDS:
        rounded = np.asarray(dtypes.round_to(wide, dtypes.name_of(narrow)))
        return same_bits(dtypes.to_words(rounded), dtypes.to_words(narrow))
    with np.errstate(over="ignore", invalid="ignore"):  # rounded once, and three times as fast as through float64
        return same_bits(wide.astype(narrow.dtype), narrow)


def _of_the_same_numbers(first: np.ndarray, second: np.ndarray) -> bool:
    x, y = dtypes.to_float64(first), dtypes.to_float64(second)
    with np.errstate(invalid="ignore"):
        apart = np.abs(x - y)
        reach = _half_gap(x, dtypes.name_of(first)) + _half_gap(y, dtypes.name_of(second))
        return bool(np.all((apart <= reach) | (x == y) | (np.isnan(x) & np.isnan(y))))


def _half_gap(values: np.ndarray, dtype: str) -> np.ndarray:
    """Half the distance to the dtype's next number away from zero: so far off may be what was rounded to this one."""
    _, exponents = np.frexp(values)  # of numbers in [0.5, 1)
    lowest = _SMALLEST[dtype] + 1
    exponents = np.where(values == 0, lowest, np.maximum(exponents, lowest))
    return np.asarray(np.ldexp(dtypes.UNIT_ROUNDOFF[dtype], exponents - 1))
