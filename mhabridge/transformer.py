"""``TransformerSpec``: the canonical description of a transformer layer, or of a whole stack of them.

What ``MHASpec`` is for one attention layer, this is for PyTorch's TransformerEncoderLayer, TransformerDecoderLayer,
TransformerEncoder, TransformerDecoder and Transformer, which MindSpore has too. Its parts and their parameters are
named by *paths* as PyTorch names them: "layers.0.self_attn", "decoder.layers.1.linear1.weight".

This module also runs inside workers (Python 3.8).
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import numbers
import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from mhabridge import mapping
from mhabridge.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from mhabridge.live import Traits
from mhabridge.spec import MHASpec

KINDS = ("encoder_layer", "decoder_layer", "encoder", "decoder", "transformer")
ACTIVATIONS = ("relu", "gelu")

_ATTENTIONS = {"encoder_layer": ("self_attn",), "decoder_layer": ("self_attn", "multihead_attn")}
_NORMS = {"encoder_layer": ("norm1", "norm2"), "decoder_layer": ("norm1", "norm2", "norm3")}


@dataclasses.dataclass(frozen=True)
class TransformerSpec:
    """What a transformer layer or stack is. The defaults are PyTorch's.

    A layer is one or two attentions (the decoder's second one sees the encoder's output) and a feed-forward part
    ``linear2(activation(linear1(x)))``, each with dropout, a residual connection and a layer norm (Vaswani et al.,
    2017, "Attention Is All You Need", 3.1). All layers of a stack are alike.

    Args:
        kind: "encoder_layer", "decoder_layer", "encoder", "decoder" or "transformer" (an encoder and a decoder).
        embed_dim: features of the input, E (``d_model``).
        num_heads: H (``nhead``).
        dim_feedforward: features between linear1 and linear2.
        dropout: probability in [0, 1], the same at every place where training drops.
        activation: "relu", or "gelu" (by the error function, not its approximation by tanh).
        layer_norm_eps: of the layers' norms.
        norm_first: the norm goes before each part, not after the residual connection.
        bias: linear maps, norms and attentions have biases.
        batch_first: arrays are (N, L, E), else (L, N, E).
        num_encoder_layers: of an encoder or a transformer; 0 for the others.
        num_decoder_layers: of a decoder or a transformer; 0 for the others.
        encoder_norm_eps: of the norm behind the last encoder layer; None for no such norm.
        decoder_norm_eps: of the norm behind the last decoder layer; None for no such norm.
        dtype: of the weights: "float16", "bfloat16", "float32" or "float64".

    Raises:
        ArgumentError: a value out of range, or one that the kind does not have.
        ArgumentTypeError: a value of the wrong type.

    Example:
        >>> spec = TransformerSpec("encoder", embed_dim=8, num_heads=2, num_encoder_layers=2)
        >>> list(spec.attentions())
        ['layers.0.self_attn', 'layers.1.self_attn']
        >>> spec == TransformerSpec.from_json(spec.to_json())
        True
    """

    kind: str
    embed_dim: int
    num_heads: int
    dim_feedforward: int = 2048
    dropout: float = 0.1
    activation: str = "relu"
    layer_norm_eps: float = 1e-5
    norm_first: bool = False
    bias: bool = True
    batch_first: bool = False
    num_encoder_layers: int = 0
    num_decoder_layers: int = 0
    encoder_norm_eps: float | None = None
    decoder_norm_eps: float | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        _among("kind", self.kind, KINDS)
        _among("activation", self.activation, ACTIVATIONS)
        attention = self.attention  # MHASpec checks and normalises what both have
        for name in ("embed_dim", "num_heads", "dropout", "batch_first", "dtype"):
            self._set(name, getattr(attention, name))
        self._set("dim_feedforward", _count("dim_feedforward", self.dim_feedforward, least=1))
        for name in ("norm_first", "bias"):
            if not isinstance(getattr(self, name), bool):
                raise ArgumentTypeError(name, given=repr(getattr(self, name)), expected="True or False")
        self._set("layer_norm_eps", _eps("layer_norm_eps", self.layer_norm_eps))
        for part in ("encoder", "decoder"):
            self._check_stack(part)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_stack(self, part: str) -> None:
        count, eps = getattr(self, f"num_{part}_layers"), getattr(self, f"{part}_norm_eps")
        if self.kind in (part, "transformer"):
            self._set(f"num_{part}_layers", _count(f"num_{part}_layers", count, least=1))
            self._set(f"{part}_norm_eps", None if eps is None else _eps(f"{part}_norm_eps", eps))
        elif count or eps is not None:
            name = f"num_{part}_layers" if count else f"{part}_norm_eps"
            raise ArgumentError(name, given=str(count or eps), expected=f"nothing: kind {self.kind!r} has no {part}")

    @property
    def attention(self) -> MHASpec:
        """The spec of every attention in it."""
        return MHASpec(
            self.embed_dim,
            self.num_heads,
            dropout=self.dropout,
            bias=self.bias,
            batch_first=self.batch_first,
            dtype=self.dtype,
        )

    def layers(self) -> dict[str, str]:
        """The path of every layer, in order, with its kind; a layer by itself has the path ""."""
        if self.kind in _ATTENTIONS:
            return {"": self.kind}
        found = {}
        for part, count in (("encoder", self.num_encoder_layers), ("decoder", self.num_decoder_layers)):
            start = f"{part}.layers" if self.kind == "transformer" else "layers"
            found.update({f"{start}.{number}": f"{part}_layer" for number in range(count)})
        return found

    def attentions(self) -> tuple[str, ...]:
        """The path of every attention, in order."""
        return tuple(join(path, name) for path, kind in self.layers().items() for name in _ATTENTIONS[kind])

    def norms(self) -> dict[str, float]:
        """The path of every layer norm, with its eps."""
        found = {join(path, name): self.layer_norm_eps for path, kind in self.layers().items() for name in _NORMS[kind]}
        for part, eps in (("encoder", self.encoder_norm_eps), ("decoder", self.decoder_norm_eps)):
            if eps is not None:
                found[f"{part}.norm" if self.kind == "transformer" else "norm"] = eps
        return found

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter outside the attentions, by its path; weights are (out, in).

        Example:
            >>> shapes = TransformerSpec("encoder_layer", 4, 2, dim_feedforward=6, bias=False).parameter_shapes()
            >>> shapes["linear1.weight"], shapes["norm1.weight"], len(shapes)
            ((6, 4), (4,), 4)
        """
        wide, inner = self.embed_dim, self.dim_feedforward
        shapes: dict[str, tuple[int, ...]] = {}
        for path in self.layers():
            for name, out, into in (("linear1", inner, wide), ("linear2", wide, inner)):
                shapes[join(path, f"{name}.weight")] = (out, into)
                shapes[join(path, f"{name}.bias")] = (out,)
        for path in self.norms():
            shapes[f"{path}.weight"] = shapes[f"{path}.bias"] = (wide,)
        return {name: shape for name, shape in shapes.items() if self.bias or not name.endswith(".bias")}

    def replace(self, **changes: Any) -> TransformerSpec:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def to_json(self) -> str:
        """The spec as a JSON object, one key a field."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> TransformerSpec:
        """The inverse of ``to_json``.

        Raises:
            ArgumentError: no JSON object, or other fields than a spec's.
        """
        try:
            fields = json.loads(text)
        except (ValueError, TypeError, RecursionError) as error:
            raise ArgumentError("spec", given=f"text that is not JSON ({error})", expected="a JSON object") from error
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(fields, dict) or not {"kind", "embed_dim", "num_heads"} <= set(fields) <= known:
            raise ArgumentError(
                "spec", given=text[:80], expected="an object with fields among " + ", ".join(sorted(known))
            )
        return cls(**fields)


@dataclasses.dataclass(frozen=True)
class LayerParts:
    """What an adapter reads off one native layer, before it is known to be a plain one.

    Args:
        path: of the layer in what it is part of.
        kind: "encoder_layer" or "decoder_layer".
        attentions: the spec of each attention, by its name in the layer.
        dim_feedforward: features between the linear maps.
        dropouts: the probability at every other place that drops, by name.
        activation: "relu" or "gelu", or what it is instead.
        eps: of each norm, by name.
        norm_first: as in ``TransformerSpec``.
        biases: whether each linear map and norm has one, by name.
    """

    path: str
    kind: str
    attentions: dict[str, MHASpec]
    dim_feedforward: int
    dropouts: dict[str, float]
    activation: str
    eps: dict[str, float]
    norm_first: bool
    biases: dict[str, bool]

    def spec(self) -> TransformerSpec:
        """The layer's spec.

        Raises:
            UnsupportedError: its parts differ where a plain layer's agree, or the activation is another one.
        """
        if self.activation not in ACTIVATIONS:
            raise UnsupportedError(
                join(self.path, "activation"),
                given=self.activation,
                expected=" or ".join(ACTIVATIONS),
                advice="No other framework's layer has it; move the attention alone: " + self._attention_path(),
            )
        first = self.attentions["self_attn"]
        spec = TransformerSpec(
            self.kind,
            first.embed_dim,
            first.num_heads,
            self.dim_feedforward,
            self._alike("dropout", {**self.dropouts, "self_attn": first.dropout}),
            self.activation,
            self._alike("eps", self.eps),
            self.norm_first,
            self._alike("bias", {**self.biases, "self_attn": first.bias}),
            first.batch_first,
            dtype=first.dtype,
        )
        for name, attention in self.attentions.items():
            if attention != spec.attention:
                raise UnsupportedError(
                    join(self.path, name),
                    given=str(_difference(attention, spec.attention)),
                    expected="the plain attention of a transformer layer, like its other parts",
                    advice="Move the attention alone: " + self._attention_path(),
                )
        return spec

    def _alike(self, what: str, values: dict[str, Any]) -> Any:
        if len(set(values.values())) == 1:
            return next(iter(values.values()))
        raise UnsupportedError(
            self.path or self.kind,
            given=f"a {what} of " + ", ".join(f"{value} in {name}" for name, value in values.items()),
            expected=f"one {what} in all of the layer, as its constructor gives it",
            advice="Set it alike, or move the parts one by one.",
        )

    def _attention_path(self) -> str:
        return f"mb.extract(model.{join(self.path, 'self_attn')})."


def require_part(part: Any, path: str, method: str, *classes: type) -> Any:
    """The part itself, which must be one of a framework's own and compute what that does.

    Args:
        part: a linear map, a dropout or a norm.
        path: of the part.
        method: the name of the method that computes: "forward" or "construct".
        classes: what it may be; a subclass of one that computes the same will do.

    Raises:
        UnsupportedError: it is another one.
    """
    for known in classes:
        own = inspect.getattr_static(type(part), method, None) is inspect.getattr_static(known, method)
        if isinstance(part, known) and own and method not in vars(part):
            return part
    raise UnsupportedError(
        path,
        given=f"{type(part).__module__}.{type(part).__qualname__}",
        expected=" or ".join(f"{known.__module__.partition('.')[0]}'s {known.__name__}" for known in classes),
        advice="What it computes is not known, so it is not moved. The attentions can be, one by one.",
    )


def require_separate(parts: dict[str, Any]) -> None:
    """Raise for parameters that two parts of a model share: they would be separate after the move.

    Args:
        parts: each parameter, by its path.

    Raises:
        UnsupportedError: two are one.
    """
    seen: dict[int, str] = {}
    for path, part in parts.items():
        other = seen.setdefault(id(part), path)
        if other != path:
            raise UnsupportedError(
                path,
                given=f"shared with {other}",
                expected="parameters of its own",
                advice="Shared ones would be separate afterwards: give each part a copy (copy.deepcopy) first.",
            )


@dataclasses.dataclass(frozen=True)
class Norm:
    """The norm behind a stack's last layer: its eps, and whether it has a bias."""

    eps: float
    bias: bool


