"""What a layer of PyTorch holds: its spec, and its parameters by their native and by canonical names."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mhabridge.dropin import plain, require_separate
from mhabridge.errors import UnsupportedError, WeightsError
from mhabridge.live import remembered_spec, spec_of_values
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights

from .tensors import compiling, to_numpy, to_tensor

_LINEAR = frozenset({"weight", "bias"})
ATTENTION = frozenset({"in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"})


def require_parameters(part: torch.nn.Module, path: str = "", names: frozenset[str] = _LINEAR) -> None:
    """Raise for weights that a hook makes before each call of their layer: what is there is from the last one.

    Pruning does that, and PyTorch's older weight and spectral norms. Parametrizations, the newer ones, make them
    whenever they are asked for.

    Args:
        part: an attention layer or a linear map.
        path: of the part.
        names: what it may have as parameters.

    Raises:
        UnsupportedError: naming the weights.
    """
    own = vars(part)
    if names <= own["_parameters"].keys():  # all there, and None where the layer has none
        return
    made = sorted(name for name in names - own["_parameters"].keys() if name in own)
    if made:
        raise UnsupportedError(
            ", ".join(f"{path}.{name}" if path else name for name in made),
            given="a tensor that a hook makes before each call of the layer (pruning, weight norm, spectral norm)",
            expected="parameters",
            advice="Make it permanent first (torch.nn.utils.prune.remove, remove_weight_norm, remove_spectral_norm).",
        )


def spec_of(layer: torch.nn.MultiheadAttention) -> MHASpec:
    """What the layer is."""
    if compiling() and _is_as_made(layer):
        return layer.made_of  # type: ignore[no-any-return]
    own = vars(layer)
    in_bias, out_bias, dtype = _told(layer)
    # torch.compile warns about a cache and goes round it; and where a float is symbolic, no spec can be made.
    beyond = own.get("beyond")
    return (spec_of_values if compiling() else remembered_spec)(
        layer.embed_dim,
        layer.num_heads,
        layer.kdim,
        layer.vdim,
        layer.dropout,
        in_bias is not None,
        out_bias is not None,
        layer.bias_k is not None,
        layer.add_zero_attn,
        own.get("batch_first", False),  # since 1.9
        dtype,
        tuple(beyond.items()) if beyond else (),
    )


def _told(layer: torch.nn.MultiheadAttention) -> tuple[Any, Any, Any]:
    """The biases and the dtype, from where a Module keeps them: as attributes they take longer than all the rest."""
    if not compiling():
        try:
            out = vars(vars(layer)["_modules"]["out_proj"])["_parameters"]
            return vars(layer)["_parameters"]["in_proj_bias"], out["bias"], out["weight"].dtype
        except KeyError:  # parametrized ones are made when they are asked for
            pass
    return layer.in_proj_bias, layer.out_proj.bias, layer.out_proj.weight.dtype


def _is_as_made(layer: torch.nn.MultiheadAttention) -> bool:
    """Whether a drop-in still is what it was made as, in what people change."""
    made = vars(layer).get("made_of")
    if made is None or made.dropout != layer.dropout or made.batch_first != layer.batch_first:
        return False
    return getattr(torch, made.dtype) is layer.out_proj.weight.dtype


def weights_of(layer: torch.nn.MultiheadAttention, spec: MHASpec) -> MHAWeights:
    """Its weights, as copies.

    Raises:
        WeightsError: parameters that such a layer does not have, or of another shape, or without values (meta).
    """
    require_separate(layer.state_dict(keep_vars=True))
    named = {name: to_numpy(tensor) for name, tensor in layer.state_dict().items()}
    return MHAWeights.from_layout("torch", named, plain(spec))


def load(layer: torch.nn.MultiheadAttention, named: dict[str, np.ndarray]) -> None:
    """Give the parameters their values, by native name.

    Raises:
        WeightsError: a parameter without a value, a value without a parameter, or one of another shape.
    """
    state = {name: to_tensor(array) for name, array in named.items()}
    own = layer.state_dict()
    for name in set(own) - set(state):
        if name != "out_proj.bias":
            raise WeightsError(name, given="nothing", expected=f"shape {tuple(own[name].shape)}")
        state[name] = torch.zeros_like(own[name])  # PyTorch 1.8.1's left-over
    layer.load_state_dict(state, strict=True)


def owners(layer: torch.nn.MultiheadAttention) -> dict[str, str]:
    """The native parameter that holds each canonical one."""
    packed = layer.in_proj_weight is not None
    found = {f"{x}_weight": "in_proj_weight" if packed else f"{x}_proj_weight" for x in "qkv"}
    if layer.in_proj_bias is not None:
        found.update({f"{x}_bias": "in_proj_bias" for x in "qkv"})
    found["out_weight"] = "out_proj.weight"
    if layer.out_proj.bias is not None:
        found["out_bias"] = "out_proj.bias"
    if layer.bias_k is not None:
        found.update(bias_k="bias_k", bias_v="bias_v")
    return found


def named_tensors(layer: torch.nn.MultiheadAttention) -> dict[str, torch.Tensor]:
    """The layer's own parameters, differentiable, by canonical name."""
    if layer.in_proj_weight is None:
        found = {name: getattr(layer, f"{name[0]}_proj_weight") for name in ("q_weight", "k_weight", "v_weight")}
    else:
        found = dict(zip(("q_weight", "k_weight", "v_weight"), layer.in_proj_weight.chunk(3)))
    found["out_weight"] = layer.out_proj.weight
    if layer.in_proj_bias is not None:
        found.update(zip(("q_bias", "k_bias", "v_bias"), layer.in_proj_bias.chunk(3)))
    found.update(out_bias=layer.out_proj.bias, bias_k=layer.bias_k, bias_v=layer.bias_v)
    return {
        name: tensor.reshape(-1) if tensor.dim() == 3 else tensor
        for name, tensor in found.items()
        if tensor is not None
    }
