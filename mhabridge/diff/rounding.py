"""How far a correct implementation may be off: what rounding alone does to this very computation.

There is no magic tolerance. The reference's own formulas are computed once more in the dtype under judgement, with the
plainest arithmetic there is: every product and every partial sum rounded, one term after another. This is done twice:
once with the numbers as they are, and once with every input and weight moved by up to one and a half units of
roundoff (Monte Carlo arithmetic, Parker 1997), which shows how sensitive the result is. The distance of these two from
float64 is what the dtype and this computation justify. It bounds an answer in two ways:

- each element: SAFETY * (largest distance in its row, at least the median row's + u * largest magnitude in the row);
- the mean over the tensor: MEAN_SAFETY * (mean distance + u * mean magnitude),

with u the dtype's unit roundoff and a row the last axis; both are GRADIENT_SAFETY times as large for gradients, whose
backward formulas differ between frameworks (the gradient of k_bias is zero in exact arithmetic, so there every digit is
rounding). The factors cover what two samples cannot: another order of summation, another exp. The mean hardly varies
between honest implementations, so it tells a small systematic fault from noise where single elements do not. Measured
over the conformance cases, PyTorch, MindSpore and MegEngine stay below half of both bounds; a swapped head, a
lost bias or an inverted mask is a multiple of them, in any dtype.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from mhabridge import dtypes, mapping, reference
from mhabridge.backends.running import Prepared, restore
from mhabridge.calls import Result
from mhabridge.reference import Arithmetic
from mhabridge.weights import MHAWeights

SAFETY = 6.0
MEAN_SAFETY = 2.0
GRADIENT_SAFETY = 2.0


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
    samples = []
    for arithmetic in (rounded(expected), rounded(expected, np.random.default_rng(0))):
        result = reference.attend(prepared.spec, weights, prepared.call, arithmetic=arithmetic)
        samples.append(named(restore(prepared, result)))
    found = {}
    for name, array in exact.items():
        factor = GRADIENT_SAFETY if name.startswith("grads.") else 1.0
        found[name] = _bound(array, [sample[name] for sample in samples], expected.dtype, factor)
    return found


def _bound(exact: np.ndarray, samples: list[np.ndarray], dtype: str, factor: float) -> Bound:
    if not exact.size:
        return Bound(np.zeros(exact.shape), 0.0)
    distance = np.zeros(exact.shape)
    for sample in samples:
        off = np.abs(dtypes.to_float64(sample) - exact)
        # What overflows or is NaN here says nothing about rounding; the row keeps the others' bound.
        distance = np.maximum(distance, np.where(np.isfinite(off), off, 0.0))
    magnitude = np.where(np.isfinite(exact), np.abs(exact), 0.0)
    unit = dtypes.UNIT_ROUNDOFF[dtype]
    rows, largest = (np.max(array, axis=-1, keepdims=True) for array in (distance, magnitude))
    each = factor * SAFETY * (np.maximum(rows, np.median(rows)) + unit * largest)
    return Bound(each, float(factor * MEAN_SAFETY * (distance.mean() + unit * magnitude.mean())))


def rounded(expected: Accuracy, rng: np.random.Generator | None = None) -> Arithmetic:
    """Arithmetic that rounds after every operation.

    With ``rng`` it also nudges what comes in by up to 1.5 units of roundoff, and every exponential by its error.

    Example:
        >>> ones = np.ones((1, 4096), "float16")
        >>> float(rounded(Accuracy("float16", accumulate="float16")).matmul(ones, ones.T)[0, 0])  # 2048 + 1 is 2048
        2048.0
        >>> float(rounded(Accuracy("float16")).matmul(ones, ones.T)[0, 0])
        4096.0
    """
    unit = dtypes.UNIT_ROUNDOFF[expected.dtype]

    def nudged(values: np.ndarray, size: float) -> np.ndarray:
        if rng is None:
            return values
        return np.asarray(values * (1.0 + size * unit * rng.uniform(-1.0, 1.0, values.shape)))

    def cast(array: np.ndarray) -> np.ndarray:
        return dtypes.round_to(nudged(dtypes.to_float64(array), 1.5), expected.dtype)

    def exp(array: np.ndarray) -> np.ndarray:
        return dtypes.round_to(nudged(np.exp(dtypes.to_float64(array)), expected.exp), expected.dtype)

    return Arithmetic(cast, functools.partial(_one_by_one, work=dtypes.numpy_dtype(expected.sums)), exp)


def _one_by_one(a: np.ndarray, b: np.ndarray, work: np.dtype) -> np.ndarray:
    """a @ b, adding one product after another in ``work``."""
    left, right = a.astype(work), b.astype(work)
    shape = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    total = np.zeros((*shape, a.shape[-2], b.shape[-1]), work)
    for k in range(a.shape[-1]):
        total += left[..., :, k, None] * right[..., k, None, :]
    return total.astype(a.dtype)
