"""The attention layers of a checkpoint: where they are, in which layout, and their spec as far as it is known."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mhabridge import layouts, mapping, packing
from mhabridge.checkpoint.planning import configuration, optimizers
from mhabridge.checkpoint.planning.drafts import Paths, prefix_of
from mhabridge.checkpoint.planning.sidecar import Specs, fields_of
from mhabridge.checkpoint.storage.stored import StoredFile, StoredTensor, shapes_of
from mhabridge.checkpoint.storage.views import View, parts_of
from mhabridge.dtypes import FLOATS
from mhabridge.errors import ArgumentError, CheckpointError, MHABridgeError, WeightsError
from mhabridge.spec import MHASpec


@dataclasses.dataclass(frozen=True)
class Block:
    """One attention layer of a checkpoint.

    Args:
        prefix: what goes before its tensors' own names.
        layout: the layout that they have.
        spec: the layer; num_heads is 1 when it is not known, which no shape depends on.
        heads_known: whether num_heads is known.
        tensors: by their full names.
        notes: what was concluded.
    """

    prefix: str
    layout: str
    spec: MHASpec
    heads_known: bool
    tensors: Mapping[str, StoredTensor]
    notes: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Its tensors' full names."""
        return tuple(self.tensors)

    @functools.cached_property
    def views(self) -> dict[str, View]:
        """Each canonical parameter, as a view of the tensors."""
        return parts_of(packing.find(self.layout), self.spec, packing.below(self.prefix, self.tensors))

    def facts(self, layout: str) -> dict[str, Any]:
        """What is to travel with a file that has this layer in a layout."""
        fields = {**fields_of(self.spec), "layout": layout}
        if not self.heads_known:
            del fields["num_heads"]
        return fields

    def to_dict(self) -> dict[str, Any]:
        """For people and JSON: the layout, the tensors and the spec, whose num_heads may be None."""
        fields = self.spec.to_dict()
        if not self.heads_known:
            fields["num_heads"] = None
        return {"prefix": self.prefix, "layout": self.layout, "tensors": list(self.names), "spec": fields}


def find_blocks(
    file: StoredFile,
    tensors: Mapping[str, StoredTensor],
    specs: Specs,
    num_heads: int | None = None,
    old_names: Mapping[str, str] | None = None,
) -> list[Block]:
    """Every attention layer among some tensors, in their order.

    Args:
        file: where they lie; the config.json beside it is read.
        tensors: by the names that they shall be known by.
        specs: what is known of each layer.
        num_heads: of all layers; None to take it from what is known, or from config.json, or to leave it open.
        old_names: their names in the file, where these differ.

    Raises:
        ArgumentError: a packed vector has several readings, the number of heads does not fit, or a spec is for a
            layer that is not there.
        CheckpointError: tensors of different dtypes in one layer, config.json is wrong, or what travels with the file
            does not belong to it.
        UnsupportedError: a layer that is no plain multi-head attention.
        WeightsError: tensors that are not those of one layer.
    """
    moments = optimizers.tensors(file)
    if moments:
        own_names = old_names or {}
        tensors = {name: one for name, one in tensors.items() if own_names.get(name, name) not in moments}
    prefixes = list(dict.fromkeys(layouts.prefixes(tensors) + layouts.prefixes(tensors, refused=True)))
    own = _by_prefix(prefixes, tensors)
    aliases = {prefix: (prefix, _old_prefix(prefix, own[prefix], old_names or {})) for prefix in prefixes}
    _require_there(file, specs, {alias for both in aliases.values() for alias in both})
    if not prefixes:
        return []
    finder = _Finder(num_heads, configuration.read(file.path))
    notes = finder.require_plain()
    found = [finder.known_block(prefix, own[prefix], specs, aliases[prefix], notes) for prefix in prefixes]
    return _fitting(found)


def _fitting(found: Sequence[tuple[Block, CheckpointError | None]]) -> list[Block]:
    """The blocks, unless config.json fits none of those that would take their heads from it."""
    misfits = [misfit for block, misfit in found if misfit is not None]
    if misfits and not any(block.heads_known for block, misfit in found):
        raise misfits[0]
    return [block if misfit is None else _without_heads(block, misfit) for block, misfit in found]


def _without_heads(block: Block, misfit: CheckpointError) -> Block:
    note = f"{misfit.subject}: {misfit.given}: that layer's number of heads is not taken from there."
    return dataclasses.replace(block, notes=(*block.notes, note))


