"""Layers to and from the canonical form."""

from __future__ import annotations

from typing import Any

import megengine
import megengine.functional
import megengine.module

from mhabridge import dropin
from mhabridge.errors import UnsupportedError
from mhabridge.live import Traits
from mhabridge.native import native_form
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights

from .dropin import MultiheadAttention
from .native import FRAMEWORK, build_native, version
from .parameters import spec_of, weights_of


def is_layer(layer: Any) -> bool:
    """Whether this is MegEngine's multi-head attention, or the drop-in."""
    return isinstance(layer, (megengine.module.MultiHeadAttention, MultiheadAttention))


def extract(layer: Any) -> tuple[MHASpec, MHAWeights]:
    """The spec and the weights (copies) of a native module or a drop-in.

    Raises:
        WeightsError: the packed vector does not have the length that the module's sizes say.
        UnsupportedError: a subclass with a forward of its own.
    """
    require_plain(layer)
    spec = spec_of(layer)
    return spec, weights_of(layer, spec)


def require_plain(layer: Any) -> None:
    """Raise UnsupportedError for a subclass with a forward of its own."""
    dropin.require_plain(layer, "forward", megengine.module.MultiHeadAttention, MultiheadAttention)


def build(
    spec: MHASpec, weights: MHAWeights | None = None, *, device: Any = None, notes: list[str] | None = None
) -> Any:
    """A native module; without weights it keeps MegEngine's initial values (11 times too small at E = 128).

    Args:
        spec: the layer.
        weights: its parameters.
        device: a MegEngine device name ("cpu0", "gpu0"), or None for the default one.
        notes: a list that is filled with what the module has beyond the spec.

    Raises:
        UnsupportedError: the native class cannot express the spec.
    """
    form = native_form(spec, FRAMEWORK, version())
    return build_native(spec, weights, form, device, [] if notes is None else notes)


def traits(layer: Any) -> Traits:
    """Training flag and kind of device.

    A parameter is frozen by leaving it out of ``GradManager.attach``, of which no layer knows.
    """
    spec = spec_of(layer)
    device = str(layer.io_weight_bias.device)
    return Traits(layer.training, dict.fromkeys(spec.parameter_shapes(), True), "cpu" if "cpu" in device else "gpu")


def set_traits(layer: Any, wanted: Traits) -> None:
    """The inverse of ``traits``.

    Raises:
        UnsupportedError: a parameter is frozen; see there.
    """
    refuse_frozen(wanted.trainable)
    layer.train(wanted.training)


def refuse_frozen(trainable: dict[str, bool]) -> None:
    """Raise for a parameter that shall not take part in training."""
    frozen = [name for name, trainable in trainable.items() if not trainable]
    if frozen:
        raise UnsupportedError(
            ", ".join(frozen),
            given="frozen",
            expected="parameters that take part in training",
            advice="MegEngine freezes by leaving a parameter out of GradManager.attach; unfreeze it before converting.",
        )
