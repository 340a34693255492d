"""A plan in the making: which of the source's tensors are used already, and what is written of them.

Names here are those after the user's rules; entries speak of the source's own names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from mhabridge import packing
from mhabridge.checkpoint.planning import renaming
from mhabridge.checkpoint.storage import views
from mhabridge.checkpoint.storage.stored import StoredFile, StoredTensor
from mhabridge.checkpoint.storage.writing import Outgoing
from mhabridge.errors import WeightsError

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Entry:
    """What happens to one tensor of the target, or to one of the source that does not reach it.

    Args:
        sources: the source's tensors that it is made of, by their names in the file.
        target: its name in the target; None for what is left out.
        dtype: its dtype, which never changes.
        before: the shapes of the sources.
        after: its shape in the target; None for what is left out.
        rule: by which rule.
    """

    sources: tuple[str, ...]
    target: str | None
    dtype: str
    before: tuple[Shape, ...]
    after: Shape | None
    rule: str

    @property
    def unchanged(self) -> bool:
        """Whether the target has the same tensor under the same name."""
        return self.sources == (self.target,) and self.before == (self.after,)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON holds them."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Check:
    """What of the target must have the bits of which part of the source.

    Args:
        target: the name of the target's tensor.
        view_of: takes a part out of it, as a view.
        source: the part of the source; None: zeros.
    """

    target: str
    view_of: Callable[[StoredTensor], StoredTensor]
    source: StoredTensor | None


class Draft:
    """Collects what happens to every tensor.

    Args:
        file: the open source.
        rename: the user's rules, as ``renaming.renamer`` takes them.
        prefix: what lies under it is all there is, and loses it before the rules are used.

    Raises:
        ArgumentError: a rule that is none, or that no name fits.
        WeightsError: two tensors get one name, or nothing has such a prefix.
    """

    def __init__(self, file: StoredFile, rename: Any = None, prefix: str = "") -> None:
        self.file = file
        below = packing.below(prefix, {name: name for name in file})
        if prefix and not below:
            near = dict.fromkeys(name[: len(prefix) + 8] for name in renaming.close(f"{prefix}*", file))
            raise WeightsError(
                prefix,
                given="no tensor with this prefix",
                expected="one of the file's own prefixes",
                advice=f"Names begin with {', '.join(near)}." if near else "`mhabridge inspect` lists the names.",
            )
        rules = list(rename) if isinstance(rename, Iterator) else rename
        renamed = renaming.renamed(below, renaming.renamer(rules))
        renaming.require_met(rules, below)
        self.old_names = {new: below[old] for new, old in renamed.items()}
        self.tensors = {new: file[old] for new, old in self.old_names.items()}
        self.entries: list[Entry] = []
        self.outgoing: list[Outgoing] = []
        self.checks: list[Check] = []
        self.notes: list[str] = []
        self._used: set[str] = set()

    def left(self) -> dict[str, StoredTensor]:
        """The tensors that nothing has happened to."""
        return {name: tensor for name, tensor in self.tensors.items() if name not in self._used}

    def old_path(self, leaves: Mapping[str, str]) -> str:
        """The path of a layer before the user's rules, from the new names of its tensors by their last parts."""
        leaf, name = next(iter(leaves.items()))
        return prefix_of(self.old_names[name], leaf) or ""

    def new_paths(self, paths: Iterable[str]) -> dict[str, str]:
        """What paths that tensors are left below are after the user's rules, by what they were."""
        found: dict[str, str] = {}
        known = Paths(paths)
        for new in self.left():
            old = self.old_names[new]
            for path in known.above(old):
                after = prefix_of(new, old[len(path) + bool(path) :])
                if after is not None:
                    found.setdefault(path, after)
        return found

    def use(self, names: Iterable[str]) -> None:
        """Tensors that go into the target with others."""
        self._used.update(names)

    def drop(self, patterns: Sequence[str]) -> None:
        """Leave out what the user's patterns name, by old names or new ones.

        Raises:
            ArgumentError: nothing in the file has such a name.
        """
        if not patterns:
            return
        names = dict.fromkeys((*self.tensors, *self.file))
        entries = [entry.name for entry in self.file.objects]
        unmet = [
            pattern
            for pattern in patterns
            if not any(fnmatchcase(name, pattern) for name in names)
            and not any(renaming.matches_entry(name, [pattern]) for name in entries)
        ]
        if unmet:
            raise renaming.nothing("drop", {pattern: pattern for pattern in unmet}, [*names, *entries])
        for name in self.left():
            pattern = renaming.matches(name, patterns) or renaming.matches(self.old_names[name], patterns)
            if pattern is not None:
                self.leave_out(name, f"dropped by --drop {pattern}")

    def leave_out(self, name: str, rule: str) -> None:
        """A tensor that the target does not get."""
        tensor = self.tensors[name]
        self.use([name])
        self.entries.append(Entry((self.old_names[name],), None, tensor.dtype, (tensor.shape,), None, rule))

    def fill(self, names: Sequence[str], outgoing: Outgoing, rule: str) -> None:
        """A tensor of the target, made of some of the source's."""
        self.use(names)
        self.outgoing.append(outgoing)
        sources = tuple([self.old_names[name] for name in names])
        shapes = tuple([self.tensors[name].shape for name in names])
        self.entries.append(Entry(sources, outgoing.name, outgoing.dtype, shapes, outgoing.shape, rule))

    def carry(self, name: str, target: str, shape: Shape, rule: str) -> None:
        """A tensor of the target that is one of the source's, perhaps with other axes of length 1."""
        tensor = self.tensors[name]
        self.fill([name], views.emitted(self.file, tensor, target, shape), rule)
        self.checks.append(Check(target, lambda stored: dataclasses.replace(stored, shape=tensor.shape), tensor))

    def turn(self, name: str, target: str, canonical: StoredTensor, steps: Sequence[str], rule: str) -> None:
        """A tensor of the target that is one of the source's with its axes in another order.

        Args:
            name: the source's.
            target: the target's.
            canonical: a view of the source's, in the order from which ``steps`` lead to the target's.
            steps: as ``views.packed`` takes them.
            rule: by which rule.
        """
        self.fill([name], views.packed(self.file, target, steps, [canonical]), rule)

        def view_of(stored: StoredTensor) -> StoredTensor:
            return views.split(stored, steps, [canonical.shape])[0]

        self.checks.append(Check(target, view_of, canonical))

    def filled(self) -> list[Entry]:
        """The entries of what the target gets."""
        return [entry for entry in self.entries if entry.target is not None]

    def in_order(self) -> list[Outgoing]:
        """What is written, in the order in which the source has it."""
        place = {old: number for number, old in enumerate(self.old_names.values())}
        first = {entry.target: min(place[source] for source in entry.sources) for entry in self.filled()}
        return sorted(self.outgoing, key=lambda one: first[one.name])


