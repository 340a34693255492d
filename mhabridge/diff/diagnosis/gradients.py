"""Gradients that are off although the forward pass is right: scaled, or zero."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mhabridge import dtypes, reference
from mhabridge.backends.running import prepare, restore
from mhabridge.diff.diagnosis.evidence import Fit
from mhabridge.diff.diagnosis.findings import Diagnosis, Fault
from mhabridge.diff.judge import judge
from mhabridge.diff.rounding import Accuracy, Bound, bounds, named
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights

_IGNORED = ("mode", "timeout")


def diagnosed(
    diagnosis: Diagnosis,
    spec: MHASpec,
    weights: MHAWeights,
    inputs: tuple[np.ndarray, np.ndarray, np.ndarray],
    call: Mapping[str, Any],
    observed: Mapping[str, np.ndarray],
    expected: Accuracy,
    clean: Fit,
) -> Diagnosis:
    """What explains the gradients, given that rounding explains the output and the weights.

    Args:
        diagnosis: with the names of the layer and the side.
        spec: the layer.
        weights: its parameters.
        inputs: as the user passed them.
        call: with ``grad_output`` (or ``grad_attn_weights``), if there are gradients.
        observed: tensors by name.
        expected: what it was computed in.
        clean: how well the right computation explains output and weights.
    """
    there = {name: array for name, array in observed.items() if name.startswith("grads.") and array is not None}
    fine = dataclasses.replace(diagnosis, explains=clean.times, tried=1, words="Rounding explains it.")
    if not there or (call.get("grad_output") is None and call.get("grad_attn_weights") is None):
        return fine
    options = {name: item for name, item in call.items() if name not in _IGNORED}
    prepared = prepare(spec, weights, *inputs, any_dtype=True, **options)
    exact = named(restore(prepared, reference.attend(spec, weights, prepared.call)))
    limits = bounds(prepared, weights, exact, expected)
    off = [name for name, array in there.items() if name in exact and not judge(array, exact[name], limits[name]).ok]
    if not off:
        return fine
    faults = [_fault(name, there[name], exact[name], limits[name]) for name in off]
    found = tuple(fault for fault in faults if fault is not None)
    text = f"The output and the weights are right; these gradients are not: {', '.join(off)}."
    if len(found) < len(faults):
        return dataclasses.replace(diagnosis, tried=3, words=f"Unexplained: {text[0].lower()}{text[1:]}")
    words = " ".join([text, *(f"{fault.where}: {fault.words}." for fault in found)])
    return dataclasses.replace(diagnosis, faults=found, sure="certain", explains=1.0, tried=3, words=words)


def _fault(name: str, array: np.ndarray, exact: np.ndarray, bound: Bound) -> Fault | None:
    if array.shape != exact.shape:
        return None
    values, finite = dtypes.to_float64(array), np.isfinite(exact)
    if not values.any():
        return Fault("gradient zero", name, "nothing flows back", f"{name}: do not detach it, or stop its gradient")
    square = float(np.square(exact[finite]).sum())
    factor = float((values[finite] * exact[finite]).sum()) / square if square else math.nan
    if not math.isfinite(factor) or factor == 0.0:
        return None
    # Scaling by what is no power of two rounds once more, so the factor of the bound is the factor of the gradient.
    scaled = Bound(np.abs(factor) * bound.each, abs(factor) * bound.mean)
    if not judge(array, factor * exact, scaled).ok:
        return None
    return Fault(
        "gradient scaled", name, f"it is {factor:.6g} times what it should be", f"{name}: divide by {factor:.6g}"
    )