def read_spec(
    model: Any,
    kind_of: Callable[[Any, str], str],
    parts_of: Callable[[Any, str, str], LayerParts],
    norm_of: Callable[[Any, str], Norm],
) -> TransformerSpec:
    """The spec of a native layer or stack; all frameworks name its parts alike.

    Args:
        model: the layer or stack.
        kind_of: the kind of a part, given it and its path; raises for one that is not the framework's own.
        parts_of: what one layer is made of, given it, its kind and its path.
        norm_of: a norm's facts, given it and its path.

    Raises:
        UnsupportedError: a part that is no plain one, or layers that differ.
    """
    kind = kind_of(model, "layer")
    if kind in _ATTENTIONS:
        return parts_of(model, kind, "").spec()
    stacks = {"encoder": model.encoder, "decoder": model.decoder} if kind == "transformer" else {kind: model}
    found: dict[str, list[LayerParts]] = {"encoder": [], "decoder": []}
    norms = {}
    for part, stack in stacks.items():
        start = f"{part}." if kind == "transformer" else ""
        _expect(kind_of(stack, part), part, part)
        for number, layer in enumerate(stack.layers):
            path = f"{start}layers.{number}"
            _expect(kind_of(layer, path), f"{part}_layer", path)
            found[part].append(parts_of(layer, f"{part}_layer", path))
        if stack.norm is not None:
            norms[part] = norm_of(stack.norm, f"{start}norm")
    return stack_spec(kind, found["encoder"], found["decoder"], norms)


