"""Layers to and from the canonical form."""

from __future__ import annotations

from typing import Any

import mindspore

from mhabridge import dropin
from mhabridge.errors import UnsupportedError
from mhabridge.live import Traits
from mhabridge.native import native_form
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights

from .dropin import MultiheadAttention
from .native import FRAMEWORK, build_native, refuse_device, version
from .parameters import own_parameters, owners, spec_of, weights_of


def is_layer(layer: Any) -> bool:
    """Whether this is MindSpore's multi-head attention."""
    return isinstance(layer, mindspore.nn.MultiheadAttention)


def extract(layer: Any) -> tuple[MHASpec, MHAWeights]:
    """The spec and the weights (copies) of a native cell.

    Raises:
        WeightsError: parameters that such a cell does not have, or of another shape.
        UnsupportedError: a subclass with a construct of its own.
    """
    require_plain(layer)
    spec = spec_of(layer)
    return spec, weights_of(layer, spec)


def require_plain(layer: Any) -> None:
    """Raise UnsupportedError for a subclass with a construct of its own."""
    dropin.require_plain(layer, "construct", mindspore.nn.MultiheadAttention, MultiheadAttention)


def build(
    spec: MHASpec, weights: MHAWeights | None = None, *, device: Any = None, notes: list[str] | None = None
) -> Any:
    """A native cell; without weights it keeps the initial values that MindSpore gives it.

    ``device`` must be None: MindSpore's device belongs to the process (``mindspore.set_device``), not to a cell.

    Raises:
        UnsupportedError: the native class cannot express the spec.
    """
    refuse_device(device)
    return build_native(spec, weights, native_form(spec, FRAMEWORK, version()), [] if notes is None else notes)


def traits(layer: Any) -> Traits:
    """Training flag, requires_grad of each parameter, and kind of device (the process's)."""
    parameters = own_parameters(layer)
    trainable = {name: bool(parameters[own].requires_grad) for name, own in owners(layer).items()}
    return Traits(bool(layer.training), trainable, process_device())


def set_traits(layer: Any, wanted: Traits) -> None:
    """The inverse of ``traits``.

    Raises:
        UnsupportedError: another kind of device than the process's, or a packed parameter that is frozen in part.
    """
    if wanted.device != process_device():
        raise UnsupportedError(
            "device",
            given=wanted.device,
            expected=f"{process_device()}, the device of this process",
            advice="Move the layer there first, or choose MindSpore's device (mindspore.set_device).",
        )
    holders = owners(layer)
    for own, parameter in own_parameters(layer).items():
        names = [name for name in holders if holders[name] == own and name in wanted.trainable]
        parameter.requires_grad = wanted.all_alike(names, own)
    layer.set_train(wanted.training)


def process_device() -> str:
    """The kind of device that this process computes on."""
    return "cpu" if mindspore.get_context("device_target") == "CPU" else "gpu"
