"""Whole models of PyTorch: which tensors they hold, by the names of their state dict, and giving them values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from mhabridge import dtypes
from mhabridge.errors import UnsupportedError, WeightsError
from mhabridge.spec import MHASpec
from mhabridge.state import Slot, specs_of

from .layers import is_layer, require_plain
from .parameters import spec_of

_LAZY = tuple(
    getattr(torch.nn.parameter, name)
    for name in ("UninitializedParameter", "UninitializedBuffer")
    if hasattr(torch.nn.parameter, name)  # the second came after 1.8
)


def is_model(model: Any) -> bool:
    """Whether this is a module of PyTorch."""
    return isinstance(model, torch.nn.Module)


def attentions(model: torch.nn.Module) -> dict[str, MHASpec]:
    """The spec of each attention layer in the model, by its path."""
    return specs_of(model.named_modules(), is_layer, require_plain, spec_of)


def slots(model: torch.nn.Module) -> list[Slot]:
    """The tensors of the model's state dict; tied ones are one.

    Raises:
        UnsupportedError: an entry of the state dict is made up by the model when it is asked for.
        WeightsError: a tensor without memory (meta, lazy).
    """
    state = _state(model)
    groups: dict[Any, list[str]] = {}
    for name, tensor in state.items():
        groups.setdefault(_place(tensor), []).append(name)
    return [_slot(names, state[names[0]]) for names in groups.values()]


def load_state(model: torch.nn.Module, named: Mapping[str, np.ndarray]) -> None:
    """Give tensors their values, by name, each looked up when its turn comes; device and requires_grad stay.

    Args:
        model: the model.
        named: arrays of the shapes and dtypes that ``slots`` says; those that NumPy does not have as their
            bits. They are copied, and must be writeable.
    """
    state = _state(model)
    with torch.no_grad():
        for name in named:
            own, array = state[name], named[name]
            value = torch.from_numpy(array.view(np.int16) if array.dtype == dtypes.BFLOAT16_WORDS else array)
            own.copy_(value if value.dtype == own.dtype else value.view(own.dtype))


def _state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        if id(tensor) not in own:
            raise UnsupportedError(
                name,
                given="an entry of the state dict that is no parameter or buffer of the model",
                expected="parameters and buffers",
                advice="The model makes it when it is asked for: load it with load_state_dict.",
            )
        if isinstance(tensor, _LAZY) or tensor.device.type == "meta":
            raise WeightsError(
                name,
                given="a tensor without memory (lazy, or on the meta device)",
                expected="a tensor that can be filled",
                advice="Use model.to_empty(device=...), or call a lazy model once, before loading.",
            )
    return state


def _place(tensor: torch.Tensor) -> Any:
    """What two tensors have in common that are the same numbers in memory."""
    if not tensor.numel():
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _slot(names: list[str], tensor: torch.Tensor) -> Slot:
    return Slot(tuple(names), tuple(tensor.shape), str(tensor.dtype)[len("torch.") :])
