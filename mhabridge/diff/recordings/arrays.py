"""Small things about arrays of any dtype that the comparison of recordings needs everywhere."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from mhabridge import dtypes


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
