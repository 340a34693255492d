"""``TransformerWeights``: the parameters of a transformer layer or stack in canonical form.

This module also runs inside workers (Python 3.8).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mhabridge import dtypes, mapping, packing
from mhabridge.errors import ArgumentTypeError, WeightsError
from mhabridge.transformer import TransformerSpec
from mhabridge.weights import MHAWeights


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TransformerWeights:
    """The parameters of a transformer layer or stack.

    Two are equal (``==``) if they have the same parameters with the same dtype, shapes and bits.

    Args:
        attention: the weights of each attention, by its path, such as "layers.0.self_attn".
        others: every other parameter by its path, such as "layers.0.linear1.weight" (dim_feedforward, E) or
            "norm.bias" (E,); linear weights are (out, in).

    Example:
        >>> spec = TransformerSpec("encoder_layer", 8, 2, dim_feedforward=16)
        >>> weights = TransformerWeights.random(spec)
        >>> weights.others["linear1.weight"].shape, weights.attention["self_attn"].q_weight.shape
        ((16, 8), (8, 8))
    """

    attention: Mapping[str, MHAWeights]
    others: Mapping[str, np.ndarray]

    def arrays(self) -> dict[str, np.ndarray]:
        """Every parameter by its path; those of an attention by its path and their canonical name."""
        found = {f"{path}.{name}": a for path, part in self.attention.items() for name, a in part.arrays().items()}
        found.update(self.others)
        return found

    @classmethod
    def random(cls, spec: TransformerSpec, seed: int = 0) -> TransformerWeights:
        """Random parameters, each from a stream of its own; norms near 1, biases not zero (zeros would hide errors)."""
        attention = {path: MHAWeights.random(spec.attention, seed + n) for n, path in enumerate(spec.attentions())}
        others = {}
        for number, (name, shape) in enumerate(spec.parameter_shapes().items()):
            stream = np.random.RandomState([seed, number])
            if len(shape) == 2:
                values = stream.uniform(-1.0, 1.0, shape) / math.sqrt(shape[1])
            else:
                values = stream.uniform(-0.2, 0.2, shape) + (1.0 if _is_norm(name) and name.endswith("weight") else 0.0)
            others[name] = dtypes.round_to(values, spec.dtype)
        return cls(attention, others)

    def check(self, spec: TransformerSpec) -> None:
        """Hold every parameter's presence, shape and dtype against the spec.

        Raises:
            ArgumentTypeError: that is no spec.
            WeightsError: one is missing, one too many, or of another shape or dtype.
        """
        if not isinstance(spec, TransformerSpec):
            raise ArgumentTypeError("spec", given=type(spec).__name__, expected="a TransformerSpec")
        _same_names(dict.fromkeys(self.attention), dict.fromkeys(spec.attentions()))
        for path, part in self.attention.items():
            _within(path, part, spec)
        expected = spec.parameter_shapes()
        _same_names(self.others, expected)
        for name, array in self.others.items():
            if array.shape != expected[name] or dtypes.name_of(array) != spec.dtype:
                raise WeightsError(
                    name,
                    given=f"shape {array.shape} of {dtypes.name_of(array)}",
                    expected=f"shape {expected[name]} of {spec.dtype}",
                    advice="Linear weights are (out, in).",
                )

    def to_layout(
        self, framework: str, spec: TransformerSpec, version: str | None = None, notes: list[str] | None = None
    ) -> dict[str, np.ndarray]:
        """The same parameters as a framework names, packs and orients them.

        Args:
            framework: "torch", "mindspore" or "megengine".
            spec: what they are the weights of.
            version: of the framework; None for the newest that the tables know.
            notes: a list that is filled with what the layout has beyond the spec.

        Raises:
            WeightsError: the weights are not those of the spec.

        Example:
            >>> spec = TransformerSpec("encoder_layer", 8, 2, dim_feedforward=16)
            >>> sorted(TransformerWeights.random(spec).to_layout("mindspore", spec))[:3]
            ['dense1.bias', 'dense1.weight', 'dense2.bias']
        """
        self.check(spec)
        named = {}
        for path, part in self.attention.items():
            named.update(part.to_layout(_layout(framework, version), spec.attention, prefix=path, notes=notes))
        renamed = names_in(framework, version, spec)
        named.update({renamed[name]: np.array(array) for name, array in self.others.items()})
        return named

    @classmethod
    def from_layout(
        cls,
        framework: str,
        named: Mapping[str, np.ndarray],
        spec: TransformerSpec,
        version: str | None = None,
        notes: list[str] | None = None,
    ) -> TransformerWeights:
        """The inverse of ``to_layout``: every tensor is used, wholly, or it is an error.

        Raises:
            WeightsError: a tensor is missing, unexpected, or of another shape or dtype.
        """
        left, attention = dict(named), {}
        for path in spec.attentions():
            own = {f"{path}.{name}": array for name, array in packing.below(path, named).items()}
            layout = _layout(framework, version)
            attention[path] = MHAWeights.from_layout(layout, own, spec.attention, prefix=path, notes=notes)
            for name in own:
                del left[name]
        renamed = names_in(framework, version, spec)
        _same_names(left, dict.fromkeys(renamed.values()))
        weights = cls(attention, {name: _frozen(left[native]) for name, native in renamed.items()})
        weights.check(spec)
        return weights

    def astype(self, dtype: str) -> TransformerWeights:
        """The weights rounded to another dtype (to nearest, ties to even)."""
        others = {name: _frozen(dtypes.round_to(array, dtype)) for name, array in self.others.items()}
        return TransformerWeights({path: part.astype(dtype) for path, part in self.attention.items()}, others)

    def to_tree(self) -> dict[str, Any]:
        """Plain dictionaries of arrays, for the way to another process."""
        return {
            "attention": {path: part.to_tree() for path, part in self.attention.items()},
            "others": dict(self.others),
        }

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> TransformerWeights:
        """The inverse of ``to_tree``."""
        attention = {path: MHAWeights.from_tree(part) for path, part in tree["attention"].items()}
        return cls(attention, {name: _frozen(array) for name, array in tree["others"].items()})

    def with_bias(self, spec: TransformerSpec) -> TransformerWeights:
        """The same parameters for a spec that has biases which these have not: zeros."""
        attention = {}
        for path, part in self.attention.items():
            zeros = {n: np.zeros(s, _kind(spec)) for n, s in spec.attention.parameter_shapes().items()}
            attention[path] = MHAWeights(**{**zeros, **part.arrays()})
        zeros = {name: np.zeros(shape, _kind(spec)) for name, shape in spec.parameter_shapes().items()}
        return TransformerWeights(attention, {**zeros, **self.others})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TransformerWeights):
            return NotImplemented
        mine, theirs = dict(self.others), dict(other.others)
        return (
            dict(self.attention) == dict(other.attention)
            and mine.keys() == theirs.keys()
            and all(_same_bits(mine[name], theirs[name]) for name in mine)
        )

    __hash__ = None  # type: ignore[assignment]  # compared by value, and the values are large

    def __repr__(self) -> str:
        return f"TransformerWeights({len(self.attention)} attentions, {len(self.others)} other parameters)"


def names_in(framework: str, version: str | None, spec: TransformerSpec) -> dict[str, str]:
    """What a framework calls each parameter outside the attentions, by its path.

    Example:
        >>> names_in("mindspore", "2.0", TransformerSpec("encoder_layer", 8, 2))["linear1.weight"]
        'linear1.weight'
        >>> names_in("mindspore", "2.10", TransformerSpec("encoder_layer", 8, 2))["norm1.weight"]
        'norm1.gamma'
    """
    table = mapping.table(framework)["transformer"]
    modules = {
        entry["canonical"]: entry["name"]
        for entry in table.get("modules", [])
        if version is None or mapping.version_key(version) >= mapping.version_key(entry.get("since", "0"))
    }
    norm = table.get("norm", {})
    found = {}
    for path in spec.parameter_shapes():
        *parents, module, parameter = path.split(".")
        native = norm.get(parameter, parameter) if _is_norm(path) else parameter
        found[path] = ".".join([*parents, modules.get(module, module), native])
    return found


def _layout(framework: str, version: str | None) -> str:
    return framework if version is None else f"{framework}@{version}"


def _is_norm(path: str) -> bool:
    return path.split(".")[-2].startswith("norm")


def _kind(spec: TransformerSpec) -> Any:
    return dtypes.round_to(np.zeros(1), spec.dtype).dtype


def _frozen(array: np.ndarray) -> np.ndarray:
    """A read-only copy; bfloat16 in its public form where there is one."""
    try:
        array = dtypes.to_public(dtypes.to_words(array))
    except ImportError:  # inside a worker
        array = dtypes.to_words(array)
    array = np.array(array, order="C")
    array.flags.writeable = False
    return array


def _same_names(given: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name in expected:
        if name not in given:
            raise WeightsError(name, given="no such tensor", expected="one", advice=f"There is {_some(given)}.")
    for name in given:
        if name not in expected:
            raise WeightsError(
                name,
                given="a tensor that a model of this spec does not have",
                expected=f"only {_some(expected)}",
                advice="It would be lost here.",
            )


def _some(names: Mapping[str, Any]) -> str:
    shown = ", ".join(list(names)[:8])
    return f"{shown}, ..." if len(names) > 8 else shown or "nothing"


def _within(path: str, part: MHAWeights, spec: TransformerSpec) -> None:
    try:
        part.check(spec.attention)
    except WeightsError as error:
        error.subject = f"{path}.{error.subject}"
        raise


def _same_bits(mine: np.ndarray, theirs: np.ndarray) -> bool:
    alike = dtypes.name_of(mine) == dtypes.name_of(theirs) and mine.shape == theirs.shape
    return alike and mine.tobytes() == theirs.tobytes()
