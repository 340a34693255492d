"""Which layout a block of a checkpoint has, and the spec that its shapes tell.

What a layout is, and how weights go through one, is in ``mhabridge.packing``. Here nothing is known but names and
shapes. They never tell the number of heads; and MegEngine's packed vector tells its length only, which is read when
all but one reading of it are ruled out by what else is known (a bias_k beside it tells embed_dim).

This module also runs inside workers (Python 3.8).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from mhabridge import packing, rearrange
from mhabridge.errors import ArgumentError, ArgumentTypeError, MHABridgeError, UnsupportedError, WeightsError
from mhabridge.packing import Layout as Layout
from mhabridge.packing import find as find
from mhabridge.packing import names as names
from mhabridge.spec import MHASpec

if TYPE_CHECKING:
    from mhabridge.rearrange import Shape

_WEIGHTS = ("q_weight", "k_weight", "v_weight", "out_weight")
_BIASES = ("q_bias", "k_bias", "v_bias", "out_bias")


@dataclasses.dataclass(frozen=True)
class Recognised:
    """What names and shapes under a prefix tell.

    Args:
        layout: the layout's name.
        tensors: the full names of the tensors that are the layer's.
        facts: fields of ``MHASpec``, without num_heads and dtype; empty when the shapes leave the sizes open.
        notes: what was concluded from a length, why the sizes are open, and what lies beside the layer.
    """

    layout: str
    tensors: tuple[str, ...]
    facts: dict[str, Any]
    notes: tuple[str, ...] = ()


def recognise(names_and_shapes: Mapping[str, Shape], prefix: str = "", **known: Any) -> Recognised:
    """The layout of what lies under a prefix, and what it tells about the layer.

    PyTorch and MindSpore use the same names; then the answer is "torch".

    Args:
        names_and_shapes: every tensor's shape by its full name.
        prefix: what goes before the layout's own names, such as "encoder.layer.0.attention".
        **known: fields of the spec that are known from elsewhere; ``kdim=None`` says that it is embed_dim.

    Raises:
        ArgumentError: a packed vector's length has no reading with what is known.
        ArgumentTypeError: something known that is no field of the spec.
        UnsupportedError: grouped-query or multi-query attention, head-interleaved fused qkv, and other layers that
            would be read wrongly.
        WeightsError: no layout has these names, some would be left over, or the shapes do not fit each other.

    Example:
        >>> shapes = {"attn.qkv.weight": (24, 8), "attn.proj.weight": (8, 8), "attn.proj.bias": (8,)}
        >>> found = recognise(shapes, "attn")
        >>> found.layout, found.facts["embed_dim"], found.facts["q_bias"], found.facts["out_bias"]
        ('fused-qkv', 8, False, True)
    """
    _check_known(known)
    own = packing.below(prefix, names_and_shapes)
    layout = _choose(own, prefix)
    own = _without(own, layout.beside)
    tensors = tuple(packing.join(prefix, name) for name in own)
    notes: list[str] = []
    if _is_vector(layout):
        layout, fields, notes = _recognise_vector(layout, own, prefix, known)
    else:
        fields = {**_facts(layout, own, prefix), **known}
    if fields:
        packing.check_tensors(layout, own, MHASpec(**{"num_heads": 1, **fields}), prefix=prefix)
    notes += packing.left_beside(layout, names_and_shapes, prefix)
    facts = {name: value for name, value in fields.items() if name not in ("num_heads", "dtype")}
    return Recognised(layout.name, tensors, facts, tuple(notes))


def spec_from_shapes(
    layout: str,
    shapes: Mapping[str, Shape],
    num_heads: int,
    prefix: str = "",
    notes: list[str] | None = None,
    **known: Any,
) -> MHASpec:
    """The spec of a layer whose tensors, in this layout, have these shapes.

    Args:
        layout: its name.
        shapes: every tensor's shape by its full name.
        num_heads: H, which no shape tells.
        prefix: what goes before the layout's own names.
        notes: a list that is filled with what was concluded from a packed vector's length.
        **known: fields of the spec that are known from elsewhere, such as dtype or batch_first. MegEngine's vector
            needs kdim and vdim, where None says that they are embed_dim; that of its function needs all sizes.

    Raises:
        ArgumentError: the length of a packed vector has no reading or several, or num_heads does not fit.
        ArgumentTypeError: something known that is no field of the spec.
        UnsupportedError: grouped-query or multi-query attention.
        WeightsError: the tensors are not those of a layer in this layout.

    Example:
        >>> spec_from_shapes("megengine", {"io_weight_bias": (1, 80)}, num_heads=2, kdim=None, vdim=None).embed_dim
        4
    """
    _check_known(known)
    chosen = packing.find(layout)
    own = _without(packing.below(prefix, shapes), chosen.beside)
    if _is_vector(chosen):
        fields, said = _vector_facts(chosen, own, prefix, {**known, "num_heads": num_heads})
        if notes is not None:
            notes.extend(said)
    else:
        fields = {**_facts(chosen, own, prefix), **known}
    spec = MHASpec(**{**fields, "num_heads": num_heads})
    packing.check_tensors(chosen, own, spec, prefix=prefix)
    return spec


def _check_known(known: Mapping[str, Any]) -> None:
    fields = [field.name for field in dataclasses.fields(MHASpec)] + ["bias"]
    unknown = [name for name in known if name not in fields]
    if unknown:
        raise ArgumentTypeError(
            ", ".join(unknown), given="no field of MHASpec", expected="fields among " + ", ".join(fields)
        )


def prefixes(tensor_names: Iterable[str], refused: bool = False) -> list[str]:
    """The prefixes under which there are the weights of some layout, in the order of the names.

    Args:
        tensor_names: full names.
        refused: look for the layouts that are only recognised to be refused, instead of the others.

    Example:
        >>> prefixes(["h.0.attn.c_attn.weight", "h.0.attn.c_proj.weight", "h.0.mlp.c_proj.weight"])
        ['h.0.attn']
    """
    present = list(tensor_names)
    every = set(present)
    groups = _groups(refused)
    found: dict[str, None] = {}
    for name in present:
        for first, others in groups.get(name[name.rfind(".") + 1 :], ()):
            if name == first or name.endswith("." + first):
                prefix = name[: -len(first)].rstrip(".")
                if all(packing.join(prefix, other) in every for other in others):
                    found[prefix] = None
    return list(found)


@functools.lru_cache(maxsize=None)
def _groups(refused: bool) -> dict[str, list[tuple[str, list[str]]]]:
    """The names of the weights of each layout, the first one apart, by that one's last part."""
    found: dict[str, list[tuple[str, list[str]]]] = {}
    for layout in packing.every():
        for when in _cases(layout) if bool(layout.refused) == refused else ():
            first, *others = _weight_names(layout, when)
            found.setdefault(first[first.rfind(".") + 1 :], []).append((first, others))
    return found


