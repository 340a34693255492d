"""What every adapter does to put a canonical layer into a native class: the nearest spec it can say, and gradients
back.

This module also runs inside workers (Python 3.8).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from mhabridge import dialects
from mhabridge.calls import Call
from mhabridge.errors import UnsupportedError
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights


@dataclasses.dataclass(frozen=True)
class NativeForm:
    """How a spec is said in one dialect.

    Args:
        spec: the nearest spec that the dialect can say: it may have more biases (they are zero), the other axis order
            (inputs are transposed) and the dialect's default dtype (the layer is cast after it was built).
        kwargs: the constructor's arguments.
        notes: what differs from the spec that was asked for.
    """

    spec: MHASpec
    kwargs: dict[str, Any]
    notes: tuple[str, ...]


def native_form(spec: MHASpec, dialect: str, version: str, turn: bool = False) -> NativeForm:
    """The constructor's arguments for the native layer that can hold ``spec``.

    Args:
        spec: the layer.
        dialect: the framework's.
        version: of the framework.
        turn: take a layer with the other axis order when the native class has only that; the caller then transposes.

    Raises:
        UnsupportedError: the native layer cannot express it.
    """
    notes = []
    nearest = spec.replace(dtype="float32")
    if spec.bias is None:
        nearest = nearest.replace(bias=True)
        missing = [name for name in ("q_bias", "k_bias", "v_bias", "out_bias") if not getattr(spec, name)]
        notes.append(f"{', '.join(missing)}: {dialect} has one flag for all biases, so an explicit zero stands in")
    try:
        return NativeForm(nearest, dialects.spec_to_kwargs(nearest, dialect, version=version), tuple(notes))
    except UnsupportedError:
        if not turn:
            raise
        turned = nearest.replace(batch_first=not spec.batch_first)
        try:
            kwargs = dialects.spec_to_kwargs(turned, dialect, version=version)
        except UnsupportedError:
            pass
        else:
            notes.append(
                f"batch_first={spec.batch_first}: {dialect} {version} has only the other order; inputs are transposed"
            )
            return NativeForm(turned, kwargs, tuple(notes))
        raise


def unsayable(spec: MHASpec, dialect: str, version: str) -> dict[str, str]:
    """Why a dialect cannot describe a layer: subject and reason; empty when it can."""
    try:
        native_form(spec, dialect, version, turn=True)
    except UnsupportedError as error:
        return {error.subject: f"{error.expected}."}
    return {}


def parameter_grads(layout: str, named: dict[str, np.ndarray], native: MHASpec, spec: MHASpec) -> dict[str, np.ndarray]:
    """Canonical parameter gradients from a layout's; those of stand-in zero biases are left out."""
    grads = MHAWeights.from_layout(layout, named, native).arrays()
    return {name: grads[name] for name in spec.parameter_shapes()}


def swap(array: np.ndarray, batch_first: bool) -> np.ndarray:
    """Between (N, L, E) and the native layer's axis order."""
    return array if batch_first else np.ascontiguousarray(array.swapaxes(0, 1))


def flat_mask(mask: np.ndarray | None, spec: MHASpec, call: Call) -> np.ndarray | None:
    """A four-axis mask as native layers take it: (L, S) when it is the same for all batches and heads, else (N * H, L,
    S).
    """
    if mask is None:
        return None
    batch, target, _ = call.query.shape
    source = call.key.shape[1]
    if mask.shape[:2] == (1, 1):
        return np.ascontiguousarray(np.broadcast_to(mask[0, 0], (target, source)))
    full = np.broadcast_to(mask, (batch, spec.num_heads, target, source))
    return np.ascontiguousarray(full).reshape(batch * spec.num_heads, target, source)


def full_mask(grad: np.ndarray, spec: MHASpec, call: Call) -> np.ndarray:
    """A flat mask's gradient with four axes; that of a (L, S) mask is already summed over batches and heads."""
    if grad.ndim == 2:
        return grad[None, None]
    return grad.reshape(len(call.query), spec.num_heads, *grad.shape[1:])
