"""What a layer of MegEngine holds: its spec, and its parameters by their native and by canonical names."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import megengine
import megengine.functional
import megengine.module
import numpy as np

from mhabridge import mapping
from mhabridge.dropin import plain
from mhabridge.errors import ArgumentError, UnsupportedError
from mhabridge.live import remembered_spec
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights


def spec_of(layer: Any) -> MHASpec:
    """What a native module or a drop-in is."""
    own = not isinstance(layer, megengine.module.MultiHeadAttention)
    beyond = layer.beyond if own else {"out_dropout": layer.out_dropout}
    return remembered_spec(
        layer.embed_dim,
        layer.num_heads,
        layer.kdim,
        layer.vdim,
        layer.dropout if own else layer.attn_dropout,
        layer.bias,
        layer.bias,
        layer.add_bias_kv,
        layer.add_zero_attn,
        layer.batch_first if own else True,
        np.dtype(layer.io_weight_bias.dtype).name,
        tuple(beyond.items()),
    )


def weights_of(layer: Any, spec: MHASpec) -> MHAWeights:
    """Its weights, as copies.

    Raises:
        WeightsError: the packed vector does not have the length that the module's sizes say.
    """
    named = {"io_weight_bias": np.array(layer.io_weight_bias.numpy())}
    weights = MHAWeights.from_layout("megengine", named, packed_part(spec))
    if spec.add_bias_kv:
        extra = {name: np.array(getattr(layer, name).numpy()).reshape(-1) for name in ("bias_k", "bias_v")}
        weights = dataclasses.replace(weights, **extra)
    return weights


def packed_part(spec: MHASpec) -> MHASpec:
    """What of a layer lies in io_weight_bias: all but bias_k and bias_v."""
    return plain(spec).replace(add_bias_kv=False)


def refuse_dtype(spec: MHASpec) -> None:
    """Raise for a dtype that MegEngine does not have."""
    if spec.dtype not in ("float32", "float16"):
        raise UnsupportedError(
            "dtype", given=spec.dtype, expected="float32 or float16", advice="MegEngine has no other."
        )


def parameter(array: np.ndarray, device: Any) -> Any:
    """A parameter with these values on a device, by MegEngine's name of it; None is the default one.

    Raises:
        ArgumentError: there is no such device.
    """
    try:
        return megengine.Parameter(array, device=device)
    except RuntimeError as error:  # an unknown name; no such device in this machine
        raise ArgumentError(
            "device", given=repr(device), expected="a device that MegEngine has here", advice=str(error).split("\n")[0]
        ) from error


def named_tensors(layer: Any, spec: MHASpec) -> dict[str, Any]:
    """The module's own parameters, differentiable, by canonical name: the packed vector's parts, weights (in, out)."""
    functional, shapes = megengine.functional, spec.parameter_shapes()
    (entry,) = mapping.table("megengine")["layouts"]["megengine"]["tensors"]
    names = [name for name in entry["parts"] if name in shapes]
    ends = list(itertools.accumulate(math.prod(shapes[name]) for name in names))[:-1]
    parts = functional.split(functional.reshape(layer.io_weight_bias, (-1,)), ends)
    found = {name: functional.reshape(part, shapes[name][::-1]) for name, part in zip(names, parts)}
    if spec.add_bias_kv:
        found.update({name: functional.reshape(getattr(layer, name), (-1,)) for name in ("bias_k", "bias_v")})
    return found