def _expect(kind: str, wanted: str, path: str) -> None:
    if kind != wanted:
        raise UnsupportedError(path, given=f"a transformer's {kind}", expected=f"{wanted} there")


def stack_spec(
    kind: str, encoder: list[LayerParts], decoder: list[LayerParts], norms: dict[str, Norm]
) -> TransformerSpec:
    """The spec of a stack of layers.

    Args:
        kind: "encoder", "decoder" or "transformer".
        encoder: its encoder layers.
        decoder: its decoder layers.
        norms: those behind the last layers, by "encoder" and "decoder".

    Raises:
        UnsupportedError: two layers differ, or a norm has a bias and the layers have none (or the other way round).
    """
    layers = [*encoder, *decoder]
    if not layers:
        raise UnsupportedError("layers", given="a stack without any layer", expected="at least one")
    specs = [layer.spec().replace(kind="encoder_layer") for layer in layers]
    for layer, spec in zip(layers, specs):
        if spec != specs[0]:
            raise UnsupportedError(
                layer.path,
                given=str(_difference(spec, specs[0])),
                expected=f"a layer like {layers[0].path}: a stack's layers are alike",
                advice="Move the layers one by one: mb.extract(model.layers[0]).",
            )
    for part, norm in norms.items():
        if norm.bias != specs[0].bias:
            raise UnsupportedError(
                f"the {part}'s norm",
                given=f"bias={norm.bias}, and its layers have bias={specs[0].bias}",
                expected="both alike",
                advice="Give the norm a bias of zeros, or take it away.",
            )
    return specs[0].replace(
        kind=kind,
        num_encoder_layers=len(encoder),
        num_decoder_layers=len(decoder),
        encoder_norm_eps=norms["encoder"].eps if "encoder" in norms else None,
        decoder_norm_eps=norms["decoder"].eps if "decoder" in norms else None,
    )