# -- by names ----------------------------------------------------------------------------------------------------------


def _choose(own: Mapping[str, Shape], prefix: str) -> Layout:
    """The layout that has all these names and fewest others."""
    matches = [match for layout in packing.every() for match in [_match(layout, own)] if match]
    clean = [match for match in matches if not match.left_over or match.layout.refused]
    if clean:
        best = min(clean, key=lambda match: match.absent).layout
        if best.refused:
            _refuse(best, own, prefix)
        return best
    if matches:
        _refuse_left_over(min(matches, key=lambda match: len(match.left_over)), prefix)
    deeper = [packing.join(prefix, below) for below in prefixes(own)]
    raise WeightsError(
        prefix or "names",
        given=", ".join(sorted(own)[:8]) or "no tensor with this prefix",
        expected="the tensors of a layout: " + ", ".join(names()),
        advice=f"Give the prefix of one layer: {', '.join(deeper[:5])}." if deeper else "Check the prefix.",
    )


@dataclasses.dataclass(frozen=True)
class _Match:
    layout: Layout
    absent: int
    left_over: tuple[str, ...]


def _match(layout: Layout, own: Mapping[str, Shape]) -> _Match | None:
    """How well a layout fits these names; None if one of its weights is not among them."""
    for when in _cases(layout):
        if all(name in own for name in _weight_names(layout, when)):
            expected = [tensor.name for tensor in layout.tensors if tensor.when in ("", when)]
            absent = sum(name not in own for name in expected)
            return _Match(layout, absent, tuple(_without(own, (*expected, *layout.beside))))
    return None