def prefix_of(name: str, below: str) -> str | None:
    """What goes before the last parts of a name, if these are its last parts.

    Example:
        >>> prefix_of("a.b.c.d", "c.d"), prefix_of("a", "a"), prefix_of("a.b", "c")
        ('a.b', '', None)
    """
    if name == below:
        return ""
    return name[: -len(below) - 1] if name.endswith(f".{below}") else None


class Paths:
    """Some paths, and which of them a name lies below; a hostile name may have any number of dots.

    Example:
        >>> list(Paths(["", "a", "a.b", "c"]).above("a.b.weight"))
        ['', 'a', 'a.b']
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self._paths = frozenset(paths)
        self._lengths = sorted({len(path) for path in self._paths})

    def above(self, name: str) -> Iterator[str]:
        """Those that a name lies below, the shortest first."""
        for length in self._lengths:
            if (length == 0 or name[length : length + 1] == ".") and name[:length] in self._paths:
                yield name[:length]


def by_module(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """The tensors of each module: full names by their last part.

    Example:
        >>> by_module(["fc.weight", "fc.bias", "scale"])
        {'fc': {'weight': 'fc.weight', 'bias': 'fc.bias'}, '': {'scale': 'scale'}}
    """
    found: dict[str, dict[str, str]] = {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        found.setdefault(path, {})[leaf] = name
    return found
