"""How a live transformer layer or stack is read: its spec and its traits.

``Reader`` walks through it as PyTorch builds it; an adapter says which classes its framework's are and how to read the
smallest parts.

This module also runs inside workers (Python 3.8).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Callable, Mapping

from mhabridge.dropin import changed_methods
from mhabridge.errors import UnsupportedError
from mhabridge.live import Traits
from mhabridge.spec import MHASpec
from mhabridge.transformer import ACTIVATIONS, ATTENTIONS, LINEARS, NORMS, TransformerSpec, join


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


@dataclasses.dataclass(frozen=True)
class Norm:
    """A layer norm: its eps, and whether it has a bias."""

    eps: float
    bias: bool


@dataclasses.dataclass(frozen=True)
class Linear:
    """A linear map: its features out, and whether it has a bias."""

    features: int
    bias: bool


@dataclasses.dataclass(frozen=True)
class Reader:
    """How a framework's transformer layers and stacks are read; all frameworks name most of their parts alike.

    Each of the functions raises UnsupportedError for a part that is not the framework's own, or computes otherwise.

    Args:
        classes: the native class of each kind.
        whose: what these classes are, for messages.
        method: the name of the method that computes: "forward" or "construct".
        attention: an attention's spec.
        linear: a linear map's facts, given it and its path.
        dropout: the probability of a dropout, given it and its path.
        norm: a norm's facts, given it and its path.
        activation: "relu" or "gelu" for a layer's activation, or what it is instead.
        other_names: what a part may be called instead of its name in PyTorch.
    """

    classes: Mapping[str, Any]
    whose: str
    method: str
    attention: Callable[[Any], MHASpec]
    linear: Callable[[Any, str], Linear]
    dropout: Callable[[Any, str], float]
    norm: Callable[[Any, str], Norm]
    activation: Callable[[Any], str]
    other_names: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def reads(self, model: Any) -> bool:
        """Whether this is one of the framework's transformer layers or stacks."""
        return isinstance(model, tuple(self.classes.values()))

    def spec(self, model: Any) -> TransformerSpec:
        """The spec of a layer or stack.

        Raises:
            UnsupportedError: a part that is no plain one, or layers that differ.
        """
        kind = self._kind(model, "layer")
        if kind in ATTENTIONS:
            return self._parts(model, kind, "").spec()
        stacks = {"encoder": model.encoder, "decoder": model.decoder} if kind == "transformer" else {kind: model}
        found: dict[str, list[LayerParts]] = {"encoder": [], "decoder": []}
        norms = {}
        for part, stack in stacks.items():
            start = f"{part}." if kind == "transformer" else ""
            self._expect(stack, part, part)
            for number, layer in enumerate(stack.layers):
                path = f"{start}layers.{number}"
                self._expect(layer, f"{part}_layer", path)
                found[part].append(self._parts(layer, f"{part}_layer", path))
            if stack.norm is not None:
                norms[part] = self.norm(stack.norm, f"{start}norm")
        return stack_spec(kind, found["encoder"], found["decoder"], norms)

    def _kind(self, part: Any, path: str) -> str:
        for kind, native in self.classes.items():
            if isinstance(part, native) and not changed_methods(part, native):
                return kind
        raise UnsupportedError(
            path,
            given=f"{type(part).__module__}.{type(part).__qualname__}",
            expected=f"{self.whose}, with its own {self.method}",
            advice="What it computes is not known. Move the attentions in it one by one.",
        )

    def _expect(self, part: Any, wanted: str, path: str) -> None:
        kind = self._kind(part, path)
        if kind != wanted:
            raise UnsupportedError(path, given=f"a transformer's {kind}", expected=f"{wanted} there")

    def _parts(self, layer: Any, kind: str, path: str) -> LayerParts:
        def read(names: tuple[str, ...], facts: Callable[[Any, str], Any]) -> dict[str, Any]:
            natives = {name: self.other_names.get(name, name) for name in names}
            natives = {name: native if hasattr(layer, native) else name for name, native in natives.items()}
            return {name: facts(getattr(layer, native), join(path, native)) for name, native in natives.items()}

        attentions = {name: self.attention(getattr(layer, name)) for name in ATTENTIONS[kind]}
        norms = read(NORMS[kind], self.norm)
        linears = read(LINEARS, self.linear)
        return LayerParts(
            path,
            kind,
            attentions,
            linears["linear1"].features,
            read(("dropout", *(name.replace("norm", "dropout") for name in NORMS[kind])), self.dropout),
            self.activation(layer.activation),
            {name: norm.eps for name, norm in norms.items()},
            getattr(layer, "norm_first", False),  # PyTorch has it since 1.10
            {name: part.bias for name, part in {**norms, **linears}.items()},
        )


def at(model: Any, path: str) -> Any:
    """A part of a model by its path; numbers are places in a list.

    Example:
        >>> import types
        >>> at(types.SimpleNamespace(layers=[types.SimpleNamespace(norm="this")]), "layers.0.norm")
        'this'
    """
    for name in path.split(".") if path else ():
        model = model[int(name)] if name.isdigit() else getattr(model, name)
    return model


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


def _difference(spec: Any, other: Any) -> str:
    mine, theirs = spec.to_dict(), other.to_dict()
    return ", ".join(f"{name}={mine[name]!r}" for name in mine if mine[name] != theirs[name])
