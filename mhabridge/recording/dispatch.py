"""Which framework a model is of, and that framework's part of the recorder.

The record kit has its own form of this file's one function, with only the frameworks that it was written for.
"""

from __future__ import annotations

import importlib
from typing import Any

from mhabridge import mapping
from mhabridge.bridge import framework_of
from mhabridge.errors import ArgumentTypeError


def adapter_of(model: Any) -> Any:
    """The recording module of the framework that a model is of; no other framework is imported.

    Raises:
        ArgumentTypeError: it is no model of a known framework.
        BackendError: its framework cannot be imported here.

    Example:
        >>> adapter_of([1, 2])
        Traceback (most recent call last):
        mhabridge.errors.ArgumentTypeError: model: given builtins.list; expected a module or cell of torch, mindspore,
        megengine. Pass the model itself, as it was before it was traced, scripted or exported.
    """
    module = framework_of(model)
    found = None if module is None else importlib.import_module(f"{module.__name__}.recording")
    if found is None or not found.is_model(model):
        raise ArgumentTypeError(
            "model",
            given=f"{type(model).__module__}.{type(model).__qualname__}",
            expected="a module or cell of " + ", ".join(mapping.FRAMEWORKS),
            advice="Pass the model itself, as it was before it was traced, scripted or exported.",
        )
    return found
