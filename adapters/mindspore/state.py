"""Whole cells of MindSpore: which parameters they hold, by the names of their checkpoints, and giving them values.

A parameter has a name of its own, which ``mindspore.save_checkpoint`` writes; it is its path in the cell, unless
somebody named it otherwise or it is shared. The paths are aliases then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import mindspore
import numpy as np

from mhabridge.spec import MHASpec
from mhabridge.state import Slot, specs_of

from .layers import is_layer, require_plain
from .parameters import spec_of
from .tensors import dtype_name, to_tensor


def is_model(model: Any) -> bool:
    """Whether this is a cell of MindSpore."""
    return isinstance(model, mindspore.nn.Cell)


def attentions(model: Any) -> dict[str, MHASpec]:
    """The spec of each attention layer in the cell, by its path."""
    return specs_of(model.cells_and_names(), is_layer, require_plain, spec_of)


def slots(model: Any) -> list[Slot]:
    """The parameters of the cell, moving means and variances among them; tied ones are one."""
    return [
        Slot((name,), tuple(parameter.shape), dtype_name(parameter.dtype), aliases)
        for name, (parameter, aliases) in _named(model).items()
    ]


def load_state(model: Any, named: Mapping[str, np.ndarray]) -> None:
    """Give parameters their values, by a name or an alias, each looked up when its turn comes; requires_grad stays.

    Args:
        model: the cell.
        named: arrays of the shapes and dtypes that ``slots`` says, bfloat16 as its bits.
    """
    own = {name: parameter for first, (parameter, aliases) in _named(model).items() for name in (first, *aliases)}
    for name in named:
        own[name].set_data(to_tensor(named[name]))


def _named(model: Any) -> dict[str, tuple[Any, tuple[str, ...]]]:
    """Each parameter and its aliases, by the name that it has in a checkpoint."""
    parameters: dict[int, Any] = {}
    paths: dict[int, list[str]] = {}
    for path, cell in model.cells_and_names():
        for name, parameter in cell.parameters_and_names(name_prefix=path, expand=False):
            parameters[id(parameter)] = parameter
            paths.setdefault(id(parameter), []).append(name)
    counts = Counter(parameter.name for parameter in parameters.values())
    unique = {parameter.name: key for key, parameter in parameters.items() if counts[parameter.name] == 1}
    named = {}
    for key, parameter in parameters.items():
        own = [parameter.name] if parameter.name in unique else []
        free = [path for path in paths[key] if unique.get(path, key) == key]
        first, *others = dict.fromkeys(own + free or paths[key])
        named[first] = parameter, tuple(others)
    return named