def _by_prefix(prefixes: Iterable[str], tensors: Mapping[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    """The tensors below each prefix, by their full names."""
    found: dict[str, dict[str, StoredTensor]] = {prefix: {} for prefix in prefixes}
    paths = Paths(found)
    for name, tensor in tensors.items():
        for prefix in paths.above(name):
            found[prefix][name] = tensor
    return found


def _old_prefix(prefix: str, own: Mapping[str, StoredTensor], old_names: Mapping[str, str]) -> str:
    """What a prefix is in the file; itself when the user's rules did more than to change it."""
    name = next(iter(own))
    below = name[len(packing.join(prefix, "")) :]
    old = prefix_of(old_names.get(name, name), below)
    return prefix if old is None else old


def incomplete(names: Iterable[str]) -> list[str]:
    """Notes on what looks like attention and is among no layer of a known layout: a packed tensor, or projections.

    Example:
        >>> incomplete(["attn.in_proj_weight", "fc.weight"])
        ["attn.in_proj_weight: it looks like a part of an attention layer, without the layer's other tensors."]
        >>> incomplete(["0.attn.q.weight", "0.attn.k.weight", "0.attn.v.weight"])
        ['0.attn: it looks like attention (q, k, v) in no layout that is known: each is taken for a layer of its own.']
    """
    names = list(names)
    packed = {tensor.name for layout in packing.every() for tensor in layout.tensors if len(tensor.parts) > 1}
    return [
        f"{name}: it looks like a part of an attention layer, without the layer's other tensors."
        for name in names
        if any(name == one or name.endswith(f".{one}") for one in packed)
    ] + _unrecognised(names)


def _unrecognised(names: Iterable[str]) -> list[str]:
    children: dict[str, set[str]] = {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        if leaf == "weight":
            parent, _, child = path.rpartition(".")
            children.setdefault(parent, set()).add(child)
    looks = mapping.table("layouts")["looks"]["projections"]
    found = {parent: one for parent, own in children.items() for one in looks if own.issuperset(one)}
    return [
        f"{parent or 'the top level'}: it looks like attention ({', '.join(one)}) in no layout that is known: "
        "each is taken for a layer of its own."
        for parent, one in found.items()
    ]


def _doubts(layout: str, spec: MHASpec, prefix: str) -> list[str]:
    """Notes on a layer that may be none of plain attention, although its names fit."""
    return [
        f"{prefix or 'the layer'}: read as {layout}; {doubt['note']}. No tensor tells; config.json, beside it, does."
        for doubt in mapping.table("layouts")["doubts"]
        if layout in doubt["layouts"] and not any(getattr(spec, part) for part in doubt["without"])
    ]


def _require_there(file: StoredFile, specs: Specs, prefixes: set[str]) -> None:
    """Every layer of which something is known must be there; those that are left out lie in the file all the same."""
    for prefix in specs.by_prefix.keys() - prefixes:
        if prefix in specs.stated:
            raise ArgumentError(
                "spec",
                given=f"one for {prefix!r}",
                expected="prefixes of attention layers: " + (", ".join(sorted(prefixes)[:8]) or "there is none"),
            )
        if not packing.below(prefix, file):
            raise specs.stale(f"it speaks of a layer {prefix!r}, and there is none")


@dataclasses.dataclass(frozen=True)
class _Finder:
    """Makes blocks of a checkpoint's tensors.

    Args:
        said: the number of heads that the user says.
        config: what lies beside the checkpoint.
        alike: what was read of layers before, with notes that lack the layer's path; most of a model's are alike.
    """

    said: int | None
    config: configuration.Configuration
    alike: dict[Any, tuple[str, MHASpec, list[str]]] = dataclasses.field(default_factory=dict)

    def require_plain(self) -> list[str]:
        """Notes on what config.json says of the whole model, which must have plain attention."""
        notes = configuration.require_plain(self.config)
        configuration.require_own_keys(self.config, self.said)
        return notes if self.said is None else notes + self.config.notes_beside(self.said)

    def known_block(
        self, prefix: str, own: Mapping[str, StoredTensor], specs: Specs, aliases: tuple[str, ...], notes: list[str]
    ) -> tuple[Block, CheckpointError | None]:
        """The layer under a prefix, made of tensors below it; and why config.json does not tell its heads."""
        known = specs.of(*aliases)
        stated = known.pop("num_heads", None)
        said = list(notes)
        if None not in (stated, self.said) and stated != self.said:
            said.append(f"{prefix}: num_heads={self.said} is given, and what is known of the layer says {stated}.")
        try:
            return self._told(prefix, own, known, stated if self.said is None else self.said, said)
        except (ArgumentError, WeightsError) as error:
            wrong_heads = isinstance(error, ArgumentError) and self.said is not None
            if wrong_heads or not specs.travelling(*aliases):
                raise _of_layer(prefix, error) from error
            raise specs.stale(str(error)) from error

    def _told(
        self, prefix: str, own: Mapping[str, StoredTensor], known: dict[str, Any], heads: int | None, notes: list[str]
    ) -> tuple[Block, CheckpointError | None]:
        """The layer with so many heads; where they are not known, with as many as config.json states, if it fits."""
        if heads is None and self.config.num_heads() is not None:
            return self._configured(prefix, own, known, notes)
        block = self._block(prefix, own, known, heads, notes)
        misfit = self.config.misfit(prefix, block.spec.embed_dim)
        if misfit or self.config.fault:
            beside = self.config.notes_beside(heads, misfit)
            block = dataclasses.replace(block, notes=tuple(dict.fromkeys((*block.notes, *beside))))
        return block, None

    def _configured(
        self, prefix: str, own: Mapping[str, StoredTensor], known: dict[str, Any], notes: list[str]
    ) -> tuple[Block, CheckpointError | None]:
        """The layer with the heads that config.json states; else without, and why."""
        try:
            block = self._block(prefix, own, known, self.config.num_heads(), notes)
        except ArgumentError:
            block = self._block(prefix, own, known, None, notes)  # raises if the heads are not what is wrong
        misfit = self.config.misfit(prefix, block.spec.embed_dim)
        if misfit is None:
            return block, None
        return dataclasses.replace(block, spec=block.spec.replace(num_heads=1), heads_known=False), misfit

    def _block(
        self, prefix: str, own: Mapping[str, StoredTensor], known: dict[str, Any], heads: int | None, notes: list[str]
    ) -> Block:
        said, read = list(notes), "layout" not in known
        layout, spec = self._read(prefix, own, known, heads, said)
        said += _doubts(layout, spec, prefix) if read and not self.config.content else []
        own = _of_layout(layout, prefix, own)
        return Block(prefix, layout, spec, heads is not None, own, tuple(dict.fromkeys(said)))

    def _read(
        self, prefix: str, own: Mapping[str, StoredTensor], known: dict[str, Any], heads: int | None, said: list[str]
    ) -> tuple[str, MHASpec]:
        """The layout and the spec of what lies under a prefix; notes on it are added to what is said."""
        below = {name: (tensor.shape, tensor.dtype) for name, tensor in packing.below(prefix, own).items()}
        kind = (tuple(below.items()), tuple(sorted(known.items())), heads)
        found, path = self.alike.get(kind), packing.join(prefix, "")
        if found is None:
            notes: list[str] = []
            fields = dict(known)
            layout = fields.pop("layout", None)
            if layout is None:
                layout = layouts.recognise(shapes_of(own), prefix, **fields).layout
            own = _of_layout(layout, prefix, own)
            dtype = _dtype(prefix, list(own.values()))
            heads = 1 if heads is None else heads
            spec = layouts.spec_from_shapes(layout, shapes_of(own), heads, prefix, notes, **{**fields, "dtype": dtype})
            found = self.alike[kind] = layout, spec, [note.removeprefix(path) for note in notes]
        layout, spec, notes = found
        said += [path + note for note in notes]
        return layout, spec


def _of_layout(layout: str, prefix: str, own: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The layer's own tensors: what else lies there is carried like any other; recognising has refused what may be."""
    names, start = packing.find(layout).names, len(packing.join(prefix, ""))
    return {name: tensor for name, tensor in own.items() if name[start:] in names}


def _of_layer(prefix: str, error: ArgumentError | WeightsError) -> MHABridgeError:
    """The error, which says of which layer it speaks."""
    if prefix in str(error):
        return error
    subject = f"{prefix}: {error.subject}"
    return type(error)(subject, given=error.given, expected=error.expected, advice=error.advice)


def _dtype(prefix: str, tensors: list[StoredTensor]) -> str:
    found = sorted({tensor.dtype for tensor in tensors})
    if len(found) == 1 and found[0] in FLOATS:
        return found[0]
    raise CheckpointError(
        prefix or "the attention layer",
        given="the dtypes " + ", ".join(found),
        expected="one of " + ", ".join(FLOATS) + ", the same for all its tensors",
        advice="Quantised weights have to be dequantised first; mixed ones brought to one dtype.",
    )
