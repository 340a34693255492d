"""The transformer layers and stacks of this package, to and from the canonical form."""

from __future__ import annotations

import functools
from typing import Any

import megengine.module
import numpy as np

from mhabridge.dropin import changed_methods
from mhabridge.errors import UnsupportedError
from mhabridge.transformer import (
    LayerParts,
    Norm,
    TransformerSpec,
    TransformerTraits,
    join,
    native_transformer,
    one_mode,
    read_spec,
    require_part,
    require_separate,
)
from mhabridge.transformer_weights import TransformerWeights

from . import layers as attentions
from . import transformer_layers as own
from .native import FRAMEWORK, version
from .parameters import parameter, refuse_dtype
from .parameters import spec_of as attention_spec

CLASSES: dict[str, Any] = {
    "encoder_layer": own.TransformerEncoderLayer,
    "decoder_layer": own.TransformerDecoderLayer,
    "encoder": own.TransformerEncoder,
    "decoder": own.TransformerDecoder,
    "transformer": own.Transformer,
}


_NONE = "MegEngine has no transformer layers; mhabridge.adapters.megengine has."


def is_layer(layer: Any) -> bool:
    """Whether this is one of the transformer layers or stacks of this package."""
    return isinstance(layer, tuple(CLASSES.values()))


def extract(layer: Any) -> tuple[TransformerSpec, TransformerWeights]:
    """The spec and the weights (copies) of a transformer layer or stack.

    Raises:
        UnsupportedError: a part that is no plain one, layers that differ, or a forward of its own.
        WeightsError: parameters that such a layer does not have.
    """
    spec = spec_of(layer)
    require_separate({path: _at(layer, path) for path in (*spec.attentions(), *spec.parameter_shapes())})
    named = {name: np.array(tensor.numpy()) for name, tensor in layer.named_parameters()}
    return spec, TransformerWeights.from_layout(FRAMEWORK, named, spec)


def spec_of(layer: Any) -> TransformerSpec:
    """What the layer or stack is."""
    return read_spec(layer, _kind, _parts, _norm)


def build(
    spec: TransformerSpec,
    weights: TransformerWeights | None = None,
    *,
    device: Any = None,
    notes: list[str] | None = None,
    mode: str = "auto",
) -> Any:
    """A layer or stack of this package: MegEngine has none of its own, so it is composed in any case.

    Args:
        spec: what to build.
        weights: its parameters; None for PyTorch's initial values.
        device: a MegEngine device name, or None for the default one.
        notes: a list that is filled with what was built.
        mode: not "native".

    Raises:
        UnsupportedError: a dtype that MegEngine does not have, or the mode "native".
    """
    if mode == "native":
        raise UnsupportedError("mode", given="'native'", expected="'auto' or 'composed'", advice=_NONE)
    refuse_dtype(spec.attention)
    form = native_transformer(spec, FRAMEWORK, version())
    model = _made(spec, {**form.kwargs, "device": device})
    if weights is not None:
        _load(model, weights.to_layout(FRAMEWORK, spec), device)
    if notes is not None:
        notes.append("composed: " + ("asked for" if mode == "composed" else _NONE))
    return model


def traits(layer: Any) -> TransformerTraits:
    """Training flag and kind of device; see ``traits`` of an attention."""
    spec = spec_of(layer)
    found = {path: attentions.traits(_at(layer, path)) for path in spec.attentions()}
    mode = one_mode({name: module.training for name, module in layer.named_modules()})
    trainable = dict.fromkeys(spec.parameter_shapes(), True)
    return TransformerTraits(mode, found, trainable, next(iter(found.values())).device)


def set_traits(layer: Any, wanted: TransformerTraits) -> None:
    """The inverse of ``traits``.

    Raises:
        UnsupportedError: a parameter is frozen; see ``traits`` of an attention.
    """
    for path in spec_of(layer).attentions():
        attentions.set_traits(_at(layer, path), wanted.attention[path])
    attentions.refuse_frozen(wanted.trainable)
    layer.train(wanted.training)


def _kind(layer: Any, path: str) -> str:
    for kind, native in CLASSES.items():
        if isinstance(layer, native) and not changed_methods(layer, native):
            return kind
    raise UnsupportedError(
        path,
        given=f"{type(layer).__module__}.{type(layer).__qualname__}",
        expected="a transformer layer of mhabridge.adapters.megengine, with its own forward",
        advice="What it computes is not known. Move the attentions in it one by one.",
    )


def _parts(layer: Any, kind: str, path: str) -> LayerParts:
    names = ("self_attn",) if kind == "encoder_layer" else ("self_attn", "multihead_attn")
    dropouts = ("dropout", "dropout1", "dropout2") + (("dropout3",) if len(names) == 2 else ())

    def part(name: str, known: type) -> Any:
        return require_part(getattr(layer, name), join(path, name), "forward", known)

    for name in names:
        attentions.require_plain(getattr(layer, name))
    numbered = ("norm1", "norm2", "norm3")[: len(names) + 1]
    norms = {name: _norm(getattr(layer, name), join(path, name)) for name in numbered}
    biases = {name: norm.bias for name, norm in norms.items()}
    biases.update({name: part(name, megengine.module.Linear).bias is not None for name in ("linear1", "linear2")})
    return LayerParts(
        path,
        kind,
        {name: attention_spec(getattr(layer, name)) for name in names},
        part("linear1", megengine.module.Linear).out_features,
        {name: part(name, own.Dropout).drop_prob for name in dropouts},
        layer.activation,
        {name: norm.eps for name, norm in norms.items()},
        layer.norm_first,
        biases,
    )


def _norm(norm: Any, path: str) -> Norm:
    require_part(norm, path, "forward", own.LayerNorm, megengine.module.LayerNorm)
    if not norm.affine or len(norm.normalized_shape) != 1:
        raise UnsupportedError(
            path,
            given=str(norm),
            expected="a megengine.module.LayerNorm over the features, with a weight",
            advice="Other norms are not moved.",
        )
    return Norm(norm.eps, norm.bias is not None)


def _made(spec: TransformerSpec, kwargs: dict[str, Any]) -> Any:
    if spec.kind in ("encoder_layer", "decoder_layer"):
        return CLASSES[spec.kind](**kwargs)
    if spec.kind != "transformer":
        return _stack(spec, spec.kind, kwargs)
    encoder, decoder = _stack(spec, "encoder", kwargs), _stack(spec, "decoder", kwargs)
    return own.Transformer(spec.embed_dim, spec.num_heads, custom_encoder=encoder, custom_decoder=decoder)


def _stack(spec: TransformerSpec, part: str, kwargs: dict[str, Any]) -> Any:
    eps, norm = getattr(spec, f"{part}_norm_eps"), None
    if eps is not None:
        norm = own.set_kind(own.LayerNorm(spec.embed_dim, eps, spec.bias), spec.dtype, kwargs["device"])
    return CLASSES[part](CLASSES[f"{part}_layer"](**kwargs), getattr(spec, f"num_{part}_layers"), norm)


def _at(model: Any, path: str) -> Any:
    """A part by its path; the layers of a stack are in a list."""
    return functools.reduce(
        lambda part, name: part[int(name)] if name.isdigit() else getattr(part, name), path.split("."), model
    )


def _load(model: Any, named: dict[str, np.ndarray], device: Any) -> None:
    for name, array in named.items():
        parent, _, last = name.rpartition(".")
        setattr(_at(model, parent) if parent else model, last, parameter(array, device))
