"""What a layer of MindSpore holds: its spec, and its parameters by their native and by canonical names."""

from __future__ import annotations

from typing import Any

import mindspore
import numpy as np

from mhabridge.dropin import plain, require_separate
from mhabridge.errors import WeightsError
from mhabridge.live import remembered_spec
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights

from .tensors import to_numpy, to_tensor


def spec_of(layer: Any) -> MHASpec:
    """What the layer is."""
    beyond = vars(layer).get("beyond")
    out_proj = layer.out_proj
    return remembered_spec(
        layer.embed_dim,
        layer.num_heads,
        layer.kdim,
        layer.vdim,
        layer.dropout,
        layer.in_proj_bias is not None,
        out_proj.bias is not None,
        layer.bias_k is not None,
        layer.add_zero_attn,
        layer.batch_first,
        out_proj.weight.dtype,
        tuple(beyond.items()) if beyond else (),
    )


def own_parameters(layer: Any) -> dict[str, Any]:
    """The cell's own parameters by the names they have in it (a parameter's own name changes when the cell is put into
    another).
    """
    found = {}
    for name in (
        "in_proj_weight",
        "q_proj_weight",
        "k_proj_weight",
        "v_proj_weight",
        "in_proj_bias",
        "bias_k",
        "bias_v",
    ):
        found[name] = getattr(layer, name, None)
    found["out_proj.weight"] = layer.out_proj.weight
    found["out_proj.bias"] = getattr(layer.out_proj, "bias", None)
    return {name: item for name, item in found.items() if isinstance(item, mindspore.Parameter)}


def weights_of(layer: Any, spec: MHASpec) -> MHAWeights:
    """Its weights, as copies.

    Raises:
        UnsupportedError: two of its parameters are one.
        WeightsError: parameters that such a cell does not have, or of another shape.
    """
    require_separate(own_parameters(layer))
    named = {name: to_numpy(parameter) for name, parameter in own_parameters(layer).items()}
    return MHAWeights.from_layout("mindspore", named, plain(spec))


def load(layer: Any, named: dict[str, np.ndarray]) -> None:
    """Give the parameters their values, by native name.

    Raises:
        WeightsError: a parameter without a value, a value without a parameter, or one of another shape.
    """
    parameters = own_parameters(layer)
    if set(parameters) != set(named):
        odd = sorted(set(parameters) ^ set(named))
        raise WeightsError(", ".join(odd), given="on one side only", expected="the same parameters on both sides")
    for name, array in named.items():
        if parameters[name].shape != array.shape:
            raise WeightsError(name, given=f"shape {array.shape}", expected=f"shape {parameters[name].shape}")
        parameters[name].set_data(to_tensor(array))


def owners(layer: Any) -> dict[str, str]:
    """The native parameter that holds each canonical one."""
    packed = layer.in_proj_weight is not None
    found = {f"{x}_weight": "in_proj_weight" if packed else f"{x}_proj_weight" for x in "qkv"}
    found["out_weight"] = "out_proj.weight"
    if layer.in_proj_bias is not None:
        found.update({f"{x}_bias": "in_proj_bias" for x in "qkv"}, out_bias="out_proj.bias")
    if layer.bias_k is not None:
        found.update(bias_k="bias_k", bias_v="bias_v")
    return found


def named_tensors(layer: Any) -> dict[str, Any]:
    """The cell's own parameters, differentiable, by canonical name."""
    size = layer.embed_dim
    thirds = [slice(start, start + size) for start in (0, size, 2 * size)]
    found = {"out_weight": layer.out_proj.weight}
    for name, third in zip("qkv", thirds):
        packed = layer.in_proj_weight
        found[f"{name}_weight"] = getattr(layer, f"{name}_proj_weight") if packed is None else packed[third]
        if layer.in_proj_bias is not None:
            found[f"{name}_bias"] = layer.in_proj_bias[third]
    if layer.out_proj.bias is not None:
        found["out_bias"] = layer.out_proj.bias
    if layer.bias_k is not None:
        found.update(bias_k=layer.bias_k.reshape(-1), bias_v=layer.bias_v.reshape(-1))
    return found