def _cases(layout: Layout) -> list[str]:
    return sorted({tensor.when for tensor in layout.tensors if tensor.when}) or [""]


def _weight_names(layout: Layout, when: str) -> list[str]:
    return [
        tensor.name
        for tensor in layout.tensors
        if tensor.when in ("", when) and not set(_WEIGHTS).isdisjoint(tensor.parts)
    ]


def _without(own: Mapping[str, Shape], left_out: Iterable[str]) -> dict[str, Shape]:
    gone = set(left_out)
    return {name: tuple(shape) for name, shape in own.items() if name not in gone}


def _refuse(layout: Layout, own: Mapping[str, Shape], prefix: str) -> None:
    _refuse_grouped(_part_shapes(layout, own), prefix)
    raise UnsupportedError(
        prefix or layout.tensors[0].name,
        given=layout.title,
        expected="plain multi-head attention whose q, k and v can be told apart",
        advice=f"It is not read, because {layout.refused}.",
    )


def _refuse_left_over(match: _Match, prefix: str) -> None:
    raise WeightsError(
        ", ".join(packing.join(prefix, name) for name in match.left_over[:8]),
        given=f"{len(match.left_over)} tensors among those of the layout {match.layout.name}",
        expected="only " + ", ".join(tensor.name for tensor in match.layout.tensors),
        advice="They may change what the layer computes, and would be lost; give the prefix of the layer alone.",
    )


# -- by shapes ---------------------------------------------------------------------------------------------------------


def _facts(layout: Layout, own: Mapping[str, Shape], prefix: str) -> dict[str, Any]:
    """The fields of the spec that the shapes tell. They are not yet held against each other."""
    parts = _part_shapes(layout, own)
    for name in _WEIGHTS:
        if len(parts.get(name, ())) != 2 or 0 in parts[name]:
            _refuse_shape(layout, name, own, prefix)
    _refuse_grouped(parts, prefix)
    fields: dict[str, Any] = {name: name in parts for name in _BIASES}
    fields.update(embed_dim=parts["q_weight"][1], kdim=parts["k_weight"][1], vdim=parts["v_weight"][1])
    fields["add_bias_kv"] = "bias_k" in parts
    if "usual sizes" not in layout.needs:
        rows = parts["q_weight"][0]
        value_rows = rows if "equal sizes" in layout.needs else parts["v_weight"][0]
        fields.update(q_proj_size=rows, k_proj_size=rows, v_proj_size=value_rows, out_proj_size=parts["out_weight"][0])
    return fields


def _part_shapes(layout: Layout, own: Mapping[str, Shape]) -> dict[str, Shape]:
    """The shapes that the tensors tell of their parts; of a fused bias's parts only that they exist."""
    parts: dict[str, Shape] = {}
    fused = []
    for tensor in layout.tensors:
        shape = rearrange.part_shape(tensor.steps, own[tensor.name]) if tensor.name in own else None
        parts.update(dict.fromkeys(tensor.parts, shape) if shape is not None else {})
        if shape is not None and "q_weight" in tensor.parts and len(tensor.parts) == 3:
            fused.append(shape)
    for shape in fused:
        parts.update(_cut(shape, parts.get("out_weight", ())))
    return parts


def _cut(fused: Shape, out: Shape) -> dict[str, Shape]:
    """The shapes of q, k and v in a fused tensor, by the width that the output's weight says heads have together.

    A tensor with fewer rows than three times that width has smaller keys and values: grouped-query or multi-query
    attention. GPT-BigCode stores such a tensor as (out, in) under GPT-2's names, so both orientations are looked at.
    """
    if len(fused) != 2 or len(out) != 2:
        return {}
    features, width = out
    for rows, columns in (fused, fused[::-1]):
        if columns == features and width < rows < 3 * width and (rows - width) % 2 == 0:
            narrow = (rows - width) // 2, columns
            return {"q_weight": (width, columns), "k_weight": narrow, "v_weight": narrow}
    turned = fused == (features, 3 * width)  # then the error says so
    return dict.fromkeys(("q_weight", "k_weight", "v_weight"), (width, features if turned else fused[1]))


