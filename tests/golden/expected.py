"""What is in the golden files, by formulas; runs with NumPy alone, also on Python 3.8."""

from __future__ import annotations

import numpy as np


def matrix(rows=3, columns=4):
    """Eighths from -1 on: exact in every float, and no row or column is like another."""
    return (np.arange(rows * columns, dtype="float64") / 8 - 1).reshape(rows, columns)


# name -> (dtype, values as float64)
STATE = {
    "weight": ("float32", matrix()),
    "tied": ("float32", matrix()),
    "transposed": ("float32", matrix().T),
    "rows": ("float32", matrix()[1:]),
    "column": ("float32", matrix()[:, 1]),
    "half": ("float16", matrix(2, 3)),
    "bfloat": ("bfloat16", matrix(2, 3)),
    "double": ("float64", matrix(2, 3) / 3),
    "int8": ("int8", np.arange(-3.0, 3)),
    "uint8": ("uint8", np.arange(250.0, 256)),
    "int16": ("int16", np.arange(-300.0, 300, 100)),
    "int32": ("int32", np.arange(-3.0, 3) * 100000),
    "int64": ("int64", np.arange(-3.0, 3) * 2**40),
    "bool": ("bool", np.array([1.0, 0, 0, 1, 1])),
    "scalar": ("float32", np.array(2.5)),
    "empty": ("float32", np.zeros((0, 3))),
    "parameter": ("float32", matrix(4, 2) * 2),
}
TIES = ("weight", "tied", "transposed", "rows", "column")  # one storage

# A checkpoint with more than the state dict, and a whole module.
NESTED = {"fc.weight": ("float32", matrix(3, 2)), "fc.bias": ("float32", matrix(1, 3)[0])}
MODULE = dict(NESTED, **{"norm.running_mean": ("float32", matrix(1, 3)[0] + 1)})
EPOCH, BEST, BETAS, RUN = 3, 0.625, [0.5, 0.25], "first run"

# What plain NumPy pickles hold.
ARRAYS = {
    "c": ("float32", matrix()),
    "fortran": ("float32", matrix(2, 5)),
    "big": ("float32", matrix(2, 2)),
    "big_ints": ("int16", np.arange(-300.0, 300, 100)),
    "scalar": ("float64", np.array(0.375)),
    "empty": ("float32", np.zeros((2, 0))),
    "bytes": ("uint8", np.arange(0.0, 256)),
    "half": ("float16", matrix(2, 3)),
    "bool": ("bool", np.array([1.0, 0, 1])),
    "complex": ("complex64", matrix(2, 2)),
}


def numpy_arrays():
    """``ARRAYS`` as NumPy arrays, in all memory orders and byte orders."""
    arrays = {name: np.array(values, dtype) for name, (dtype, values) in ARRAYS.items()}
    arrays["fortran"] = np.asfortranarray(arrays["fortran"])
    for name in ("big", "big_ints"):
        arrays[name] = arrays[name].astype(arrays[name].dtype.newbyteorder(">"))
    return arrays
