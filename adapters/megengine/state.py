"""Whole modules of MegEngine: which tensors they hold, by the names of their state dict, and giving them values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import megengine.module
import numpy as np

from mhabridge.spec import MHASpec
from mhabridge.state import Slot, specs_of

from .layers import is_layer, require_plain
from .parameters import spec_of


def is_model(model: Any) -> bool:
    """Whether this is a module of MegEngine."""
    return isinstance(model, megengine.module.Module)


def attentions(model: Any) -> dict[str, MHASpec]:
    """The spec of each attention layer in the model, by its path."""
    return specs_of(model.named_modules(), is_layer, require_plain, spec_of)


def slots(model: Any) -> list[Slot]:
    """The tensors of the model's state dict, with their shapes there (a batch norm's are flat); tied ones are one."""
    state = model.state_dict(keep_var=True)
    groups: dict[int, list[str]] = {}
    for name, tensor in state.items():
        groups.setdefault(id(tensor), []).append(name)
    return [_slot(names, state[names[0]]) for names in groups.values()]


def load_state(model: Any, named: Mapping[str, np.ndarray]) -> None:
    """Give tensors their values, by name, each looked up when its turn comes; the device stays.

    Args:
        model: the model.
        named: arrays of the shapes and dtypes that ``slots`` says.
    """

    def value(name: str, tensor: Any) -> np.ndarray:
        # One without a value gets its own: MegEngine takes None too, but warns of it or raises when all is done.
        return named[name] if name in named else np.array(tensor.numpy())

    model.load_state_dict(value)


def _slot(names: list[str], tensor: Any) -> Slot:
    return Slot(tuple(names), tuple(int(size) for size in tensor.shape), np.dtype(tensor.dtype).name)
