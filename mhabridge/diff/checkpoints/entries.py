"""What of two checkpoints is beside what: one item for each parameter, tied ones once, and notes on the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mhabridge.checkpoint.storage.comparing import all_zero
from mhabridge.checkpoint.storage.stored import StoredObject
from mhabridge.diff.checkpoints.matching import Match, match_layers, pair_tensors
from mhabridge.diff.checkpoints.sides import Checkpoint, Group
from mhabridge.diff.checkpoints.streaming import Side
from mhabridge.diff.comparing import Comparison, Measure, compare, decide
from mhabridge.diff.report import Layer

SIDES = ("first", "second")


@dataclasses.dataclass
class Item:
    """One parameter.

    Args:
        layer: the path of its layer in the report.
        tensor: its name there.
        first: None if the first side lacks it.
        second: likewise.
        comparison: None until the numbers have been compared.
    """

    layer: str
    tensor: str
    first: Side | None
    second: Side | None
    comparison: Comparison | None = None

    @property
    def pair(self) -> tuple[Side, Side]:
        """Both sides; only where both are there."""
        assert self.first is not None
        assert self.second is not None
        return self.first, self.second


@dataclasses.dataclass(frozen=True)
class Matched:
    """A layer of both sides, or of one, with all its parameters; those that are tied with others are not compared."""

    name: str
    match: Match
    items: tuple[Item, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """All that is to be compared.

    Args:
        matched: the layers.
        layers: the same for the report.
        items: in order.
        notes: on tied tensors.
    """

    matched: tuple[Matched, ...]
    layers: tuple[Layer, ...]
    items: tuple[Item, ...]
    notes: tuple[str, ...]


def lay_out(first: Checkpoint, second: Checkpoint) -> Layout:
    """Put what two checkpoints hold side by side."""
    layers: dict[str, Layer] = {}
    matched: list[Matched] = []
    for match in match_layers(first, second):
        name = _name(match)
        pairs, kind, notes = pair_tensors(match, (first, second))
        items = []
        for pair in pairs:
            one = _side(first, match.first, pair.first)
            other = _side(second, match.second, pair.second)
            items.append(Item(name, pair.tensor, one, other, _at_once(one, other, pair.reshaped)))
        items += [Item(name, field, None, None, found) for field, found in _settings(match, (first, second))]
        matched.append(Matched(name, match, tuple(items)))
        _add(layers, name, match, kind, [*notes, *_own_notes(match)])
    kept, tied = _once([item for one in matched for item in one.items])
    for item, note in tied:
        layers[item.layer] = dataclasses.replace(layers[item.layer], notes=(*layers[item.layer].notes, note))
    return Layout(tuple(matched), tuple(layers.values()), tuple(kept), tuple(_torn(kept)))


def _name(match: Match) -> str:
    group = match.first or match.second
    assert group is not None
    return group.own_path


def _add(layers: dict[str, Layer], name: str, match: Match, kind: str, notes: list[str]) -> None:
    """A layer of the report; attention and what lies beside it under the same path are one."""
    known = layers.get(name)
    other = match.second.own_path if match.second else ""
    if known is None:
        layers[name] = Layer(name, other, kind, match.how, tuple(notes))
    else:
        notes = [*known.notes, *notes]
        layers[name] = Layer(name, known.other or other, known.kind or kind, known.matched or match.how, tuple(notes))


def _side(checkpoint: Checkpoint, group: Group | None, name: str | None) -> Side | None:
    return None if group is None or name is None else Side(checkpoint.file, group.tensors[name])


def _at_once(first: Side | None, second: Side | None, reshaped: bool) -> Comparison | None:
    """The verdict where no numbers have to be compared: something is missing, or of another shape."""
    if first is None or second is None:
        found = decide(first and first.tensor, second and second.tensor, Measure())
        there, which = (first, "first") if first is not None else (second, "second")
        zeros = there is not None and len(there.shape) == 1 and all_zero(there.file, there.tensor)
        more = f"; on the {which} it is all zeros" if zeros else ""
        return dataclasses.replace(found, reason=found.reason + more)
    if first.shape == second.shape or (reshaped and _same_order(first.shape, second.shape)):
        return None
    return decide(first.tensor, second.tensor, Measure())


def _same_order(first: tuple[int, ...], second: tuple[int, ...]) -> bool:
    """Whether two shapes hold the same elements in the same order, as frameworks write convolutions: with axes of size
    one, or with the groups as an axis of their own.

    Example:
        >>> _same_order((8, 4, 3), (8, 4, 1, 3)), _same_order((2, 4, 3, 5, 5), (8, 3, 5, 5))
        (True, True)
        >>> _same_order((4, 6, 3, 3), (6, 4, 3, 3))
        False
    """
    if len(first) == len(second):
        return first == second
    short, long = sorted((first, second), key=len)
    if [size for size in long if size != 1] == [size for size in short if size != 1]:
        return True
    return len(long) == len(short) + 1 and (long[0] * long[1], *long[2:]) == short


def _heads(match: Match) -> Comparison | None:
    """The same weights with another number of heads are another layer, and no shape tells."""
    blocks = [group.block for group in (match.first, match.second) if group is not None and group.block is not None]
    known = [block.spec.num_heads for block in blocks if block.heads_known]
    if len(known) < 2 or known[0] == known[1]:
        return None
    found = compare(np.asarray(known[0]), np.asarray(known[1]))
    return dataclasses.replace(found, reason=f"{known[0]} heads and {known[1]}, by what travels with the files")


def _settings(match: Match, sides: tuple[Checkpoint, Checkpoint]) -> list[tuple[str, Comparison]]:
    """What the same weights make another layer, where both files say it and differ."""
    heads = _heads(match)
    found = [] if heads is None else [("num_heads", heads)]
    told = [
        side.told(group.block)
        for side, group in zip(sides, (match.first, match.second), strict=True)
        if group is not None and group.block is not None
    ]
    for field in _TOLD if len(told) == 2 else ():
        values = [known.get(field) for known in told]
        if all(field in known for known in told) and values[0] != values[1]:
            reason = f"{values[0]} and {values[1]}, by what travels with the files"
            found.append((field, Comparison("off", reason=reason)))
    return found


_TOLD = ("scale", "add_zero_attn", "residual")


def _own_notes(match: Match) -> list[str]:
    found = []
    for which, group in zip(SIDES, (match.first, match.second), strict=True):
        found += [f"{which} side: {note}" for note in (group.notes if group else ())]
    blocks = [group.block for group in (match.first, match.second) if group is not None and group.block is not None]
    if len(blocks) == 2:
        found += [
            f"{field}: {getattr(blocks[0].spec, field)} on the first side and {getattr(blocks[1].spec, field)} on the "
            "second, by what is known of each"
            for field in _TOLD
            if getattr(blocks[0].spec, field) != getattr(blocks[1].spec, field)
        ]
    return found


def _once(items: Sequence[Item]) -> tuple[list[Item], list[tuple[Item, str]]]:
    """Tied tensors are compared once; a name that only one side has of tensors that are tied there is a note."""
    seen: dict[tuple[object, ...], Item] = {}
    kept, notes = [], []
    there: tuple[dict[object, Item], dict[object, Item]] = ({}, {})
    for item in items:
        if item.first is not None and item.second is not None:
            there[0].setdefault(item.first.identity, item)
            there[1].setdefault(item.second.identity, item)
    for item in items:
        sides = (item.first, item.second)
        if item.first is not None and item.second is not None:
            tied = seen.setdefault((item.first.identity, item.second.identity), item)
            if tied is not item:
                notes.append((item, f"{item.tensor}: tied with {_full(tied)} on both sides, and compared there"))
                continue
        for which, side, known in zip(SIDES, sides, there, strict=True):
            other = None if side is None or None not in sides else known.get(side.identity)
            if other is not None:
                rest = "second" if which == "first" else "first"
                words = f"tied with {_full(other)} on the {which} side, and compared there; the {rest} leaves it out"
                notes.append((item, f"{item.tensor}: {words}"))
                break
        else:
            kept.append(item)
    return kept, notes


def _full(item: Item) -> str:
    return f"{item.layer}.{item.tensor}" if item.layer else item.tensor


def _torn(items: Sequence[Item]) -> list[str]:
    """Notes on what is one tensor on one side and several on the other."""
    notes = []
    both = [item for item in items if item.first is not None and item.second is not None]
    for which in (0, 1):
        found: dict[object, list[str]] = {}
        for item in both:
            found.setdefault(item.pair[which].identity, []).append(_full(item))
        notes += [
            f"{', '.join(names)}: one tensor on the {SIDES[which]} side, {len(names)} on the other"
            for names in found.values()
            if len(names) > 1
        ]
    return notes


def note_objects(first: Checkpoint, second: Checkpoint) -> tuple[list[str], list[Item]]:
    """Notes on entries that are no tensors; one that is a scalar tensor on the other side is compared with that."""
    values: list[dict[str, Any]] = []
    scalars: set[str] = set()
    for one, other in ((first, second), (second, first)):
        own = {entry.name: entry for entry in one.file.objects}
        dropped = one.drop_scalars(other.file.objects)
        scalars |= {name for name, array in dropped.items() if array.dtype.kind not in "iub"}  # an epoch is a note
        numbers = {name: array if name in scalars else array.item() for name, array in dropped.items()}
        values.append({**{name: _value(entry) for name, entry in own.items()}, **numbers})
    compared = [
        Item("", name, None, None, compare(np.asarray(values[0][name]), np.asarray(values[1][name])))
        for name in values[0]
        if name in scalars and name in values[1]
    ]
    notes = [
        f"{name}: {values[0][name]} and {values[1][name]}"
        for name in values[0]
        if name not in scalars and _differ(name, *values)
    ]
    for which, mine, theirs in zip(SIDES, values, values[::-1], strict=True):
        alone = [name for name in mine if name not in theirs]
        if alone:
            more = f" and {len(alone) - 8} more" if len(alone) > 8 else ""
            notes.append(f"entries that are no tensors, only on the {which} side: {', '.join(alone[:8])}{more}")
    return notes, compared


def _value(entry: StoredObject) -> Any:
    return entry.text if entry.value is None else entry.value


def _differ(name: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    return name in second and repr(first[name]) != repr(second[name])