def _refuse_grouped(parts: Mapping[str, Shape], prefix: str) -> None:
    query, key = parts.get("q_weight", ()), parts.get("k_weight", ())
    if len(query) == len(key) == 2 and 0 < key[0] < query[0]:
        raise UnsupportedError(
            prefix or "k_weight",
            given=f"grouped-query or multi-query attention: {query[0]} rows for queries and {key[0]} for keys",
            expected="as many rows for keys as for queries",
            advice="Several heads share a key there, which MHASpec does not describe.",
        )


def _refuse_shape(layout: Layout, part: str, own: Mapping[str, Shape], prefix: str) -> None:
    holders = [tensor.name for tensor in layout.tensors if part in tensor.parts]
    name = next((holder for holder in holders if holder in own), holders[0])
    raise WeightsError(
        packing.join(prefix, name),
        given=f"shape {tuple(own[name])}" if name in own else "no such tensor",
        expected=f"a matrix, in the layout {layout.name}",
    )


# -- by the length of a packed vector --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Reading:
    """One way to understand a vector's length: fields of the spec, and in words what they still leave open."""

    fields: dict[str, Any]
    left_open: str = ""

    def __str__(self) -> str:
        return ", ".join(filter(None, (_said(self.fields) if self.fields else "", self.left_open)))


def _is_vector(layout: Layout) -> bool:
    return any("flatten" in tensor.steps for tensor in layout.tensors)


def _vector(layout: Layout) -> str:
    """The name of the packed vector."""
    return next(tensor.name for tensor in layout.tensors if "flatten" in tensor.steps)


def _with_facts_beside(layout: Layout, own: Mapping[str, Shape], known: Mapping[str, Any]) -> dict[str, Any]:
    """What is known, and what the tensors beside a packed vector tell: there is a bias_k, of embed_dim numbers."""
    beside = [tensor for tensor in layout.tensors if "bias_k" in tensor.parts]
    facts: dict[str, Any] = {}
    for tensor in beside:
        shape = rearrange.part_shape(tensor.steps, own[tensor.name]) if tensor.name in own else None
        facts = {"add_bias_kv": tensor.name in own, **({"embed_dim": shape[0]} if shape and len(shape) == 1 else {})}
    return {**facts, **known}


def _recognise_vector(
    layout: Layout, own: Mapping[str, Shape], prefix: str, known: Mapping[str, Any]
) -> tuple[Layout, dict[str, Any], list[str]]:
    """The first layout of this name in which the length has a reading; its fields only if there is no other one."""
    error: MHABridgeError | None = None
    for candidate in _of_same_names(layout):
        try:
            all_known = _with_facts_beside(candidate, own, known)
            readings = _readings(candidate, _vector_length(candidate, own, prefix), all_known)
            if readings:
                return (candidate, *_vector_facts(candidate, own, prefix, known))
        except UnsupportedError as refusal:  # what is known says that it is not this one
            error = error or refusal
        except ArgumentError as unsettled:
            return candidate, {}, [str(unsettled)]
    raise error or _unsettled(layout, own, prefix, known, [])


