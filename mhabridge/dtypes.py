"""The four floating dtypes of weights and inputs, and how bfloat16 is held.

NumPy has no bfloat16. In public an array of it is ``ml_dtypes.bfloat16``; where only NumPy is installed (inside a
worker) it is *words*: the 16 raw bits in the structured dtype ``BFLOAT16_WORDS``. Structured arrays index, transpose,
reshape and concatenate like any other, so layouts work on them bit for bit, and nothing can add them up by mistake.

This module also runs inside workers (Python 3.8, NumPy 1.23), so it never imports ``ml_dtypes`` unless asked for it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mhabridge.errors import ArgumentError, ArgumentTypeError

FLOATS = ("float16", "bfloat16", "float32", "float64")
BFLOAT16_WORDS = np.dtype([("bfloat16", "<u2")])

# Unit roundoff: half the gap between 1 and the next number (IEEE 754; bfloat16 has 8 significant bits).
UNIT_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
LARGEST = {
    "float16": 65504.0,
    "bfloat16": 3.3895313892515355e38,
    "float32": 3.4028234663852886e38,
    "float64": 1.7976931348623157e308,
}


def canonical(dtype: Any, subject: str = "dtype") -> str:
    """The canonical name of a dtype given as a string, a NumPy dtype or a framework's own dtype object.

    Raises:
        ArgumentError: the dtype is not one of ``FLOATS``.
        ArgumentTypeError: the object does not name a dtype at all.

    Example:
        >>> canonical("torch.float16"), canonical("fp32"), canonical(np.dtype("float64"))
        ('float16', 'float32', 'float64')
    """
    if isinstance(dtype, type) and issubclass(dtype, np.generic):
        dtype = np.dtype(dtype)
    text = dtype.name if isinstance(dtype, np.dtype) else str(dtype)
    name = _ALIASES.get(text.rsplit(".", 1)[-1].strip().lower())
    if name:
        return name
    expected = "one of " + ", ".join(FLOATS)
    error = ArgumentError if isinstance(dtype, (str, np.dtype)) or "." in text else ArgumentTypeError
    raise error(subject, given=repr(dtype), expected=expected, advice="Name the dtype of the layer's weights.")


_ALIASES = {name: name for name in FLOATS}
_ALIASES.update(half="float16", float="float32", double="float64")
_ALIASES.update(fp16="float16", bf16="bfloat16", fp32="float32", fp64="float64", f16="float16", f32="float32")
_ALIASES["f64"] = "float64"


def name_of(array: np.ndarray) -> str:
    """The dtype's name; both forms of bfloat16 are ``"bfloat16"``.

    Example:
        >>> name_of(np.zeros(2, BFLOAT16_WORDS)), name_of(np.zeros(2, "uint8"))
        ('bfloat16', 'uint8')
    """
    return "bfloat16" if array.dtype == BFLOAT16_WORDS else array.dtype.name


def to_words(array: np.ndarray) -> np.ndarray:
    """The same array, with bfloat16 as words (a view; other dtypes unchanged)."""
    if array.dtype.name != "bfloat16":
        return array
    return np.ascontiguousarray(array).reshape(array.shape).view(BFLOAT16_WORDS)


def to_public(array: np.ndarray) -> np.ndarray:
    """The same array, with words as ``ml_dtypes.bfloat16`` (a view; other dtypes unchanged)."""
    if array.dtype != BFLOAT16_WORDS:
        return array
    return np.ascontiguousarray(array).reshape(array.shape).view(numpy_dtype("bfloat16"))


def numpy_dtype(name: str) -> np.dtype:
    """The NumPy dtype of a canonical name; bfloat16 needs ``ml_dtypes``."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def to_float64(array: np.ndarray) -> np.ndarray:
    """The exact values as float64 (every one of the four dtypes fits)."""
    if array.dtype == BFLOAT16_WORDS:
        bits = np.ascontiguousarray(array).reshape(array.shape).view("<u2").astype("<u4") << np.uint32(16)
        return bits.view("<f4").astype(np.float64)
    return array.astype(np.float64)


def all_finite(array: np.ndarray) -> bool:
    """Whether there is neither NaN nor inf in the array.

    Example:
        >>> all_finite(np.ones(2)), all_finite(np.array([1.0, np.inf]))
        (True, False)
    """
    return bool(np.isfinite(to_float64(array) if array.dtype == BFLOAT16_WORDS else array).all())


def round_to(array: np.ndarray, dtype: str) -> np.ndarray:
    """The array rounded to ``dtype`` (to nearest, ties to even); this is the one place where a dtype changes.

    Inside a worker (no ``ml_dtypes``) bfloat16 comes back as words.

    Example:
        >>> round_to(np.array([1.0, 1.004]), "bfloat16").astype("float32")
        array([1.       , 1.0078125], dtype=float32)
    """
    if name_of(array) == dtype:
        return array
    if dtype != "bfloat16":
        with np.errstate(over="ignore", invalid="ignore"):
            return to_float64(array).astype(dtype)
    try:
        return to_float64(array).astype(numpy_dtype("bfloat16"))
    except ImportError:
        return _round_to_words(to_float64(array))


def _round_to_words(values: np.ndarray) -> np.ndarray:
    """Float64 to bfloat16 words. Rounding twice (through float32) is harmless only if the first is made odd."""
    with np.errstate(over="ignore", invalid="ignore"):
        single = values.astype(np.float32)
    bits = np.array(single).view(np.uint32)
    # Round to odd: where float32 was inexact and even, step to the odd neighbour on the exact value's side.
    inexact = (single.astype(np.float64) != values) & ~np.isnan(values) & ~np.isinf(single)
    too_far = np.abs(single.astype(np.float64)) > np.abs(values)
    bits = np.where(inexact & too_far, bits - 1, bits)
    bits = np.where(inexact, bits | 1, bits).astype(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    rounded = np.where(np.isnan(values), np.uint16(0x7FC0), rounded).astype("<u2")
    return np.ascontiguousarray(rounded).reshape(values.shape).view(BFLOAT16_WORDS)
