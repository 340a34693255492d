"""How far a correct implementation may be off: what rounding alone does to this very computation.

There is no magic tolerance. The reference's own formulas are computed again in the dtype under judgement, SAMPLES
times, each with other rounding errors (Monte Carlo arithmetic, Parker 1997): every matrix product gets a random error
of the size that adding up its terms one after another and storing the result in that dtype would give, every
exponential one of the size that the framework's exp has, the softmax that of storing it; all else is rounded as NumPy
does. What a product reads from below the smallest normal number has lost up to half of the fixed step between numbers
there when it was stored, whatever stored it, so in float16, whose step of 2**-24 gradients do reach, it gets a random
error of that size first: such errors do not shrink with the values, and whatever large they meet next magnifies them.
How these samples scatter around float64 is what the dtype and this computation justify. It bounds an answer in two
ways:

- each element: BIAS * |mean of the samples - exact| + SPREAD * (standard deviation of the samples in its row; for the
  gradient of a weight in its row or its column, whichever is larger: an input feature that is much larger than the
  others has a column of its own size)
  + FLOOR * u * (largest magnitude in the row), with u the dtype's unit roundoff and a row the last axis (for a gradient
  the largest magnitude in the tensor: whole rows of one cancel to zero; and never less than the smallest normal number,
  below which the dtype's numbers lie no closer, and all samples may round to one of them);
- the mean absolute error of the tensor: MEAN * (mean of the samples' mean errors) + MEAN_SPREAD * (their standard
  deviation) + u * (mean magnitude).

Both are doubled for float64, in which the reference itself rounds as much as the backend does.

An output row's bound comes from that row alone, so a large batch element excuses nothing in a small one. The mean
hardly varies in a large tensor, so there it tells a small systematic fault from noise where single elements do not; in
a tensor of a few elements it varies much, and its bound says so. `benchmarks/judging.py` shows how much of the bounds
honest frameworks use.

The error of a sum of k products x_i y_i, added up with unit roundoff u, has a standard deviation of about
u/2 sqrt(k) sqrt(sum (x_i y_i)^2 + (sum x_i y_i)^2): the partial sums grow like sqrt(k) where signs vary, and like k
where they do not (Higham and Mary, 2019, "A new approach to probabilistic rounding error analysis"). Blocked sums and
fused multiply-adds do better.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np

from mhabridge import dtypes, mapping, reference
from mhabridge.backends.running import Prepared, restore
from mhabridge.calls import Result
from mhabridge.reference import Arithmetic
from mhabridge.weights import MHAWeights

SAMPLES = 12
BIAS = 1.5
SPREAD = 12.0
MEAN = 1.5
MEAN_SPREAD = 5.0
FLOOR = 4.0
SMALLEST_NORMAL = {"float16": 2.0**-14, "bfloat16": 2.0**-126, "float32": 2.0**-126, "float64": 2.0**-1022}
# How far apart the numbers below that lie, where gradients get there: the other dtypes' begin at 1e-38 and less.
SUBNORMAL_STEP = {"float16": 2.0**-24}


@dataclasses.dataclass(frozen=True)
class Bound:
    """The errors that rounding justifies in one tensor.

    Args:
        each: of single elements; its shape broadcasts to the tensor's.
        mean: of the mean absolute error.
    """

    each: np.ndarray
    mean: float


def named(result: Result) -> dict[str, np.ndarray]:
    """A result's tensors by name; gradients as "grads.query" and so on."""
    tensors = {"output": result.output}
    if result.attn_weights is not None:
        tensors["attn_weights"] = result.attn_weights
    tensors.update({f"grads.{name}": grad for name, grad in result.grads.items()})
    return tensors


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """What a framework is known to do with a dtype, beyond rounding each operation; from ``[[accuracy]]`` in its table.

    IEEE 754 asks for no accuracy of exp, and says nothing of what a matrix product adds up in. Both are measured facts
    about a framework, not a looser tolerance for all.

    Args:
        dtype: which one.
        exp: the largest relative error of its exp, in units of roundoff.
        accumulate: what it adds up products in; half precision is added up in float32 unless noted.
    """

    dtype: str
    exp: float = 1.0
    accumulate: str = ""

    @property
    def sums(self) -> str:
        """The dtype of sums."""
        return self.accumulate or ("float32" if self.dtype in ("float16", "bfloat16") else self.dtype)


def accuracy(framework: str, dtype: str) -> Accuracy:
    """A framework's accuracy in a dtype.

    Example:
        >>> accuracy("torch", "float16").sums, accuracy("megengine", "float16").sums
        ('float32', 'float16')
    """
    for entry in mapping.table(framework).get("accuracy", []):
        if entry["dtype"] == dtype:
            return Accuracy(**entry)
    return Accuracy(dtype)


def bounds(
    prepared: Prepared, weights: MHAWeights, exact: dict[str, np.ndarray], expected: Accuracy
) -> dict[str, Bound]:
    """What rounding justifies, for each tensor.

    Args:
        prepared: the call.
        weights: the layer's parameters.
        exact: the float64 reference's tensors, in the user's shapes.
        expected: the dtype that the backends compute in, and what is known of them.
    """
    arithmetic = noisy(expected, np.random.default_rng(0))
    samples = []
    for _ in range(SAMPLES):
        result = reference.attend(prepared.spec, weights, prepared.call, arithmetic=arithmetic)
        samples.append(named(restore(prepared, result)))
    return bounds_of(exact, samples, expected.dtype)


