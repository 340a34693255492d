"""The compared tensors, layer by layer, as a tree in execution order."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator

from mhabridge.diff.diagnosis import Diagnosis
from mhabridge.diff.judge import Distance
from mhabridge.diff.page import text
from mhabridge.diff.page.drawing import Drawn, Key, drawn, key, most_telling
from mhabridge.diff.page.tree import Branch, grown
from mhabridge.diff.report import REFERENCE, DiffReport, Entry, Layer, worst

NOTHING = "none"  # the verdict on a layer of which nothing was compared
_FEW = 60  # comparisons that may stand open
_LISTED = 30  # layers of which each may have a line of its own
_FEW_LAYERS = 3
_RUN = 8  # neighbours in a row that are put away together where nothing differs


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison.

    Args:
        number: its place among all.
        entry: what was found.
        sides: which two, where the table does not say it once.
        used: how much of its bound each side uses that has one.
        drawn: its picture.
        unfold: whether that stands open.
        counts: whether it is an entry of the report; two backends beside each other are a second look at those.
    """

    number: int
    entry: Entry
    sides: str
    used: tuple[float, ...]
    drawn: Drawn | None
    unfold: bool = False
    counts: bool = True

    @property
    def verdict(self) -> str:
        """Of the comparison."""
        return self.entry.comparison.verdict

    @property
    def times(self) -> float:
        """The largest use of a bound; NaN where there is none."""
        return max(self.used, default=math.nan)

    @property
    def bounds(self) -> str:
        """The use of the bounds, as the page says it."""
        return " / ".join(f"{text.number(each)}×" for each in self.used) or "-"


