"""The float64 reference behind the adapters' names: the backend "numpy". It has no native layer to build or extract."""

from __future__ import annotations

from typing import Any

import numpy as np

from mhabridge import reference
from mhabridge.calls import Call, Result
from mhabridge.errors import UnsupportedError
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights

FRAMEWORK = "numpy"
OPS = None  # the reference has one form only


def version() -> str:
    """NumPy's version."""
    return np.__version__


def is_layer(layer: Any) -> bool:
    """NumPy has no layers."""
    return False


def extract(layer: Any) -> tuple[MHASpec, MHAWeights]:
    """NumPy has no layers."""
    raise _no_layer()


def build(
    spec: MHASpec, weights: MHAWeights | None = None, *, device: Any = None, notes: list[str] | None = None
) -> Any:
    """NumPy has no layers."""
    raise _no_layer()


def unfit(spec: MHASpec, weights: MHAWeights, call: Call) -> dict[str, str]:
    """The reference can do every call."""
    return {}


def run_native(spec: MHASpec, weights: MHAWeights, call: Call) -> Result:
    """One canonical call, in float64 whatever the inputs are."""
    return reference.attend(spec, weights, call)


def _no_layer() -> UnsupportedError:
    return UnsupportedError(
        "framework",
        given="'numpy', the float64 reference",
        expected="a framework with layers",
        advice='Run calls on it with mb.backend("numpy").run(...).',
    )
