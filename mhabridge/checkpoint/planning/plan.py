"""What a conversion does to every tensor, decided before a byte is written.

Law 1: every tensor of the source is used exactly once and every name of the target is filled exactly once, or an error
names it. The ways around, ``drop`` and ``allow_missing``, are listed in the plan like everything else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mhabridge import layouts, mapping, packing
from mhabridge.checkpoint.planning import completeness, modules, optimizers, origins, renaming, sidecar, turned
from mhabridge.checkpoint.planning.drafts import Check as Check
from mhabridge.checkpoint.planning.drafts import Draft, Shape
from mhabridge.checkpoint.planning.drafts import Entry as Entry
from mhabridge.checkpoint.planning.layers import Block, find_blocks, incomplete
from mhabridge.checkpoint.planning.origins import Dialect, dialect
from mhabridge.checkpoint.planning.plan_attention import drop_in, holds, plan_attention
from mhabridge.checkpoint.planning.plan_layers import LayerPlanner
from mhabridge.checkpoint.planning.transformer_parts import transformer_parts
from mhabridge.checkpoint.storage.stored import StoredFile
from mhabridge.checkpoint.storage.writing import Outgoing
from mhabridge.errors import ArgumentError, ArgumentTypeError, CheckpointError, MHABridgeError


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user asks for.

    Args:
        to: the framework whose names and layouts the target gets, such as "mindspore", "mindspore@2.0" or
            "mindspore.mint"; None to keep the source's.
        layout: another layout for the target's attention layers, such as "hf-bert"; None for the framework's own.
        source: the framework that the source is from; None to find out.
        spec: an ``MHASpec`` for all attention layers, or a mapping from prefixes to them.
        num_heads: of all attention layers.
        rename: rules for names; see ``renaming.renamer``.
        drop: patterns of source tensors that are left out.
        allow_missing: patterns of the target's names that may stay without a value.
        kinds: what a layer is ("embedding", "grouped_conv2d:32"), by a pattern of paths.
        names_of: the target's real names and shapes; None when they are not known.
        exact: whether ``names_of`` must be filled exactly; else the caller looks at what is not.
        prefix: take only what lies under it; names lose it before the rules for names are used.

    Raises:
        ArgumentTypeError: patterns, kinds or a prefix that are none.
    """

    to: str | None = None
    layout: str | None = None
    source: str | None = None
    spec: Any = None
    num_heads: int | None = None
    rename: Any = None
    drop: Sequence[str] = ()
    allow_missing: Sequence[str] = ()
    kinds: Mapping[str, str] = dataclasses.field(default_factory=dict)
    names_of: Mapping[str, Shape] | None = None
    exact: bool = True
    prefix: str = ""

    def __post_init__(self) -> None:
        for name in ("drop", "allow_missing"):
            object.__setattr__(self, name, renaming.patterns(name, getattr(self, name)))
        if not isinstance(self.kinds, Mapping) or not all(isinstance(one, str) for one in self.kinds.values()):
            raise ArgumentTypeError(
                "kinds", given=f"{self.kinds!r:.80}", expected="a mapping from patterns of paths to kinds"
            )
        if not isinstance(self.prefix, str):
            raise ArgumentTypeError("prefix", given=f"{self.prefix!r:.80}", expected="a string; '' is the whole file")

    @property
    def may_be_missing(self) -> tuple[str, ...]:
        """Patterns of the target's names that may stay without a value: also of what some frameworks do not have."""
        known = () if self.to is None else modules.not_everywhere(dialect(self.to).name)
        return (*self.allow_missing, *known)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A conversion.

    Args:
        entries: what happens to each tensor.
        outgoing: the tensors to write, in order.
        checks: what holds the target against the source afterwards.
        blocks: the attention layers.
        specs: what travels with the target; None for nothing.
        notes: what people should know.
    """

    entries: tuple[Entry, ...]
    outgoing: tuple[Outgoing, ...]
    checks: tuple[Check, ...]
    blocks: tuple[Block, ...]
    specs: str | None
    notes: tuple[str, ...]


def make(file: StoredFile, options: Options) -> Plan:
    """The plan for an open source.

    Args:
        file: the source.
        options: what the user asks for.

    Raises:
        ArgumentError: an option that cannot be, or a packed vector with several readings.
        CheckpointError: a layer with several readings, or content that does not fit together.
        UnsupportedError: attention that is no plain multi-head attention, or that the target cannot hold.
        WeightsError: a tensor that would be lost, or a name that would be filled twice or not at all.
    """
    if options.allow_missing and options.names_of is None:
        raise ArgumentError(
            "allow_missing",
            given=", ".join(map(repr, options.allow_missing)) + ", without the target's own names",
            expected="names_of too (--names-of): only then is it known what is missing",
        )
    draft = Draft(file, options.rename, options.prefix)
    draft.drop(options.drop)
    if options.to is None:
        blocks, specs = _keep(draft, options)
    else:
        blocks, specs = _translate(draft, options, dialect(options.to))
    completeness.require_used(draft)
    found = completeness.require_once(draft.filled())
    if options.names_of is not None and options.exact:
        _require_fits(draft, found, options.names_of, options.may_be_missing)
    return Plan(
        tuple(draft.entries),
        tuple(draft.in_order()),
        tuple(draft.checks),
        tuple(blocks),
        specs,
        tuple(dict.fromkeys(draft.notes)),
    )


def _keep(draft: Draft, options: Options) -> tuple[list[Block], str | None]:
    """All names and layouts stay (but for the user's rules), and what travels with the file goes on travelling."""
    for name in ("layout", "source", "spec", "num_heads", "kinds"):
        if getattr(options, name):
            raise ArgumentError(
                name,
                given=f"{getattr(options, name)!r}, and no framework to convert to",
                expected="a target framework too",
                advice="Without one (--to) all names and layouts stay as they are.",
            )
    specs = sidecar.known(draft.file)
    known = [*specs.by_prefix, *specs.kinds]
    moved = None if specs.where is None else specs.moved(draft.new_paths(known)).dumped()
    for name, tensor in draft.left().items():
        draft.carry(name, name, tensor.shape, "unchanged")
    return [], moved


def _translate(draft: Draft, options: Options, to: Dialect) -> tuple[list[Block], str | None]:
    file = draft.file
    if options.layout is not None:
        origins.require_known(*mapping.parse_name(options.layout), "layout")
    specs = sidecar.known(file, options.spec)
    _keep_optimizers(draft)
    blocks = find_blocks(file, draft.left(), specs, options.num_heads, draft.old_names)
    layouts_of = {block.prefix: options.layout or _layout_at(block, to, options.names_of) for block in blocks}
    for block in blocks:
        plan_attention(draft, block, layouts_of[block.prefix])
        if layouts_of[block.prefix] == drop_in(to.framework):
            title = packing.find(layouts_of[block.prefix]).title
            where = block.prefix or "the layer"
            draft.notes.append(f"{where}: {to.framework}'s own layer has no such parameters; this is the {title}.")
        draft.notes.extend(block.notes)
    draft.notes += incomplete(draft.left())
    source = origins.origin(file, specs, options.source)
    draft.notes += [f"{file.path.name}: {source.note}"] if source.note else []
    lying = turned.paths_in_file(blocks, draft.old_names), turned.paths(layouts_of.items())
    layers = LayerPlanner(draft, to, source.dialects, specs, options.kinds, options.names_of, lying)
    layers.plan(transformer_parts([block.prefix for block in blocks], draft.tensors, to))
    draft.notes += origins.notes_on_dtypes(to, [(one.name, one.dtype) for one in draft.in_order()])
    if all(entry.unchanged for entry in draft.filled()):
        draft.notes.append(f"The file has {to}'s names and layouts already: every tensor stays as it is.")
    known = {block.prefix: block.facts(layouts_of[block.prefix]) for block in blocks}
    made = sidecar.Specs(known, {}, str(to), layers.left_open)
    return blocks, made.dumped() if known or layers.left_open else None


def _keep_optimizers(draft: Draft) -> None:
    """Carry what is an optimizer's as it is, before anything is taken for a layer."""
    moments = optimizers.tensors(draft.file)
    kept = [name for name in draft.left() if draft.old_names[name] in moments]
    for name in kept:
        draft.carry(name, name, draft.tensors[name].shape, optimizers.RULE)
    if kept:
        draft.notes.append(optimizers.note(draft.old_names[name] for name in kept))


def _layout_at(block: Block, to: Dialect, wanted: Mapping[str, Shape] | None) -> str:
    """The layout of an attention layer in the target: the framework's own, unless its names say another.

    Our drop-in's, where the framework's own layer cannot hold it.
    """
    own = to.attention_layout
    try:
        found = layouts.recognise(wanted, block.prefix).layout if wanted else own
    except MHABridgeError:  # none of a layout: those that the framework's own has will be missing
        found = own
    if found not in (own, *mapping.FRAMEWORKS):
        return found
    other = drop_in(to.framework)
    return own if other is None or holds(own, block.spec) or not holds(other, block.spec) else other


def _require_fits(
    draft: Draft, found: Mapping[str, Shape], wanted: Mapping[str, Shape], allow_missing: Sequence[str]
) -> None:
    misfit = completeness.misfit(found, wanted, allow_missing)
    completeness.require_fits(misfit)
    for name, pattern in misfit.allowed.items():
        draft.notes.append(f"{name}: not in the source; allowed by {pattern}")


def require_inert_allowed(file: StoredFile, ignore_objects: bool, drop: Sequence[str] = ()) -> list[str]:
    """Notes on entries that would take code to make; they are refused unless the user says to leave them out.

    Args:
        file: the source.
        ignore_objects: all of them are left out.
        drop: patterns of those that are left out.

    Raises:
        CheckpointError: there are such entries.
    """
    odd = [entry for entry in file.objects if entry.inert]
    kept = [entry for entry in odd if renaming.matches_entry(entry.name, drop) is None]
    if kept and not ignore_objects:
        names = ", ".join(dict.fromkeys(name for entry in kept for name in entry.inert))
        raise CheckpointError(
            f"{file.path}: {', '.join(entry.name for entry in kept[:8])}",
            given=f"objects that would have to be made by {names}",
            expected="tensors and plain data",
            advice="Nothing in a file is executed. --ignore-objects leaves them out and lists them.",
        )
    return [f"{entry.name}: left out ({entry.text}); it would be made by {', '.join(entry.inert)}" for entry in odd]
