"""PyTorch's transformer layers and stacks: to and from the canonical form.

A stack is built without nested tensors: with them, padded positions would come back as zeros, and trailing ones not at
all, which no other framework does. A *composed* one has our drop-in attentions; its layers get the activation as a
function of ours, because PyTorch's fast path, which would go round the attention, is taken for its own functions only.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch

from mhabridge import dropin
from mhabridge.errors import UnsupportedError
from mhabridge.mapping import version_key
from mhabridge.spec import MHASpec
from mhabridge.transformer import NativeTransformer, TransformerSpec, native_transformer
from mhabridge.transformer_reading import Linear, Norm, Reader, TransformerTraits, at, one_mode
from mhabridge.transformer_weights import TransformerWeights, names_in

from . import layers as attentions
from .dropin import MultiheadAttention
from .native import FRAMEWORK, on_device, version
from .parameters import require_parameters
from .parameters import spec_of as attention_spec
from .tensors import to_numpy, to_tensor

CLASSES = {
    "encoder_layer": torch.nn.TransformerEncoderLayer,
    "decoder_layer": torch.nn.TransformerDecoderLayer,
    "encoder": torch.nn.TransformerEncoder,
    "decoder": torch.nn.TransformerDecoder,
    "transformer": torch.nn.Transformer,
}


def relu(x: torch.Tensor) -> torch.Tensor:
    """The activation of a composed layer."""
    return torch.nn.functional.relu(x)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """The activation of a composed layer."""
    return torch.nn.functional.gelu(x)


def is_layer(layer: Any) -> bool:
    """Whether this is one of PyTorch's transformer layers or stacks."""
    return READER.reads(layer)


def extract(layer: torch.nn.Module) -> tuple[TransformerSpec, TransformerWeights]:
    """The spec and the weights (copies) of a transformer layer or stack.

    Raises:
        UnsupportedError: a part that is no plain one, layers that differ, or a forward of its own.
        WeightsError: parameters that such a layer does not have.
    """
    spec = spec_of(layer)
    dropin.require_separate(layer.state_dict(keep_vars=True))
    named = {name: to_numpy(tensor) for name, tensor in layer.state_dict().items()}
    return spec, TransformerWeights.from_layout(FRAMEWORK, named, spec)


def spec_of(layer: torch.nn.Module) -> TransformerSpec:
    """What the layer or stack is."""
    return READER.spec(layer)


def build(
    spec: TransformerSpec,
    weights: TransformerWeights | None = None,
    *,
    device: Any = None,
    notes: list[str] | None = None,
    mode: str = "auto",
) -> torch.nn.Module:
    """PyTorch's own layer or stack; without weights it keeps the initial values that PyTorch gives it.

    Args:
        spec: what to build.
        weights: its parameters.
        device: where to put it.
        notes: a list that is filled with what it has beyond the spec.
        mode: with "composed" its attentions are our drop-ins.

    Raises:
        UnsupportedError: this version's classes cannot express the spec.
    """
    form = native_transformer(spec, FRAMEWORK, version())
    composed = mode == "composed"
    if composed and version_key(version()) >= (1, 9):  # 1.8 takes no function, and has no fast path
        form.kwargs["activation"] = {"relu": relu, "gelu": gelu}[spec.activation]
    model = _made(form).to(dtype=getattr(torch, spec.dtype))
    if composed:
        for path in spec.attentions():
            _put(model, path, MultiheadAttention(**_dropin_kwargs(form.spec)))
    if weights is not None:
        weights = weights if form.spec == spec else weights.with_bias(form.spec)
        named = weights.to_layout(FRAMEWORK, form.spec, version())
        model.load_state_dict({name: to_tensor(array) for name, array in named.items()}, strict=True)
    elif form.spec != spec:
        _zero_biases(model)
    if notes is not None:
        form_name = (
            "composed: PyTorch's own layers, with drop-ins as their attentions"
            if mode == "composed"
            else "native: PyTorch's own layers"
        )
        notes.extend([form_name, *form.notes])
    return on_device(model, device)