@dataclasses.dataclass(frozen=True)
class TransformerTraits:
    """What a live transformer layer or stack has beyond its spec and weights.

    Args:
        training: dropout is active.
        attention: the traits of each attention, by its path.
        trainable: whether each other parameter, by its path, takes part in training.
        device: the kind of device that it is on: "cpu" or "gpu".
    """

    training: bool
    attention: dict[str, Traits]
    trainable: dict[str, bool]
    device: str = "cpu"


def one_mode(modes: dict[str, bool]) -> bool:
    """Whether all parts of a model are in training mode.

    Args:
        modes: the mode of each part, by name; the model's own is "".

    Raises:
        UnsupportedError: some are and some are not.
    """
    odd = [name for name, mode in modes.items() if mode != modes[""]]
    if odd:
        raise UnsupportedError(
            ", ".join(odd[:8]),
            given="evaluation mode in a model that trains" if modes[""] else "training mode in a model that does not",
            expected="one mode in all of the model",
            advice="Set one mode for all of it, and this one's again after it was moved.",
        )
    return modes[""]


@dataclasses.dataclass(frozen=True)
class NativeTransformer:
    """How a spec is said by a framework's own classes.

    Args:
        spec: the nearest spec that they can say: it may have biases (of zeros) that the one asked for has not.
        kwargs: one layer's constructor's arguments.
        notes: what differs from the spec that was asked for.
    """

    spec: TransformerSpec
    kwargs: dict[str, Any]
    notes: tuple[str, ...]


