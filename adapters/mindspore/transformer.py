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

from mhabridge import dropin
from mhabridge.errors import UnsupportedError, WeightsError
from mhabridge.spec import MHASpec
from mhabridge.transformer import NativeTransformer, TransformerSpec, native_transformer
from mhabridge.transformer_reading import Linear, Norm, Reader, TransformerTraits, at, one_mode
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
    return READER.reads(layer)


def extract(layer: Any) -> tuple[TransformerSpec, TransformerWeights]:
    """The spec and the weights (copies) of a transformer layer or stack.

    Raises:
        UnsupportedError: a part that is no plain one, layers that differ, or a construct of its own.
        WeightsError: parameters that such a layer does not have.
    """
    spec = spec_of(layer)
    dropin.require_separate(
        {path: at(layer, path) for path in (*spec.attentions(), *names_in(FRAMEWORK, version(), spec).values())}
    )
    named = {name: to_numpy(parameter) for name, parameter in layer.parameters_and_names()}
    return spec, TransformerWeights.from_layout(FRAMEWORK, named, spec, version())


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
        {path: attentions.traits(at(layer, path)) for path in spec.attentions()},
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
        attentions.set_traits(at(layer, path), wanted.attention[path])
    for path, name in names_in(FRAMEWORK, version(), spec).items():
        named[name].requires_grad = wanted.trainable.get(path, False)  # a stand-in of zeros stays zero
    layer.set_train(wanted.training)


def _attention(attention: Any) -> MHASpec:
    attentions.require_plain(attention)
    return attention_spec(attention)


def _linear(part: Any, path: str) -> Linear:
    dropin.require_part(part, path, "construct", mindspore.nn.Dense)
    if getattr(part, "activation", None) is not None:
        raise UnsupportedError(
            path,
            given=f"a Dense with the activation {part.activation}",
            expected="one without",
            advice="No other framework's linear map has one.",
        )
    return Linear(int(part.weight.shape[0]), part.bias is not None)


def _dropout(part: Any, path: str) -> float:
    return float(dropin.require_part(part, path, "construct", mindspore.nn.Dropout).p)


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
    if found is mindspore.ops.relu or dropin.is_part(found, "construct", mindspore.nn.ReLU):
        return "relu"
    # nn.GELU approximates by tanh unless told otherwise.
    own = dropin.is_part(found, "construct", mindspore.nn.GELU)
    if found is mindspore.ops.gelu or (own and found.approximate is False):
        return "gelu"
    return str(found)


READER = Reader(
    CLASSES,
    "one of MindSpore's own transformer layers",
    "construct",
    _attention,
    _linear,
    _dropout,
    _norm,
    _activation,
    {"linear1": "dense1", "linear2": "dense2"},  # in newer versions
)


def _made(form: NativeTransformer) -> Any:
    def whole(encoder: Any, decoder: Any) -> Any:
        extra = {name: form.kwargs[name] for name in ("batch_first", "dtype") if name in form.kwargs}
        sizes = (form.spec.embed_dim, form.spec.num_heads)
        return mindspore.nn.Transformer(*sizes, custom_encoder=encoder, custom_decoder=decoder, **extra)

    return form.assemble(lambda kind: CLASSES[kind](**form.kwargs), functools.partial(_stack, form), whole)


def _stack(form: NativeTransformer, part: str, layer: Any) -> Any:
    spec = form.spec
    eps = getattr(spec, f"{part}_norm_eps")
    norm = None
    if eps is not None:
        kind = {"dtype": form.kwargs["dtype"]} if "dtype" in form.kwargs else {}
        norm = mindspore.nn.LayerNorm((spec.embed_dim,), epsilon=eps, **kind)
    return CLASSES[part](layer, getattr(spec, f"num_{part}_layers"), norm=norm)


def _put(model: Any, path: str, spec: TransformerSpec) -> None:
    parent, _, name = path.rpartition(".")
    owner = at(model, parent)
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
