"""Layers to and from the canonical form."""

from __future__ import annotations

from typing import Any

import torch

from mhabridge import dropin
from mhabridge.live import Traits
from mhabridge.native import native_form
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights

from .dropin import MultiheadAttention
from .native import FRAMEWORK, build_native, version
from .parameters import ATTENTION, owners, require_parameters, spec_of, weights_of


def is_layer(layer: Any) -> bool:
    """Whether this is PyTorch's multi-head attention."""
    return isinstance(layer, torch.nn.MultiheadAttention)


def extract(layer: torch.nn.MultiheadAttention) -> tuple[MHASpec, MHAWeights]:
    """The spec and the weights (copies) of a native layer.

    Raises:
        WeightsError: parameters that such a layer does not have, or of another shape, or without values (meta).
        UnsupportedError: a subclass with a forward of its own.
    """
    require_plain(layer)
    spec = spec_of(layer)
    return spec, weights_of(layer, spec)


def require_plain(layer: Any) -> None:
    """Raise UnsupportedError for a subclass with a forward of its own, or weights that are no parameters."""
    dropin.require_plain(layer, "forward", torch.nn.MultiheadAttention, MultiheadAttention)
    out_proj = vars(layer)["_modules"]["out_proj"]  # as an attribute it takes as long as all the rest
    dropin.require_part(out_proj, "out_proj", "forward", torch.nn.Linear)
    require_parameters(layer, names=ATTENTION)
    require_parameters(out_proj, "out_proj")


def build(
    spec: MHASpec, weights: MHAWeights | None = None, *, device: Any = None, notes: list[str] | None = None
) -> torch.nn.MultiheadAttention:
    """A native layer; without weights it keeps the initial values that PyTorch gives it.

    Raises:
        UnsupportedError: the native class cannot express the spec.
    """
    form = native_form(spec, FRAMEWORK, version())
    return build_native(spec, weights, form, device, [] if notes is None else notes)


def traits(layer: torch.nn.MultiheadAttention) -> Traits:
    """Training flag, requires_grad of each parameter, and kind of device."""
    named = {name: parameter.requires_grad for name, parameter in layer.named_parameters()}
    trainable = {name: named[own] for name, own in owners(layer).items()}
    return Traits(layer.training, trainable, "cpu" if layer.out_proj.weight.device.type == "cpu" else "gpu")


def set_traits(layer: torch.nn.MultiheadAttention, wanted: Traits) -> None:
    """The inverse of ``traits``."""
    holders = owners(layer)
    for own, parameter in layer.named_parameters():
        names = [name for name in holders if holders[name] == own and name in wanted.trainable]
        parameter.requires_grad_(wanted.all_alike(names, own))
    layer.train(wanted.training)
    if wanted.device == "gpu":
        layer.to("cuda")
