"""What a backend can be asked to do: a table of functions, the same here and inside a worker.

Each function takes the framework's name and a payload (a *tree*, see ``wire``) and gives a tree back. A backend in this
process calls ``serve`` directly; one in another interpreter has ``child`` call it there.

This module also runs inside workers (Python 3.8).
"""

from __future__ import annotations

import importlib
import os
import platform
from typing import TYPE_CHECKING, Any

import numpy as np

from mhabridge import lowering
from mhabridge.calls import Call
from mhabridge.errors import BackendError
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights

if TYPE_CHECKING:
    from collections.abc import Callable

    Function = Callable[[str, dict[str, Any]], Any]


def serve(function: str, framework: str, payload: dict[str, Any]) -> Any:
    """Call a function of ``FUNCTIONS``, or one named as ``"module:function"``.

    Raises:
        BackendError: there is no such function, or the framework cannot be imported.

    Example:
        >>> serve("ping", "numpy", {"text": "hello"})
        {'text': 'hello'}
    """
    return _find(function)(framework, payload)


def adapter(framework: str) -> Any:
    """The adapter module of a framework.

    Raises:
        BackendError: the framework, or something that it needs, cannot be imported here.
    """
    try:
        return importlib.import_module("mhabridge.adapters." + framework)
    except ImportError as error:
        if error.name and error.name.partition(".")[0] == "mhabridge":
            raise
        raise BackendError(
            f"framework {framework!r}",
            given=f"{type(error).__name__}: {error}",
            expected="that it can be imported",
            advice=f"Install it, or use `mhabridge backends install {framework}`.",
        ) from error


def ping(framework: str, payload: dict[str, Any]) -> dict[str, Any]:
    """The payload, unchanged."""
    return payload


def describe(framework: str, payload: dict[str, Any]) -> dict[str, Any]:
    """Which versions are in use, and where."""
    return {
        "framework": framework,
        "version": adapter(framework).version(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "host": platform.node(),
        "pid": os.getpid(),
    }


def run(framework: str, payload: dict[str, Any]) -> dict[str, Any]:
    """One canonical call: ``spec``, ``weights`` and ``call`` as trees; a result as one."""
    spec, weights = MHASpec.from_dict(payload["spec"]), MHAWeights.from_tree(payload["weights"])
    return lowering.run(adapter(framework), spec, weights, Call.from_tree(payload["call"])).to_tree()


def rebuild(framework: str, payload: dict[str, Any]) -> dict[str, Any]:
    """Build the native layer of ``spec`` and ``weights``, and extract both from it again."""
    module = adapter(framework)
    spec, weights = MHASpec.from_dict(payload["spec"]), MHAWeights.from_tree(payload["weights"])
    spec, weights = module.extract(module.build(spec, weights))
    return {"spec": spec.to_dict(), "weights": weights.to_tree()}


def _find(function: str) -> Function:
    if function in FUNCTIONS:
        return FUNCTIONS[function]
    module, colon, name = function.partition(":")
    if colon:
        found: Function = getattr(importlib.import_module(module), name)
        return found
    known = ", ".join(sorted(FUNCTIONS))
    raise BackendError("function", given=repr(function), expected=f"one of {known}, or module:function")


FUNCTIONS: dict[str, Function] = {"ping": ping, "describe": describe, "run": run, "rebuild": rebuild}