def traits(layer: torch.nn.Module) -> TransformerTraits:
    """Training flag, requires_grad of each parameter, and kind of device."""
    spec = spec_of(layer)
    named = dict(layer.named_parameters())
    names = names_in(FRAMEWORK, version(), spec)
    return TransformerTraits(
        one_mode({name: module.training for name, module in layer.named_modules()}),
        {path: attentions.traits(at(layer, path)) for path in spec.attentions()},
        {path: named[name].requires_grad for path, name in names.items()},
        "cpu" if next(iter(named.values())).device.type == "cpu" else "gpu",
    )


def set_traits(layer: torch.nn.Module, wanted: TransformerTraits) -> None:
    """The inverse of ``traits``."""
    spec = spec_of(layer)
    named = dict(layer.named_parameters())
    for path in spec.attentions():
        attentions.set_traits(at(layer, path), wanted.attention[path])
    for path, name in names_in(FRAMEWORK, version(), spec).items():
        named[name].requires_grad_(wanted.trainable.get(path, False))  # a stand-in of zeros stays zero
    layer.train(wanted.training)
    if wanted.device == "gpu":
        layer.to("cuda")


def _attention(attention: Any) -> MHASpec:
    attentions.require_plain(attention)
    return attention_spec(attention)


def _linear(part: Any, path: str) -> Linear:
    dropin.require_part(part, path, "forward", torch.nn.Linear)
    require_parameters(part, path)
    return Linear(part.out_features, part.bias is not None)


def _dropout(part: Any, path: str) -> float:
    return float(dropin.require_part(part, path, "forward", torch.nn.Dropout).p)


def _norm(norm: Any, path: str) -> Norm:
    if (
        type(norm) is not torch.nn.LayerNorm
        or "forward" in vars(norm)
        or norm.weight is None
        or len(norm.normalized_shape) != 1
    ):
        raise UnsupportedError(
            path,
            given=repr(norm),
            expected="a torch.nn.LayerNorm over the features, with a weight",
            advice="Other norms are not moved.",
        )
    return Norm(norm.eps, norm.bias is not None)


def _activation(found: Any) -> str:
    functional, modules = torch.nn.functional, torch.nn
    if found in (functional.relu, torch.relu, relu) or dropin.is_part(found, "forward", modules.ReLU):
        return "relu"
    plain = getattr(found, "approximate", "none") == "none"
    if found in (functional.gelu, gelu) or (dropin.is_part(found, "forward", modules.GELU) and plain):
        return "gelu"
    return repr(found)


READER = Reader(
    CLASSES, "one of PyTorch's own transformer layers", "forward", _attention, _linear, _dropout, _norm, _activation
)


def _stack(form: NativeTransformer, part: str, layer: torch.nn.Module) -> torch.nn.Module:
    spec, native = form.spec, CLASSES[part]
    eps = getattr(spec, f"{part}_norm_eps")
    norm = None
    if eps is not None:
        norm = torch.nn.LayerNorm(spec.embed_dim, eps=eps, **({} if spec.bias else {"bias": False}))
    nested = {"enable_nested_tensor": False} if "enable_nested_tensor" in inspect.signature(native).parameters else {}
    return native(layer, getattr(spec, f"num_{part}_layers"), norm=norm, **nested)


def _made(form: NativeTransformer) -> torch.nn.Module:
    def whole(encoder: torch.nn.Module, decoder: torch.nn.Module) -> torch.nn.Module:
        extra = {name: form.kwargs[name] for name in ("batch_first",) if name in form.kwargs}
        sizes = (form.spec.embed_dim, form.spec.num_heads)
        return torch.nn.Transformer(*sizes, custom_encoder=encoder, custom_decoder=decoder, **extra)

    return form.assemble(lambda kind: CLASSES[kind](**form.kwargs), functools.partial(_stack, form), whole)


def _dropin_kwargs(spec: TransformerSpec) -> dict[str, Any]:
    return {
        "embed_dim": spec.embed_dim,
        "num_heads": spec.num_heads,
        "dropout": spec.dropout,
        "bias": spec.bias,
        "batch_first": spec.batch_first,
        "dtype": getattr(torch, spec.dtype),
    }


def _put(model: torch.nn.Module, path: str, attention: MultiheadAttention) -> None:
    parent, _, name = path.rpartition(".")
    owner = at(model, parent)
    attention.load_state_dict(getattr(owner, name).state_dict())
    attention.train(owner.training)
    setattr(owner, name, attention)


def _zero_biases(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