def _vector_facts(
    layout: Layout, own: Mapping[str, Shape], prefix: str, known: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The one reading of a vector's length, and what to say of it."""
    length = _vector_length(layout, own, prefix)
    readings = _readings(layout, length, _with_facts_beside(layout, own, known))
    if len(readings) != 1 or readings[0].left_open:
        raise _unsettled(layout, own, prefix, known, readings)
    fields = readings[0].fields
    concluded = {name: value for name, value in fields.items() if name not in known}
    others = [other.name for other in _of_same_names(layout) if other != layout]
    note = f"{packing.join(prefix, _vector(layout))}: {length} numbers, read in the layout {layout.name} as "
    note += f"{_said(concluded)} for the given {_said(known)}." if concluded else f"{_said(known)}, all of it given."
    return fields, [f"{note} {', '.join(others)} packs other layers under the same name." if others else note]


def _vector_length(layout: Layout, own: Mapping[str, Shape], prefix: str) -> int:
    name = _vector(layout)
    shape = tuple(own.get(name, ()))
    if len(shape) != 2 or shape[0] != 1:
        raise WeightsError(
            packing.join(prefix, name),
            given=f"shape {shape}" if name in own else "no such tensor",
            expected="shape (1, n): one row",
            advice="Nothing is reshaped to fit.",
        )
    return shape[1]


def _of_same_names(layout: Layout) -> list[Layout]:
    return [other for other in packing.every() if other.tensors == layout.tensors]


def _readings(layout: Layout, length: int, known: Mapping[str, Any]) -> list[_Reading]:
    """All readings of a length, those with kdim and vdim nearest to embed_dim first."""
    if "usual sizes" not in layout.needs:
        open_ones = [name for name in ("embed_dim", "kdim", "vdim", *packing.SIZES) if name not in known]
        open_ones += [name for name in _BIASES if not {name, "bias"}.intersection(known)]
        if open_ones:
            return [_Reading(dict(known), f"any {', '.join(open_ones)}")]
    found: list[tuple[int, int, _Reading]] = []
    for guess in _guesses(length, known):
        try:
            reading, distance = _reading(layout, length, {**guess, **known})
        except ArgumentError:  # no such spec
            continue
        if reading is not None:
            found.append((distance, len(found), reading))
    return [reading for *_, reading in sorted(found, key=lambda entry: entry[:2])]


def _guesses(length: int, known: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Sizes and biases to try for a vector of this length: q's weight alone takes embed_dim squared."""
    sizes = [size for size in range(1, math.isqrt(length) + 1) if length % size == 0]
    widths = [known["embed_dim"]] if "embed_dim" in known else sizes
    biases = [{}] if {"bias", *_BIASES}.intersection(known) else [{"bias": True}, {"bias": False}]
    return [{"embed_dim": width, **bias} for width in widths for bias in biases]


def _reading(layout: Layout, length: int, fields: dict[str, Any]) -> tuple[_Reading | None, int]:
    """What a length leaves for kdim and vdim, each of which takes embed_dim numbers for every feature."""
    width = fields["embed_dim"]
    unknown = [name for name in ("kdim", "vdim") if name not in fields]
    more, odd = divmod(length - _length(layout, {**fields, **dict.fromkeys(unknown, 1)}), width)
    if odd or more < 0 or (more and not unknown):
        return None, 0
    total = more + len(unknown)
    distance = abs(total - width * len(unknown))
    if len(unknown) == 2 and more:
        usual = f" (usual: {width} each)" if not distance else ""
        return _Reading(fields, f"kdim + vdim = {total}{usual}"), distance
    return _Reading({**fields, **dict.fromkeys(unknown, total // max(len(unknown), 1))}), distance


def _length(layout: Layout, fields: Mapping[str, Any]) -> int:
    """How long the vector of such a layer is."""
    return layout.shapes(MHASpec(**{"num_heads": 1, **fields}))[_vector(layout)][-1]


def _unsettled(
    layout: Layout, own: Mapping[str, Shape], prefix: str, known: Mapping[str, Any], readings: list[_Reading]
) -> ArgumentError:
    listed = "; or ".join(map(str, readings[:_LISTED])) or "no layer of that"
    more = f"; or {len(readings) - _LISTED} more" if len(readings) > _LISTED else ""
    return ArgumentError(
        "embed_dim, kdim, vdim, bias",
        given=f"{packing.join(prefix, _vector(layout))} with {_vector_length(layout, own, prefix)} numbers "
        f"and {_said(known)}",
        expected="values that give this length, and leave one reading",
        advice=f"In the layout {layout.name} it could be {listed}{more}. Say which; kdim=None means embed_dim. "
        f"Of a file: spec=MHASpec(...), or --spec FILE with JSON such as {_JSON}.",
    )


_JSON = '{"embed_dim": 512, "num_heads": 8, "kdim": 512, "vdim": 512, "bias": true}'
_LISTED = 8
_SAID = ("embed_dim", "kdim", "vdim", "bias", *_BIASES, *packing.SIZES)


def _said(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={fields[name]}" for name in _SAID if name in fields) or "nothing known"