def native_transformer(spec: TransformerSpec, framework: str, version: str) -> NativeTransformer:
    """The arguments of a framework's own layer class that make the layers of a spec.

    Raises:
        UnsupportedError: an argument is missing in that version, and its value is not the one that holds instead.

    Example:
        >>> native_transformer(TransformerSpec("encoder_layer", 8, 2, activation="gelu"), "mindspore", "2.0").kwargs
        {'d_model': 8, 'nhead': 2, 'dim_feedforward': 2048, 'dropout': 0.1, 'activation': 'gelu'}
    """
    kwargs, notes, nearest = {}, [], spec
    defaults = {field.name: field.default for field in dataclasses.fields(TransformerSpec)}
    for argument in mapping.table(framework)["transformer"]["arguments"]:
        field, value = argument["field"], getattr(spec, argument["field"])
        there = mapping.version_key(version) >= mapping.version_key(argument.get("since", "0"))
        if value == defaults[field] and field not in ("dim_feedforward", "dropout"):
            continue
        if there:
            kwargs[argument["name"]] = value
        elif field == "bias":
            nearest = spec.replace(bias=True)
            notes.append(f"bias: {framework} {version} has no layer without, so zeros stand in")
        else:
            raise UnsupportedError(
                field,
                given=repr(value),
                expected=f"{defaults[field]!r}, which is what {framework} {version} has",
                advice=f"A newer version has the argument {argument['name']}.",
            )
    return NativeTransformer(nearest, kwargs, tuple(notes))


def _among(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ArgumentError(name, given=repr(value), expected="one of " + ", ".join(known))


def _count(name: str, value: Any, least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise ArgumentTypeError(name, given=repr(value), expected="an integer") from None
    if isinstance(value, bool):
        raise ArgumentTypeError(name, given=repr(value), expected="an integer")
    if number < least:
        raise ArgumentError(name, given=str(number), expected=f"an integer of at least {least}")
    return number


def _eps(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, np.floating)):
        raise ArgumentTypeError(name, given=repr(value), expected="a number")
    number = float(value)
    if not 0.0 <= number < math.inf:
        raise ArgumentError(name, given=str(number), expected="a finite number of at least 0")
    return number


def _difference(spec: Any, other: Any) -> str:
    mine, theirs = spec.to_dict(), other.to_dict()
    return ", ".join(f"{name}={mine[name]!r}" for name in mine if mine[name] != theirs[name])


def join(path: str, name: str) -> str:
    """The path of a part of what lies at a path."""
    return f"{path}.{name}" if path else name
