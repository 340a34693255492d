"""Runs a small known call in each backend, and says what is wrong and how to mend it."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import numpy as np

from mhabridge import mapping
from mhabridge.backends import interpreters
from mhabridge.backends.registry import Backend, BackendInfo, backend, backends, in_parallel, registered
from mhabridge.backends.worker import Worker
from mhabridge.errors import BackendError, MHABridgeError
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights

CALL_SECONDS = 120.0
# The largest difference that float32 rounding makes in this call is near 1e-6 in every framework; a wrong
# layout, mask or scale gives 1e-1.
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Finding:
    """What the doctor found out about one backend.

    Args:
        info: the backend; ``ok`` and ``reason`` are the verdict.
        error: the largest difference from the float64 reference; None if it gave no answer.
        needed: something is wrong with what is there. A framework that is just not installed is no fault.
    """

    info: BackendInfo
    error: float | None
    needed: bool

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return {**self.info.to_dict(), "error": self.error, "needed": self.needed}


def examine() -> list[Finding]:
    """One finding for each backend, in the order of ``backends``.

    A framework here is imported in a process of its own, so one that kills its process does not kill this one.
    """
    return in_parallel(_examine, backends(probe=False), threads=4)


def _examine(info: BackendInfo) -> Finding:
    if not info.ok:
        return Finding(_explained(info), None, info.where == "worker" or info.version is not None)
    try:
        version, error = _try(info)
    except MHABridgeError as problem:
        reason = str(problem)
        return Finding(dataclasses.replace(info, ok=False, reason=reason), None, True)
    return _verdict(dataclasses.replace(info, version=version), error)


def _verdict(info: BackendInfo, error: float) -> Finding:
    """Right, or wrong: NaN is wrong too."""
    if error <= TOLERANCE:
        return Finding(info, error, False)
    reason = f"its answer to a small known call is off by {error:.3g}. Do not use it; install it again"
    return Finding(dataclasses.replace(info, ok=False, reason=reason), error, True)


def _try(info: BackendInfo) -> tuple[str, float]:
    """The version that the backend itself tells, and the error of its answer."""
    if info.where == "worker":
        return _judge(registered(info))
    worker = Worker(sys.executable, info.framework)
    try:
        return _judge(Backend(info, worker))
    finally:
        worker.close()


def _judge(tried: Backend) -> tuple[str, float]:
    version = tried.call("describe", {}, timeout=CALL_SECONDS)["version"]
    spec = MHASpec(embed_dim=8, num_heads=2, batch_first=True)
    weights = MHAWeights.random(spec, seed=0)
    query = np.random.default_rng(0).standard_normal((2, 3, 8)).astype("float32")
    expected = backend(mapping.REFERENCE).run(spec, weights, query, query, query).output
    output = tried.run(spec, weights, query, query, query, timeout=CALL_SECONDS).output
    return version, float(np.abs(output.astype("float64") - expected).max())


def _explained(info: BackendInfo) -> BackendInfo:
    """A framework that is not here: whether it could be installed."""
    if info.where == "worker" or info.version is not None:
        return info
    plans = mapping.table(info.framework)["framework"].get("environments", [])
    try:
        interpreters.find(plans[0]["python"])
    except BackendError as error:
        return dataclasses.replace(info, reason=f"{info.reason} - which needs an interpreter first. {error}")
    return info
