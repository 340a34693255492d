"""The transformer layers and stacks of this package, to and from the canonical form."""

from __future__ import annotations

from typing import Any

import megengine.module
import numpy as np

from mhabridge import dropin
from mhabridge.errors import UnsupportedError
from mhabridge.spec import MHASpec
from mhabridge.transformer import NativeTransformer, TransformerSpec, native_transformer
from mhabridge.transformer_reading import Linear, Norm, Reader, TransformerTraits, at, one_mode
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
    return READER.reads(layer)


def extract(layer: Any) -> tuple[TransformerSpec, TransformerWeights]:
    """The spec and the weights (copies) of a transformer layer or stack.

    Raises:
        UnsupportedError: a part that is no plain one, layers that differ, or a forward of its own.
        WeightsError: parameters that such a layer does not have.
    """
    spec = spec_of(layer)
    dropin.require_separate({path: at(layer, path) for path in (*spec.attentions(), *spec.parameter_shapes())})
    named = {name: np.array(tensor.numpy()) for name, tensor in layer.named_parameters()}
    return spec, TransformerWeights.from_layout(FRAMEWORK, named, spec)


def spec_of(layer: Any) -> TransformerSpec:
    """What the layer or stack is."""
    return READER.spec(layer)


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
    model = _made(form, device)
    if weights is not None:
        _load(model, weights.to_layout(FRAMEWORK, spec), device)
    if notes is not None:
        notes.append("composed: " + ("asked for" if mode == "composed" else _NONE))
    return model


def traits(layer: Any) -> TransformerTraits:
    """Training flag and kind of device; see ``traits`` of an attention."""
    spec = spec_of(layer)
    found = {path: attentions.traits(at(layer, path)) for path in spec.attentions()}
    mode = one_mode({name: module.training for name, module in layer.named_modules()})
    trainable = dict.fromkeys(spec.parameter_shapes(), True)
    return TransformerTraits(mode, found, trainable, next(iter(found.values())).device)


def set_traits(layer: Any, wanted: TransformerTraits) -> None:
    """The inverse of ``traits``.

    Raises:
        UnsupportedError: a parameter is frozen; see ``traits`` of an attention.
    """
    for path in spec_of(layer).attentions():
        attentions.set_traits(at(layer, path), wanted.attention[path])
    attentions.refuse_frozen(wanted.trainable)
    layer.train(wanted.training)


def _attention(attention: Any) -> MHASpec:
    attentions.require_plain(attention)
    return attention_spec(attention)


def _linear(part: Any, path: str) -> Linear:
    dropin.require_part(part, path, "forward", megengine.module.Linear)
    return Linear(part.out_features, part.bias is not None)


def _dropout(part: Any, path: str) -> float:
    return float(dropin.require_part(part, path, "forward", own.Dropout).drop_prob)


def _norm(norm: Any, path: str) -> Norm:
    dropin.require_part(norm, path, "forward", own.LayerNorm, megengine.module.LayerNorm)
    if not norm.affine or len(norm.normalized_shape) != 1:
        raise UnsupportedError(
            path,
            given=str(norm),
            expected="a megengine.module.LayerNorm over the features, with a weight",
            advice="Other norms are not moved.",
        )
    return Norm(norm.eps, norm.bias is not None)


READER = Reader(
    CLASSES,
    "a transformer layer of mhabridge.adapters.megengine",
    "forward",
    _attention,
    _linear,
    _dropout,
    _norm,
    str,
)


def _made(form: NativeTransformer, device: Any) -> Any:
    spec = form.spec

    def stack(part: str, layer: Any) -> Any:
        eps, norm = getattr(spec, f"{part}_norm_eps"), None
        if eps is not None:
            norm = own.set_kind(own.LayerNorm(spec.embed_dim, eps, spec.bias), spec.dtype, device)
        return CLASSES[part](layer, getattr(spec, f"num_{part}_layers"), norm)

    def whole(encoder: Any, decoder: Any) -> Any:
        return own.Transformer(spec.embed_dim, spec.num_heads, custom_encoder=encoder, custom_decoder=decoder)

    return form.assemble(lambda kind: CLASSES[kind](**form.kwargs, device=device), stack, whole)


def _load(model: Any, named: dict[str, np.ndarray], device: Any) -> None:
    for name, array in named.items():
        parent, _, last = name.rpartition(".")
        setattr(at(model, parent), last, parameter(array, device))