def bounds_of(exact: dict[str, np.ndarray], samples: list[dict[str, np.ndarray]], dtype: str) -> dict[str, Bound]:
    """What rounding justifies, for each tensor, from samples of the same computation with other rounding errors.

    Args:
        exact: the tensors by name, float64.
        samples: the same ones, each time with other errors (``noisy``); at least two.
        dtype: that they were computed in.
    """
    unit = dtypes.UNIT_ROUNDOFF[dtype]
    found = {}
    for name, array in exact.items():
        magnitude = np.where(np.isfinite(array), np.maximum(np.abs(array), SMALLEST_NORMAL[dtype]), 0.0)
        largest = magnitude.max(initial=0.0) if name.startswith("grads.") else _rows(np.max, magnitude)
        both_ways = name.startswith("grads.") and name.endswith("_weight")
        drawn = [sample[name] for sample in samples]
        bound = _bound(array, drawn, FLOOR * unit * largest, unit * magnitude, both_ways)
        found[name] = Bound(2.0 * bound.each, 2.0 * bound.mean) if dtype == "float64" else bound
    return found


def _rows(reduce: Callable[..., np.ndarray], array: np.ndarray) -> np.ndarray:
    """Reduce the last axis, keeping it; an empty row has nothing to reduce."""
    return reduce(array, axis=-1, keepdims=True) if array.size else np.zeros(array.shape)


def _bound(
    exact: np.ndarray, samples: list[np.ndarray], floor: np.ndarray, units: np.ndarray, both_ways: bool
) -> Bound:
    if not exact.size:
        return Bound(np.zeros(exact.shape), 0.0)
    errors = np.stack([dtypes.to_float64(sample) for sample in samples]) - exact
    # What overflows or is NaN in a sample says nothing about rounding.
    errors = np.where(np.isfinite(errors), errors, 0.0)
    bias = errors.mean(axis=0)
    variance = np.square(errors - bias).sum(axis=0) / (len(samples) - 1)
    scatter = _rows(np.mean, variance)
    if both_ways:
        scatter = np.maximum(scatter, variance.mean(axis=0, keepdims=True))
    each = BIAS * np.abs(bias) + SPREAD * np.sqrt(scatter) + floor
    means = np.abs(errors).reshape(len(samples), -1).mean(axis=1)
    mean = MEAN * means.mean() + MEAN_SPREAD * means.std(ddof=1) + units.mean()
    return Bound(each, float(mean))


def noisy(expected: Accuracy, rng: np.random.Generator) -> Arithmetic:
    """Arithmetic in a dtype whose products and exponentials carry random errors of the size that rounding gives them.

    Example:
        >>> ones = np.ones((32, 4096), "float16")
        >>> half = noisy(Accuracy("float16", accumulate="float16"), np.random.default_rng(0)).matmul(ones, ones.T)
        >>> single = noisy(Accuracy("float16"), np.random.default_rng(0)).matmul(ones, ones.T)
        >>> float(np.std(half.astype("float64"))) > 30 > 3 > float(np.std(single.astype("float64")))
        True
    """
    unit, sums = dtypes.UNIT_ROUNDOFF[expected.dtype], dtypes.UNIT_ROUNDOFF[expected.sums]
    step, smallest = SUBNORMAL_STEP.get(expected.dtype, 0.0), SMALLEST_NORMAL[expected.dtype]
    beside = np.random.default_rng(1)  # of its own: where nothing is subnormal the other errors stay the same

    def read(array: np.ndarray) -> np.ndarray:
        values = dtypes.to_float64(array)
        subnormal = np.abs(values) < (smallest if step else 0.0)
        count = int(subnormal.sum())
        if count:
            values = np.array(values)
            # Also zeros, which may be what is left of something smaller; two units, as in ``store``.
            values[subnormal] += step * beside.uniform(-1.0, 1.0, count)
        return values

    def store(values: np.ndarray) -> np.ndarray:
        # Two units: with one, a softmax of exactly 1 would keep its value in most samples, and hide how its rounding
        # spoils a gradient that cancels.
        error = 2.0 * unit * rng.uniform(-1.0, 1.0, values.shape)
        return dtypes.round_to(dtypes.to_float64(values) * (1.0 + error), expected.dtype)

    def matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        x, y = read(a), read(b)
        product = x @ y
        variance = np.square(x) @ np.square(y) + np.square(product)
        adding = 0.5 * sums * math.sqrt(a.shape[-1]) * np.sqrt(variance) * rng.standard_normal(product.shape)
        return store(product + adding)

    def exp(array: np.ndarray) -> np.ndarray:
        error = expected.exp * unit * rng.uniform(-1.0, 1.0, array.shape)
        return dtypes.round_to(np.exp(dtypes.to_float64(array)) * (1.0 + error), expected.dtype)

    return Arithmetic(functools.partial(dtypes.round_to, dtype=expected.dtype), matmul, exp, store)
