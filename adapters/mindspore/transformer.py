"""MindSpore's transformer layers and stacks: to and from the canonical form.

2.10's TransformerEncoder and TransformerDecoder make layers of their own from the attributes of the one that they are
given, and lose its weights; so all weights are loaded after the whole was built, by their names in it. A *composed* one
has our drop-in attentions, which answer rightly where the native ones do not (a bool padding mask beside a float mask,
one compiled graph for self- and cross-attention).
"""

from __future__ import annotations

import functools
from typing import Any

import mindspore
import numpy as np

from mhabridge.dropin import changed_methods
from mhabridge.errors import UnsupportedError, WeightsError
from mhabridge.transformer import (
    LayerParts,
    NativeTransformer,
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
from mhabridge.transformer_weights import TransformerWeights, names_in

from . import layers as attentions
from .dropin import MultiheadAttention
from .native import FRAMEWORK, refuse_device, version
from .parameters import spec_of as attention_spec
from .tensors import to_numpy, to_tensor

CLASSES = {
    "encoder_layer": mindspore.nn.TransformerEncoderLayer,
    "decoder_layer": mindspore.nn.TransformerDecoderLayer,
    "encoder": mindspore.nn.TransformerEncoder,
    "decoder": mindspore.nn.TransformerDecoder,
    "transformer": mindspore.nn.Transformer,
}


def is_layer(layer: Any) -> bool:
    """Whether this is one of MindSpore's transformer layers or stacks."""
    return isinstance(layer, tuple(CLASSES.values()))


def extract(layer: Any) -> tuple[TransformerSpec, TransformerWeights]:
    """The spec and the weights (copies) of a transformer layer or stack.

    Raises:
        UnsupportedError: a part that is no plain one, layers that differ, or a construct of its own.
        WeightsError: parameters that such a layer does not have.
    """
    spec = spec_of(layer)
    require_separate(
        {path: _at(layer, path) for path in (*spec.attentions(), *names_in(FRAMEWORK, version(), spec).values())}
    )
    named = {name: to_numpy(parameter) for name, parameter in layer.parameters_and_names()}
    return spec, TransformerWeights.from_layout(FRAMEWORK, named, spec, version())


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
    """MindSpore's own layer or stack; without weights it keeps the initial values that MindSpore gives it.

    Args:
        spec: what to build.
        weights: its parameters.
        device: None: MindSpore's device belongs to the process.
        notes: a list that is filled with what it has beyond the spec.
        mode: with "composed" its attentions are our drop-ins.

    Raises:
        UnsupportedError: this version's classes cannot express the spec.
    """
    refuse_device(device)
    form = native_transformer(spec, FRAMEWORK, version())
    if "dtype" in form.kwargs:
        form.kwargs["dtype"] = getattr(mindspore, spec.dtype)
    model = _made(form)
    if mode == "composed":
        for path in spec.attentions():
            _put(model, path, form.spec)
        for name, parameter in model.parameters_and_names():
            parameter.name = name  # a checkpoint has them by this name: two of one name would be one
    if weights is not None:
        weights = weights if form.spec == spec else weights.with_bias(form.spec)
        _load(model, weights.to_layout(FRAMEWORK, form.spec, version()))
    elif form.spec != spec:
        _zero_biases(model)
    if notes is not None:
        form_name = (
            "composed: MindSpore's own layers, with drop-ins as their attentions"
            if mode == "composed"
            else "native: MindSpore's own layers"
        )
        notes.extend([form_name, *form.notes])
    return model


def traits(layer: Any) -> TransformerTraits:
    """Training flag, requires_grad of each parameter, and kind of device (the process's)."""
    spec = spec_of(layer)
    named = dict(layer.parameters_and_names())
    names = names_in(FRAMEWORK, version(), spec)
    return TransformerTraits(
        one_mode({name: bool(cell.training) for name, cell in layer.cells_and_names()}),
        {path: attentions.traits(_at(layer, path)) for path in spec.attentions()},
        {path: bool(named[name].requires_grad) for path, name in names.items()},
        attentions.process_device(),
    )


def set_traits(layer: Any, wanted: TransformerTraits) -> None:
    """The inverse of ``traits``.

    Raises:
        UnsupportedError: another kind of device than the process's, or a packed parameter that is frozen in part.
    """
    spec = spec_of(layer)
    named = dict(layer.parameters_and_names())
    for path in spec.attentions():
        attentions.set_traits(_at(layer, path), wanted.attention[path])
    for path, name in names_in(FRAMEWORK, version(), spec).items():
        named[name].requires_grad = wanted.trainable.get(path, False)  # a stand-in of zeros stays zero
    layer.set_train(wanted.training)


def _kind(layer: Any, path: str) -> str:
    for kind, native in CLASSES.items():
        if isinstance(layer, native) and not changed_methods(layer, native):
            return kind
    raise UnsupportedError(
        path,
        given=f"{type(layer).__module__}.{type(layer).__qualname__}",
        expected="one of MindSpore's own transformer layers, with its own construct",
        advice="What it computes is not known. Move the attentions in it one by one.",
    )


def _parts(layer: Any, kind: str, path: str) -> LayerParts:
    names = ("self_attn",) if kind == "encoder_layer" else ("self_attn", "multihead_attn")
    dropouts = ("dropout", "dropout1", "dropout2") + (("dropout3",) if len(names) == 2 else ())
    for name in names:
        attentions.require_plain(getattr(layer, name))
    norms = {
        name: _norm(getattr(layer, name), join(path, name)) for name in ("norm1", "norm2", "norm3")[: len(names) + 1]
    }
    linears = [_linear(layer, number, path) for number in (1, 2)]
    return LayerParts(
        path,
        kind,
        {name: attention_spec(getattr(layer, name)) for name in names},
        int(linears[0].weight.shape[0]),
        {name: _dropout(getattr(layer, name), join(path, name)) for name in dropouts},
        _activation(layer.activation),
        {name: norm.eps for name, norm in norms.items()},
        layer.norm_first,
        {
            **{name: norm.bias for name, norm in norms.items()},
            **{f"linear{n}": linear.bias is not None for n, linear in enumerate(linears, 1)},
        },
    )


def _linear(layer: Any, number: int, path: str) -> Any:
    name = f"dense{number}" if hasattr(layer, f"dense{number}") else f"linear{number}"
    found = require_part(getattr(layer, name), join(path, name), "construct", mindspore.nn.Dense)
    if getattr(found, "activation", None) is not None:
        raise UnsupportedError(
            join(path, name),
            given=f"a Dense with the activation {found.activation}",
            expected="one without",
            advice="No other framework's linear map has one.",
        )
    return found


def _dropout(part: Any, path: str) -> float:
    return float(require_part(part, path, "construct", mindspore.nn.Dropout).p)


def _norm(norm: Any, path: str) -> Norm:
    if type(norm) is not mindspore.nn.LayerNorm or "construct" in vars(norm) or len(norm.normalized_shape) != 1:
        raise UnsupportedError(
            path,
            given=str(norm),
            expected="a mindspore.nn.LayerNorm over the features",
            advice="Other norms are not moved.",
        )
    return Norm(norm.epsilon, getattr(norm, "beta", None) is not None)


def _activation(found: Any) -> str:
    if found is mindspore.ops.relu or isinstance(found, mindspore.nn.ReLU):
        return "relu"
    # nn.GELU approximates by tanh unless told otherwise.
    if found is mindspore.ops.gelu or (isinstance(found, mindspore.nn.GELU) and found.approximate is False):
        return "gelu"
    return str(found)


def _made(form: NativeTransformer) -> Any:
    spec = form.spec
    if spec.kind in ("encoder_layer", "decoder_layer"):
        return CLASSES[spec.kind](**form.kwargs)
    if spec.kind != "transformer":
        return _stack(form, spec.kind)
    extra = {name: form.kwargs[name] for name in ("batch_first", "dtype") if name in form.kwargs}
    encoder, decoder = _stack(form, "encoder"), _stack(form, "decoder")
    return CLASSES["transformer"](
        spec.embed_dim, spec.num_heads, custom_encoder=encoder, custom_decoder=decoder, **extra
    )


def _stack(form: NativeTransformer, part: str) -> Any:
    spec = form.spec
    eps = getattr(spec, f"{part}_norm_eps")
    norm = None
    if eps is not None:
        kind = {"dtype": form.kwargs["dtype"]} if "dtype" in form.kwargs else {}
        norm = mindspore.nn.LayerNorm((spec.embed_dim,), epsilon=eps, **kind)
    count = getattr(spec, f"num_{part}_layers")
    return CLASSES[part](CLASSES[f"{part}_layer"](**form.kwargs), count, norm=norm)


def _at(model: Any, path: str) -> Any:
    """A part by its path; the layers of a stack are in a list."""
    return functools.reduce(
        lambda part, name: part[int(name)] if name.isdigit() else getattr(part, name), path.split("."), model
    )


def _put(model: Any, path: str, spec: TransformerSpec) -> None:
    parent, _, name = path.rpartition(".")
    owner = _at(model, parent) if parent else model
    attention = MultiheadAttention(
        spec.embed_dim,
        spec.num_heads,
        dropout=spec.dropout,
        batch_first=spec.batch_first,
        dtype=getattr(mindspore, spec.dtype),
    )
    own = dict(getattr(owner, name).parameters_and_names())
    for parameter_name, parameter in attention.parameters_and_names():
        parameter.set_data(own[parameter_name])
    attention.set_train(owner.training)
    setattr(owner, name, attention)


def _load(model: Any, named: dict[str, np.ndarray]) -> None:
    parameters = dict(model.parameters_and_names())
    if set(parameters) != set(named):
        odd = ", ".join(sorted(set(parameters) ^ set(named))[:8])
        raise WeightsError(odd, given="on one side only", expected="the same parameters on both sides")
    for name, array in named.items():
        if tuple(parameters[name].shape) != array.shape:
            raise WeightsError(name, given=f"shape {array.shape}", expected=f"shape {tuple(parameters[name].shape)}")
        parameters[name].set_data(to_tensor(array))


def _zero_biases(model: Any) -> None:
    for name, parameter in model.parameters_and_names():
        if name.endswith(("bias", "beta")):
            parameter.set_data(to_tensor(np.zeros(parameter.shape, to_numpy(parameter).dtype)))
