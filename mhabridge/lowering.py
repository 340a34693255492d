"""Which form of a call a backend runs: its native layer where that can be trusted, else the composed one.

| mode | native layer can be trusted | it cannot |
|---|---|---|
| auto | native | composed, and the notes say why |
| native | native | UnsupportedError with the reasons |
| composed | composed | composed |

A limit of the framework itself (a dtype that it does not have) is an UnsupportedError in every mode.

This module also runs inside workers (Python 3.8).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from mhabridge import composed, envelope
from mhabridge.calls import Call, Result
from mhabridge.errors import UnsupportedError
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights


def run(adapter: Any, spec: MHASpec, weights: MHAWeights, call: Call) -> Result:
    """One canonical call on a framework, in the form that ``call.mode`` allows.

    Args:
        adapter: the framework's module in adapters/.
        spec: the layer.
        weights: its parameters.
        call: the call.

    Raises:
        UnsupportedError: no form that the mode allows answers this call rightly.
    """
    broken = envelope.violations(adapter.FRAMEWORK, adapter.version(), spec, call)
    impossible = [limit for limit in broken if not limit.composable]
    if impossible:
        raise _unsupported(adapter, {limit.feature: limit.reason for limit in impossible}, "no other form")
    if call.mode == "composed" and adapter.OPS is not None:
        return _composed(adapter, spec, weights, call, "composed: asked for")
    reasons = {limit.feature: limit.reason for limit in broken} or adapter.unfit(spec, weights, call)
    if not reasons or adapter.OPS is None:
        result: Result = adapter.run_native(spec, weights, call)
        return result
    if call.mode == "native":
        raise _unsupported(adapter, reasons, 'mode="auto" or "composed"')
    return _composed(adapter, spec, weights, call, "composed: " + "; ".join(f"{k}: {v}" for k, v in reasons.items()))


def _composed(adapter: Any, spec: MHASpec, weights: MHAWeights, call: Call, note: str) -> Result:
    result = composed.run(adapter.OPS, spec, weights, call)
    return dataclasses.replace(result, notes=(note, *result.notes))


def _unsupported(adapter: Any, reasons: dict[str, str], instead: str) -> UnsupportedError:
    framework = f"{adapter.FRAMEWORK} {adapter.version()}"
    advice = f'Use {instead}, or the "numpy" backend.' if "mode" in instead else 'The "numpy" backend computes it.'
    return UnsupportedError(
        ", ".join(reasons),
        given=f"a call that the native layer of {framework} does not answer rightly",
        expected="one inside its envelope",
        advice=" ".join(f"{name}: {reason}" for name, reason in reasons.items()) + " " + advice,
    )
