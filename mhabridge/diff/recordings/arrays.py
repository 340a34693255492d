"""Small things about arrays of any dtype that the comparison of recordings needs everywhere."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from mhabridge import dtypes

BLOCKED = -9984.0  # what -1e4 is in bfloat16: less is meant as -inf in a mask


def float64(array: np.ndarray) -> np.ndarray:
    """As float64, whatever it is.

    Example:
        >>> float64(np.array([True, False])).tolist()
        [1.0, 0.0]
    """
    return dtypes.to_float64(array) if dtypes.name_of(array) in dtypes.FLOATS else array.astype(np.float64)


def coarsest(names: Iterable[str]) -> str:
    """The floating dtype with the largest unit roundoff; float32 where none is one.

    Example:
        >>> coarsest(["float32", "float16", "int64"])
        'float16'
    """
    floats = [name for name in names if name in dtypes.FLOATS]
    return max(floats, key=dtypes.UNIT_ROUNDOFF.__getitem__, default="float32")


def coarsest_of(arrays: Iterable[np.ndarray | None]) -> str:
    """The same of arrays."""
    return coarsest(dtypes.name_of(array) for array in arrays if array is not None)


def of_one_width(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two tensors of integers of different width in one that holds both; anything else as it is.

    Frameworks answer indices in integers of their own width, and an index is the same number in each.

    Example:
        >>> [array.dtype.name for array in of_one_width(np.int32([1]), np.int64([1]))]
        ['int64', 'int64']
    """
    if first.dtype == second.dtype or first.dtype.kind not in "iu" or second.dtype.kind not in "iu":
        return first, second
    common = np.result_type(first.dtype, second.dtype)
    return (first.astype(common), second.astype(common)) if common.kind in "iu" else (first, second)
