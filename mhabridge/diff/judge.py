"""One tensor beside the float64 reference: how far off, where, and whether rounding explains it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from mhabridge import dtypes
from mhabridge.diff.rounding import Bound


@dataclasses.dataclass(frozen=True)
class Distance:
    """One tensor beside the float64 reference.

    Args:
        verdict: "equal" (the reference rounded to the dtype, bit for bit), "rounding" (inside both bounds), "off"
            (outside one), or "broken" (missing, another shape or dtype, NaN or inf where the reference has none).
        reason: in words, for "off" and "broken"; for others what is worth knowing.
        max_error: largest absolute error, over the finite elements; NaN when nothing can be compared.
        mean_error: mean absolute error.
        times_bound: the largest error as a multiple of its bound; at most 1 passes.
        times_mean_bound: the mean error as a multiple of its bound; at most 1 passes.
        index: of the element with the largest multiple.
        value: there.
        expected: there.
        bound: there.
    """

    verdict: str
    reason: str = ""
    max_error: float = float("nan")
    mean_error: float = float("nan")
    times_bound: float = float("nan")
    times_mean_bound: float = float("nan")
    index: tuple[int, ...] | None = None
    value: float = float("nan")
    expected: float = float("nan")
    bound: float = float("nan")

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, as JSON can hold them: NaN (nothing to compare) becomes None, an infinity a word."""
        return {name: plain_number(item) for name, item in dataclasses.asdict(self).items()}

    @property
    def ok(self) -> bool:
        """Whether rounding explains all of the difference."""
        return self.verdict in ("equal", "rounding")


def plain_number(item: Any) -> Any:
    """A value that JSON can hold: NaN becomes None, an infinity "inf" or "-inf".

    Example:
        >>> [plain_number(x) for x in (1.5, float("nan"), float("-inf"), "text")]
        [1.5, None, '-inf', 'text']
    """
    if not isinstance(item, float) or math.isfinite(item):
        return item
    return None if math.isnan(item) else str(item)


def judge(array: np.ndarray | None, exact: np.ndarray, bound: Bound, dtype: str = "") -> Distance:
    """Hold a tensor against the float64 reference.

    Nothing is broadcast, and no NaN passes unless the reference has it there.

    Args:
        array: the tensor; None if it is missing.
        exact: the reference's.
        bound: what rounding justifies.
        dtype: that the tensor should have; "" for any floating one.

    Example:
        >>> bound = Bound(np.array([1e-6]), 1e-6)
        >>> judge(np.float32([1.0, 2.5]), np.array([1.0, 2.0]), bound).verdict
        'off'
        >>> judge(np.float32([[1.0]]), np.array([1.0]), bound).reason
        'shape (1, 1), expected (1,)'
    """
    if array is None:
        return Distance("broken", "missing")
    if array.shape != exact.shape:
        return Distance("broken", f"shape {array.shape}, expected {exact.shape}")
    if dtypes.name_of(array) not in ((dtype,) if dtype else dtypes.FLOATS):
        return Distance("broken", f"dtype {dtypes.name_of(array)}, expected {dtype or 'a float dtype'}")
    values = dtypes.to_float64(array)
    strange = np.isfinite(values) != np.isfinite(exact)
    strange |= np.isnan(values) != np.isnan(exact)
    strange |= np.isinf(exact) & (values != exact) & ~np.isnan(values)
    if strange.any():
        return _broken(values, exact, strange)
    return _measure(array, values, exact, bound)


def _broken(values: np.ndarray, exact: np.ndarray, strange: np.ndarray) -> Distance:
    index = tuple(int(axis[0]) for axis in np.nonzero(strange))
    reason = f"{values[index]:g} where the reference is {exact[index]:g} ({int(strange.sum())} such elements)"
    return Distance("broken", reason, index=index, value=float(values[index]), expected=float(exact[index]))


def _measure(array: np.ndarray, values: np.ndarray, exact: np.ndarray, bound: Bound) -> Distance:
    finite = np.isfinite(exact)
    if not finite.any():
        return Distance("equal", _expected_nan(exact), 0.0, 0.0, 0.0, 0.0)
    each = np.broadcast_to(bound.each, exact.shape)
    error = np.where(finite, np.abs(np.where(finite, values, 0.0) - np.where(finite, exact, 0.0)), 0.0)
    mean = float(error[finite].mean())
    times = _ratio(error, each)
    times_mean = float(_ratio(np.asarray(mean), np.asarray(bound.mean)))
    worst = np.unravel_index(int(np.argmax(np.where(np.isnan(times), np.inf, times))), times.shape)
    verdict, reason = _verdict(float(times[worst]), times_mean)
    nearest = dtypes.to_float64(dtypes.round_to(exact, dtypes.name_of(array)))
    return Distance(
        "equal" if not reason and np.array_equal(values, nearest, equal_nan=True) else verdict,
        reason or _expected_nan(exact),
        float(error.max()),
        mean,
        float(times[worst]),
        times_mean,
        tuple(int(i) for i in worst),
        float(values[worst]),
        float(exact[worst]),
        float(each[worst]),
    )


def _expected_nan(exact: np.ndarray) -> str:
    """What is said of NaN that belongs where it is."""
    count = int(np.isnan(exact).sum())
    return f"{count} elements are NaN, as in the reference (fully masked rows)" if count else ""


def _ratio(error: np.ndarray, bound: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(error == 0.0, 0.0, error / bound)


def _verdict(times: float, times_mean: float) -> tuple[str, str]:
    if not times <= 1.0:
        return "off", f"an element is {times:.3g} times as far off as rounding justifies"
    if not times_mean <= 1.0:
        return "off", f"the mean error is {times_mean:.3g} times what rounding justifies"
    return "rounding", ""
