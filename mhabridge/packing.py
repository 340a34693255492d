"""Layouts: how a framework or a checkpoint names, packs and orients the weights of one layer, read from mappings/.

A layout is data. Its keys in the TOML tables are:

- ``title``: where it is found, for messages and documents.
- ``tensors``: each has a ``name``, the canonical parameters (``parts``) that it holds in this order, the ``steps`` of
  ``mhabridge.rearrange`` that pack them (none: as they are), and ``when``, a condition on the spec (none: always).
- ``needs``: what a spec must be like to be held at all.
- ``tied``: groups of biases of which all are there or none; ``always``: biases that are always there. A bias that the
  spec does not have and the layout cannot be without is written as zeros, and on the way back it must be zero.
- ``beside``: names that lie among the tensors and are no part of attention.
- ``oldest``: the first version of the framework that is known; without it the layout has no versions.
- ``versions``: keys that are different from version ``since`` on, before version ``until``.
- ``refused``: why such tensors cannot be read rightly; the layout then serves only to recognise them.

This module also runs inside workers (Python 3.8).
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mhabridge import dtypes, mapping, rearrange
from mhabridge.errors import ArgumentError, ArgumentTypeError, UnsupportedError, WeightsError

if TYPE_CHECKING:
    from mhabridge.rearrange import Shape
    from mhabridge.spec import MHASpec


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One named tensor of a layout, and which parameters it holds."""

    name: str
    parts: tuple[str, ...]
    steps: tuple[str, ...] = ()
    when: str = ""

    def holding(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Those of its parts that are among ``shapes``, in the tensor's order."""
        return {part: shapes[part] for part in self.parts if part in shapes}


@dataclasses.dataclass(frozen=True)
class Need:
    """What the fields of a spec must be like: ``test`` is given the spec and the field's value."""

    fields: tuple[str, ...]
    expected: str
    test: Callable[[MHASpec, Any], bool]


_MOST_KNOWN = 256
SIZES = ("q_proj_size", "k_proj_size", "v_proj_size", "out_proj_size")
NEEDS = {
    "all projections": Need(SIZES, "a projection", lambda spec, size: size != 0),
    "usual sizes": Need(SIZES, "embed_dim features", lambda spec, size: size is None),
    "equal sizes": Need(("v_proj_size",), "the same as q_proj_size", lambda spec, size: size == spec.q_proj_size),
    "equal features": Need(("kdim", "vdim"), "embed_dim features", lambda spec, size: size is None),
}
CONDITIONS: dict[str, Callable[[MHASpec], bool]] = {
    "": lambda spec: True,
    "equal features": lambda spec: spec.kdim is None and spec.vdim is None,
    "unequal features": lambda spec: spec.kdim is not None or spec.vdim is not None,
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """One named layout; the fields are the keys of its table."""

    name: str
    title: str
    tensors: tuple[Tensor, ...]
    needs: tuple[str, ...] = ()
    tied: tuple[tuple[str, ...], ...] = ()
    always: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    oldest: str = ""
    refused: str = ""
    _known: dict[MHASpec, tuple[tuple[Tensor, Mapping[str, Shape]], ...]] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """The names of all tensors that some layer in this layout has."""
        return frozenset(tensor.name for tensor in self.tensors)

    def active(self, spec: MHASpec) -> tuple[tuple[Tensor, Mapping[str, Shape]], ...]:
        """The tensors that a layer of this spec has, each with the parameters that it holds and their shapes.

        Most layers of a model are alike, so what was found is kept.

        Raises:
            UnsupportedError: the layout cannot hold such a layer.
        """
        found = self._known.get(spec)
        if found is None:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            found = self._known[spec] = self._active(spec)
        return found

    def _active(self, spec: MHASpec) -> tuple[tuple[Tensor, Mapping[str, Shape]], ...]:
        self._require(spec)
        shapes = {**spec.parameter_shapes(), **self.filled(spec)}
        chosen = [tensor for tensor in self.tensors if CONDITIONS[tensor.when](spec)]
        held = [(tensor, tensor.holding(shapes)) for tensor in chosen]
        homeless = sorted(set(shapes).difference(*(parts for _, parts in held)))
        if homeless:
            raise UnsupportedError(
                ", ".join(homeless),
                given="in the spec",
                expected=f"a layer without it: the layout {self.name} ({self.title}) has no place for it",
                advice=_others(spec, self.name),
            )
        return tuple((tensor, types.MappingProxyType(parts)) for tensor, parts in held if parts)

    def shapes(self, spec: MHASpec) -> dict[str, Shape]:
        """Name and shape of each tensor of a layer of this spec.

        Example:
            >>> from mhabridge.spec import MHASpec
            >>> find("gpt2").shapes(MHASpec(4, 2))
            {'c_attn.weight': (4, 12), 'c_attn.bias': (12,), 'c_proj.weight': (4, 4), 'c_proj.bias': (4,)}
        """
        return {
            tensor.name: rearrange.packed_shape(tensor.steps, list(parts.values()))
            for tensor, parts in self.active(spec)
        }

    def filled(self, spec: MHASpec) -> Mapping[str, Shape]:
        """The biases that the layout cannot be without and the spec does not have, and their shapes."""
        return _filled(self.tied, self.always, spec)

    def _require(self, spec: MHASpec) -> None:
        if self.refused:
            raise UnsupportedError(
                self.title, given=f"the layout {self.name}", expected="another", advice=f"Here {self.refused}."
            )
        for need in map(NEEDS.__getitem__, self.needs):
            for field in need.fields:
                if not need.test(spec, getattr(spec, field)):
                    raise UnsupportedError(
                        field,
                        given=f"{getattr(spec, field)} with embed_dim={spec.embed_dim}",
                        expected=f"{need.expected}, for the layout {self.name} ({self.title})",
                        advice=_others(spec, self.name),
                    )


@functools.lru_cache(maxsize=_MOST_KNOWN)
def _filled(tied: tuple[tuple[str, ...], ...], always: tuple[str, ...], spec: MHASpec) -> Mapping[str, Shape]:
    shapes = spec.parameter_shapes()
    wanted = [name for group in tied if shapes.keys() & set(group) for name in group]
    wanted.extend(always)
    rows = {name: shapes.get(name.replace("bias", "weight"), ())[:1] for name in wanted if name not in shapes}
    return types.MappingProxyType({name: shape for name, shape in rows.items() if shape})


def names() -> tuple[str, ...]:
    """The names of all layouts that weights can be brought into, without versions.

    Example:
        >>> names()[:4]
        ('torch', 'mindspore', 'megengine', 'megengine.functional')
    """
    return tuple(name for name, fields in _tables().items() if "refused" not in fields)


def every() -> list[Layout]:
    """All layouts in the order of the tables, those that are only recognised to be refused among them."""
    return [find(name) for name in _tables()]


def find(name: str) -> Layout:
    """The layout of this name; "torch@1.8.1" is that of a version, "torch" that of the newest.

    Raises:
        ArgumentError: there is no such layout, or no such version of it.
        ArgumentTypeError: that is no string.
    """
    return _find(*mapping.parse_name(name))


@functools.lru_cache(maxsize=None)
def _find(base: str, version: str | None) -> Layout:
    """Made once: a checkpoint of many layers asks for the same again and again."""
    tables = _tables()
    name = base if version is None else f"{base}@{version}"
    if base not in tables:
        near = difflib.get_close_matches(base, tables, 1)
        raise ArgumentError(
            "layout",
            given=repr(name),
            expected="one of " + ", ".join(names()),
            advice=f"Did you mean {near[0]}?" if near else "A version may follow, as in torch@1.8.1.",
        )
    fields = {key: value for key, value in tables[base].items() if key != "versions"}
    if version is not None:
        _require_known(base, version, fields.get("oldest"))
    for change in tables[base].get("versions", []) if version is not None else []:
        if _within(str(version), change):
            fields.update({key: value for key, value in change.items() if key not in ("since", "until")})
    return _layout(name, fields)


def to_named(
    layout: Layout, arrays: Mapping[str, np.ndarray], spec: MHASpec, *, prefix: str = "", notes: list[str] | None = None
) -> dict[str, np.ndarray]:
    """The layout's own tensors of these canonical parameters, which must be those of the spec; new, writeable arrays.

    Raises:
        UnsupportedError: the layout cannot hold such a layer.
    """
    held = layout.active(spec)
    parts = {
        name: np.zeros_like(next(iter(arrays.values())), shape=shape) for name, shape in layout.filled(spec).items()
    }
    if notes is not None:
        notes.extend(f"{layout.name}: wrote {name} as zeros; it cannot be left out there." for name in parts)
    parts.update(arrays)
    packed = {tensor.name: rearrange.pack(tensor.steps, [parts[part] for part in shapes]) for tensor, shapes in held}
    return {join(prefix, name): np.array(array, order="C", copy=True) for name, array in packed.items()}


def from_named(
    layout: Layout, named: Mapping[str, np.ndarray], spec: MHASpec, *, prefix: str = "", notes: list[str] | None = None
) -> dict[str, np.ndarray]:
    """The canonical parameters in the layout's tensors under ``prefix``; they may share memory with those.

    What lies beside the layer under the same prefix is left out, and said in ``notes``.

    Raises:
        ArgumentTypeError: no mapping from names to arrays.
        UnsupportedError: the layout cannot hold such a layer.
        WeightsError: a tensor is missing, unexpected or of another shape, or holds what the spec has no place for.
    """
    held = layout.active(spec)
    _require_mapping(named)
    own = {name: value for name, value in below(prefix, named).items() if name not in layout.beside}
    if notes is not None:
        notes.extend(left_beside(layout, named, prefix))
    check_tensors(layout, {name: as_array(join(prefix, name), own[name]).shape for name in own}, spec, prefix=prefix)
    filled = layout.filled(spec)
    arrays: dict[str, np.ndarray] = {}
    for tensor, shapes in held:
        if tensor.name in own:
            values = rearrange.unpack(tensor.steps, own[tensor.name], list(shapes.values()))
            arrays.update(zip(shapes, values))
            _drop_zeros(arrays, filled, join(prefix, tensor.name), notes)
    return arrays


def check_tensors(layout: Layout, given: Mapping[str, Shape], spec: MHASpec, *, prefix: str = "") -> None:
    """Hold names and shapes (without the prefix) against what a layer of this spec has in the layout.

    Tensors of nothing but biases that the spec does not have may be missing.

    Raises:
        UnsupportedError: the layout cannot hold such a layer.
        WeightsError: a tensor is missing, unexpected or of another shape.
    """
    expected = layout.shapes(spec)
    parameters = spec.parameter_shapes()
    for tensor, _ in layout.active(spec):
        if tensor.name not in given and tensor.holding(parameters):
            _missing(layout, join(prefix, tensor.name), expected[tensor.name], given, prefix)
    for name, shape in given.items():
        if name not in expected:
            _unexpected(layout, join(prefix, name), name, shape, expected)
        if tuple(shape) != expected[name]:
            raise WeightsError(
                join(prefix, name),
                given=f"shape {tuple(shape)}",
                expected=f"shape {expected[name]} in the layout {layout.name}",
                advice=_shape_advice(tuple(shape), expected[name]),
            )


def join(prefix: str, name: str) -> str:
    """The full name of a tensor under a prefix; the dot between them may be part of the prefix."""
    return f"{prefix}{name}" if not prefix or prefix.endswith(".") else f"{prefix}.{name}"


def below(prefix: str, named: Mapping[str, Any]) -> dict[str, Any]:
    """What lies under a prefix, by the names there.

    Example:
        >>> below("layers.1", {"layers.1.attn.weight": 1, "layers.10.attn.weight": 2})
        {'attn.weight': 1}
    """
    start = join(prefix, "")
    return {name[len(start) :]: value for name, value in named.items() if name.startswith(start)}


def left_beside(layout: Layout, named: Iterable[str], prefix: str = "") -> list[str]:
    """A note on the tensors that lie beside the layer, which is empty when there are none.

    Example:
        >>> left_beside(find("gpt2"), ["h.0.attn.bias", "h.0.attn.c_attn.weight"], "h.0.attn")
        ['h.0.attn.bias: left out, since it lies beside the attention and is no part of it.']
    """
    there = set(named)
    found = [path for path in (join(prefix, name) for name in layout.beside) if path in there]
    words = "it lies beside the attention and is" if len(found) == 1 else "they lie beside the attention and are"
    return [f"{', '.join(found)}: left out, since {words} no part of it."] if found else []


def _tables() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for owner in mapping.names():
        found.update(mapping.table(owner).get("layouts", {}))
    return found


def _within(version: str, change: Mapping[str, Any]) -> bool:
    key = mapping.version_key
    return key(change["since"]) <= key(version) < key(change["until"])


def _require_known(base: str, version: str, oldest: str | None) -> None:
    if oldest is not None and mapping.version_key(version) >= mapping.version_key(oldest):
        return
    raise ArgumentError(
        "layout",
        given=f"{base}@{version}",
        expected=f"{base}@{oldest} or newer" if oldest else f"{base}, which has no versions",
        advice="Nothing is known about older ones." if oldest else "Leave the version away.",
    )


def _require_mapping(named: Any) -> None:
    if isinstance(named, Mapping) and all(isinstance(name, str) for name in named):
        return
    raise ArgumentTypeError(
        "named",
        given=f"{type(named).__name__}" + (" with names that are no strings" if isinstance(named, Mapping) else ""),
        expected="a mapping from names to NumPy arrays",
        advice="The order is from_layout(layout, named, spec).",
    )


def _layout(name: str, fields: Mapping[str, Any]) -> Layout:
    tensors = tuple(
        Tensor(entry["name"], tuple(entry["parts"]), tuple(entry.get("steps", ())), entry.get("when", ""))
        for entry in fields["tensors"]
    )
    rest = {key: tuple(fields.get(key, ())) for key in ("needs", "always", "beside")}
    tied = tuple(map(tuple, fields.get("tied", ())))
    return Layout(
        name,
        fields["title"],
        tensors,
        tied=tied,
        oldest=fields.get("oldest", ""),
        refused=fields.get("refused", ""),
        **rest,
    )


def _others(spec: MHASpec, but: str) -> str:
    """The layouts that could hold such a layer, as advice."""
    able = [name for name in names() if name != but and _holds(name, spec)]
    return f"Layouts that can hold it: {', '.join(able)}."


def _holds(name: str, spec: MHASpec) -> bool:
    layout = find(name)
    parts = {part for tensor in layout.tensors if CONDITIONS[tensor.when](spec) for part in tensor.parts}
    met = [NEEDS[need].test(spec, getattr(spec, field)) for need in layout.needs for field in NEEDS[need].fields]
    return all(met) and parts >= spec.parameter_shapes().keys()


def as_array(path: str, value: Any) -> np.ndarray:
    """The value itself, which must be a plain NumPy array.

    Raises:
        ArgumentTypeError: it is none; the message names ``path``.
    """
    if isinstance(value, np.ma.MaskedArray):
        raise ArgumentTypeError(
            path, given="a masked array", expected="a plain NumPy array", advice="Weights have no mask: fill it first."
        )
    if isinstance(value, np.ndarray):
        return value
    raise ArgumentTypeError(
        path,
        given=type(value).__name__,
        expected="a NumPy array",
        advice="Take a live layer apart with mhabridge.extract, or turn its tensors into arrays first.",
    )


def _drop_zeros(arrays: dict[str, np.ndarray], filled: Mapping[str, Shape], path: str, notes: list[str] | None) -> None:
    """Take out the parts that the spec does not have; nothing is lost only if they are zero."""
    for part in [part for part in arrays if part in filled]:
        if np.any(dtypes.to_float64(arrays.pop(part))):
            raise WeightsError(
                path,
                given=f"values other than zero for {part}, which the spec does not have",
                expected="zeros there",
                advice=f"So that nothing is lost use spec.replace({part}=True).",
            )
        if notes is not None:
            notes.append(f"{path}: its {part} is all zeros and was left out, as the spec has none.")


def _missing(layout: Layout, path: str, expected: Shape, given: Mapping[str, Any], prefix: str) -> None:
    there = ", ".join(sorted(given)[:8]) or "nothing"
    raise WeightsError(
        path,
        given="no such tensor",
        expected=f"one of shape {expected} in the layout {layout.name}",
        advice=f"Under {prefix!r} there is {there}." if prefix else f"There is {there}.",
    )


def _unexpected(layout: Layout, path: str, name: str, shape: Shape, expected: Mapping[str, Shape]) -> None:
    parts = [part for tensor in layout.tensors if tensor.name == name for part in tensor.parts]
    if parts and all(part.endswith("_bias") for part in parts):
        advice = f"The spec has no {parts[0]}; spec.replace({parts[0]}=True) keeps it."
    elif parts:
        advice = "The spec's kdim and vdim, or add_bias_kv, call for other tensors."
    else:
        advice = "Take it out if it is no part of attention; it would be lost here."
    raise WeightsError(
        path,
        given=f"a tensor of shape {tuple(shape)} that a layer of this spec does not have",
        expected=f"only {', '.join(expected)} in the layout {layout.name}",
        advice=advice,
    )


def _shape_advice(given: Shape, expected: Shape) -> str:
    if given == expected[::-1]:
        return "It lies the other way round; nothing is transposed to fit, so name the layout that it has."
    if math.prod(given) == math.prod(expected):
        return "It has as many elements; nothing is reshaped to fit, so look where the axes were lost."
    return "Check embed_dim, kdim, vdim and the biases of the spec."
