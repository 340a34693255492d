"""The transposing kernel beside ``np.ascontiguousarray(W.T)``, and beside a plain copy of as many bytes.

All three take turns; given are the median of the paired ratios and the ratio of the shortest times. The matrix and what
is written to start with a page, as the memory of conversions does.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np

from mhabridge.checkpoint.storage import blocks
from mhabridge.checkpoint.storage.memory import from_a_page_on

PAIRS = 31
LIMIT = 5.0  # times as fast, for float32
SIZES = [(1024, 1024), (4096, 4096), (4096, 1000)]


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def filled(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    kind = np.dtype(dtype)
    made = from_a_page_on(math.prod(shape) * kind.itemsize).view(kind).reshape(shape)
    made[...] = np.random.RandomState(0).randint(0, 256, shape)
    return made


def compare(dtype: str, shape: tuple[int, int]) -> tuple[float, float, float, float]:
    """How many times as fast as NumPy (median, shortest), how many times as slow as a copy; milliseconds."""
    matrix, out, copied = (filled(dtype, size) for size in (shape, shape[::-1], shape))
    scratch = filled("uint8", (blocks.scratch_size(shape[1], matrix.itemsize),))
    rounds = [
        (
            seconds(lambda: np.ascontiguousarray(matrix.T)),
            seconds(lambda: blocks.transpose_into(matrix, out, scratch)),
            seconds(lambda: np.copyto(copied, matrix)),
        )
        for _ in range(PAIRS)
    ]
    assert np.array_equal(out, matrix.T)
    theirs, ours, copies = (min(column) for column in zip(*rounds, strict=True))
    paired = statistics.median(numpy / kernel for numpy, kernel, _ in rounds)
    return paired, theirs / ours, ours / copies, ours * 1e3


def main() -> int:
    print(f"{'dtype':<8} {'matrix':<11} {'x as fast as NumPy: median':>28} {'shortest':>9} {'x a copy':>9} {'ms':>8}")
    met = True
    for dtype in ("uint8", "uint16", "float32", "float64"):
        for shape in SIZES:
            paired, shortest, copies, milliseconds = compare(dtype, shape)
            print(
                f"{dtype:<8} {'x'.join(map(str, shape)):<11} {paired:>28.1f} {shortest:>9.1f} {copies:>9.1f} "
                f"{milliseconds:>8.2f}",
                flush=True,
            )
            met = met and (dtype != "float32" or shape[1] == 1000 or max(paired, shortest) >= LIMIT)
    print(f"float32, 1024 x 1024 and 4096 x 4096: at least {LIMIT:.0f} x {'met' if met else 'NOT met'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