def used_of_bound(distance: Distance | None) -> float | None:
    """The larger of the two multiples of a bound; None where there is no bound."""
    times = [] if distance is None else [distance.times_bound, distance.times_mean_bound]
    return max((each for each in times if each == each), default=None)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One layer.

    Args:
        number: its place in the execution order.
        layer: what is known of it.
        tail: what its name has beyond those of the branches it is on.
        verdict: the worst of its comparisons, or "none".
        tables: captions with rows.
        first: whether it is the first divergence.
        unfold: whether it stands open.
        diagnoses: of it.
    """

    number: int
    layer: Layer
    tail: str
    verdict: str
    tables: tuple[tuple[str, tuple[Row, ...]], ...]
    first: bool
    unfold: bool
    diagnoses: tuple[Diagnosis, ...]

    @property
    def rows(self) -> list[Row]:
        """Of all its tables."""
        return [row for _, rows in self.tables for row in rows]

    @property
    def counted(self) -> int:
        """How many entries of the report it has."""
        return sum(row.counts for row in self.rows)

    @property
    def largest(self) -> float:
        """The largest absolute difference; inf where something is NaN or missing."""
        apart = [row.entry.comparison.max_abs for row in self.rows]
        known = [each for each in apart if each == each]
        return max(known) if known else math.nan

    @property
    def times(self) -> float:
        """The largest use of a bound."""
        return max((used for row in self.rows for used in row.used), default=math.nan)


@dataclasses.dataclass(frozen=True)
class Group:
    """Neighbouring layers with the beginning of their names in common; ``span``: only with nothing that differs."""

    label: str
    members: tuple[Group | Leaf, ...]
    verdict: str
    count: int
    first: bool
    unfold: bool
    span: bool = False


def tree_of(report: DiffReport) -> tuple[Group | Leaf, ...]:
    """All layers and all comparisons, each once."""
    leaves = _leaves(report)
    unfold = len(leaves) <= _LISTED or sum(len(leaf.rows) for leaf in leaves) <= _FEW
    return _members(grown([leaf.layer.name for leaf in leaves]), leaves, unfold)


def all_leaves(members: Iterable[Group | Leaf]) -> Iterator[Leaf]:
    """The layers of a tree, in their order."""
    for member in members:
        if isinstance(member, Group):
            yield from all_leaves(member.members)
        else:
            yield member


def _members(branch: Branch, leaves: list[Leaf], unfold: bool) -> tuple[Group | Leaf, ...]:
    members: list[Group | Leaf] = []
    for each in branch.members:
        if isinstance(each, Branch):
            below = [leaves[place] for place in each.places]
            verdict = worst_of(leaf.verdict for leaf in below)
            first = any(leaf.first for leaf in below)
            differs = first or verdict in ("off", "broken")
            inner = _members(each, leaves, unfold)
            members.append(Group(each.label, inner, verdict, len(below), first, unfold or differs))
        else:
            members.append(dataclasses.replace(leaves[each[0]], tail=each[1]))
    return tuple(members if unfold else _put_away(members))


def _put_away(members: list[Group | Leaf]) -> Iterator[Group | Leaf]:
    """The members, with many neighbours in which nothing differs as one closed group."""
    for fine, run in itertools.groupby(members, key=lambda each: each.verdict in ("equal", "rounding")):
        some = list(run)
        if not fine or not _RUN <= len(some) < len(members):
            yield from some
            continue
        ends = [each.tail if isinstance(each, Leaf) else each.label for each in (some[0], some[-1])]
        count = sum(each.count if isinstance(each, Group) else 1 for each in some)
        yield Group(" to ".join(ends), tuple(some), worst_of(each.verdict for each in some), count, False, False, True)


def worst_of(verdicts: Iterable[str]) -> str:
    """The worst verdict; "none" only where there is no other."""
    known = [verdict for verdict in verdicts if verdict != NOTHING]
    return worst(known) if known else NOTHING


def _layers(report: DiffReport) -> list[Layer]:
    """Those that the report names, then those that only its entries name; each name once."""
    named: dict[str, Layer] = {}
    for layer in report.layers:
        known = named.get(layer.name)
        named[layer.name] = dataclasses.replace(known, notes=known.notes + layer.notes) if known else layer
    for entry in (*report.entries, *report.pairs):
        named.setdefault(entry.layer, Layer(entry.layer, entry.layer))
    return list(named.values())


def _leaves(report: DiffReport) -> list[Leaf]:
    layers, pictures = _layers(report), drawn(report)
    entries, pairs = _by_layer(report.entries), _by_layer(report.pairs, len(report.entries))
    telling = most_telling(report)
    favourite = key(telling[1]) if telling else None
    leaves = []
    for number, layer in enumerate(layers):
        own, beside = entries.get(layer.name, []), pairs.get(layer.name, [])
        first = report.first_divergence == layer.name
        leaves.append(
            Leaf(
                number,
                layer,
                layer.name,
                worst_of(entry.comparison.verdict for _, entry in own or beside),
                tuple(_table(some, pictures, favourite, some is own) for some in (own, beside) if some),
                first,
                first or len(layers) <= _FEW_LAYERS,
                tuple(each for each in report.diagnoses if each.layer == layer.name),
            )
        )
    return leaves


def _by_layer(entries: Iterable[Entry], start: int = 0) -> dict[str, list[tuple[int, Entry]]]:
    """The entries of each layer, with their places among all."""
    found: dict[str, list[tuple[int, Entry]]] = {}
    for number, entry in enumerate(entries, start):
        found.setdefault(entry.layer, []).append((number, entry))
    return found


def _table(
    numbered: list[tuple[int, Entry]], pictures: dict[Key, Drawn], favourite: Key | None, counts: bool
) -> tuple[str, tuple[Row, ...]]:
    """A caption and the rows below it."""
    entries = [entry for _, entry in numbered]
    several = len({(entry.first, entry.second) for entry in entries}) > 1
    rows = []
    for number, entry in numbered:
        sides = entry.second if entry.first == REFERENCE else f"{entry.first}, {entry.second}"
        drawing = pictures.get(key(entry))
        shown = text.visible(sides) if several else ""
        rows.append(Row(number, entry, shown, _used(entry), drawing, key(entry) == favourite, counts))
    return _caption(entries), tuple(rows)


def _used(entry: Entry) -> tuple[float, ...]:
    sides = zip((entry.first, entry.second), entry.comparison.distances, strict=True)
    used = [used_of_bound(distance) for side, distance in sides if side != REFERENCE]
    return tuple(each for each in used if each is not None)


def _caption(entries: list[Entry]) -> str:
    """What is beside what, said once for a table."""
    sides = {(entry.first, entry.second) for entry in entries}
    if len(sides) == 1:
        first, second = next(iter(sides))
        return f"{text.visible(second)} beside {_named(first)}"
    if all(first == REFERENCE for first, _ in sides):
        return "Each side beside the float64 reference"
    return "Two sides beside each other"


def _named(side: str) -> str:
    return "the float64 reference" if side == REFERENCE else text.visible(side)
