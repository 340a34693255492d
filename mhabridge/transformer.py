"""``TransformerSpec``: the canonical description of a transformer layer, or of a whole stack of them.

What ``MHASpec`` is for one attention layer, this is for PyTorch's TransformerEncoderLayer, TransformerDecoderLayer,
TransformerEncoder, TransformerDecoder and Transformer, which MindSpore has too. Its parts and their parameters are
named by *paths* as PyTorch names them: "layers.0.self_attn", "decoder.layers.1.linear1.weight".

This module also runs inside workers (Python 3.8).
"""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import operator
from typing import Any, Callable

import numpy as np

from mhabridge import mapping
from mhabridge.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from mhabridge.spec import MHASpec

KINDS = ("encoder_layer", "decoder_layer", "encoder", "decoder", "transformer")
ACTIVATIONS = ("relu", "gelu")

# What each kind of layer has, by name.
ATTENTIONS = {"encoder_layer": ("self_attn",), "decoder_layer": ("self_attn", "multihead_attn")}
NORMS = {"encoder_layer": ("norm1", "norm2"), "decoder_layer": ("norm1", "norm2", "norm3")}
LINEARS = ("linear1", "linear2")


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
        if self.kind in ATTENTIONS:
            return {"": self.kind}
        found = {}
        for part, count in (("encoder", self.num_encoder_layers), ("decoder", self.num_decoder_layers)):
            start = f"{part}.layers" if self.kind == "transformer" else "layers"
            found.update({f"{start}.{number}": f"{part}_layer" for number in range(count)})
        return found

    def attentions(self) -> tuple[str, ...]:
        """The path of every attention, in order."""
        return tuple(join(path, name) for path, kind in self.layers().items() for name in ATTENTIONS[kind])

    def norms(self) -> dict[str, float]:
        """The path of every layer norm, with its eps."""
        found = {join(path, name): self.layer_norm_eps for path, kind in self.layers().items() for name in NORMS[kind]}
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

    def assemble(
        self,
        layer: Callable[[str], Any],
        stack: Callable[[str, Any], Any],
        whole: Callable[[Any, Any], Any],
    ) -> Any:
        """What the spec says, made by a framework's constructors.

        Args:
            layer: makes one of "encoder_layer" or "decoder_layer".
            stack: makes an "encoder" or a "decoder" of such a layer.
            whole: makes a transformer of an encoder and a decoder.

        Example:
            >>> form = native_transformer(TransformerSpec("encoder", 8, 2, num_encoder_layers=1), "torch", "2.0")
            >>> form.assemble(lambda kind: kind, lambda part, layer: f"{part} of {layer}", lambda *parts: parts)
            'encoder of encoder_layer'
        """
        if self.spec.kind in ATTENTIONS:
            return layer(self.spec.kind)
        parts = ("encoder", "decoder") if self.spec.kind == "transformer" else (self.spec.kind,)
        made = [stack(part, layer(f"{part}_layer")) for part in parts]
        return whole(made[0], made[1]) if self.spec.kind == "transformer" else made[0]


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


def join(path: str, name: str) -> str:
    """The path of a part of what lies at a path."""
    return f"{path}.{name}" if path else name
