"""Of several readings of a layer, the one that holds: what the user says, the target's names, then declared hints.

Where these leave two readings that would be written differently, both are listed and nothing is guessed. The hints are
data: ``[[hints]]`` and ``[unlikely]`` in mappings/layouts.toml.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from mhabridge import mapping
from mhabridge.checkpoint.planning.modules import Reading, Shape, kinds_of, known_dialects, of_framework
from mhabridge.errors import ArgumentError, CheckpointError, UnsupportedError

Wanted = Mapping[str, Shape] | None
_DIGITS = 10  # of a number of groups; Python takes its time to read very long ones

UNKNOWN = "unknown"  # what people say of a layer that is of no kind: its tensors stay as they are


@dataclasses.dataclass(frozen=True)
class Choice:
    """A reading and its number of groups.

    Args:
        reading: of the layer.
        groups: of a convolution.
        others: the kinds that would fit too, and are written differently.
        groups_open: whether it is only taken not to be in groups: no shape tells, and nobody said so.
    """

    reading: Reading
    groups: int = 1
    others: tuple[str, ...] = ()
    groups_open: bool = False

    def __str__(self) -> str:
        groups = self.reading.sizes.get("G", self.groups)
        return self.reading.kind if groups == 1 else f"{self.reading.kind}:{groups}"

    @property
    def rule(self) -> str:
        """What a plan says of it."""
        return f"{self}; could be {' or '.join(self.others)}" if self.others else str(self)

    @property
    def recorded(self) -> str:
        """The text that travels with a file, for ``of_record``; a convolution known to be of one group says so."""
        return f"{self}:1" if _in_groups(self.reading.kind) and not self.groups_open else str(self)

    def written(self, dialect: str) -> dict[str, tuple[str, Shape]]:
        """Name and shape of each part in a framework, by its canonical name."""
        return self.reading.in_dialect(dialect, self.groups)

    def said(self, dialect: str) -> str:
        """What of it is written in a framework, for people."""
        return ", ".join(f"{name} {shape}" for name, shape in self.written(dialect).values())


def stated(path: str, found: Sequence[Reading], kind: str, dialect: str) -> Choice:
    """The reading that somebody states, such as "embedding" or "grouped_conv2d:32".

    Raises:
        ArgumentError: it does not fit the tensors, or the number of groups is missing or cannot be.
    """
    name, colon, text = kind.partition(":")
    for reading in found:
        if reading.kind == name and name in kinds_of(dialect):
            return Choice(reading, _stated_groups(path, reading, text if colon else None))
    raise ArgumentError(
        f"kind of {path}",
        given=repr(kind),
        expected="one of " + ", ".join(sorted({reading.kind for reading in found} & kinds_of(dialect).keys())),
        advice=f"Groups follow a colon, as in grouped_conv2d:32. {UNKNOWN!r} leaves its tensors as they are.",
    )


def _stated_groups(path: str, reading: Reading, text: str | None) -> int:
    """The number of groups in "grouped_conv2d:4"; without one it must be plain, or told by the shape."""
    told = reading.sizes.get("G", reading.depthwise) if reading.grouped else 1
    if text is None and told:
        return told
    groups = int(text) if text is not None and text.isdecimal() and len(text) < _DIGITS else 0
    plain = not reading.grouped and _in_groups(reading.kind) is not None
    if reading.may_have(groups) or (0 < groups == told and (plain or reading.grouped)):
        return groups
    fitting = f"a divisor of {reading.sizes['O']} above 1" if "O" in reading.sizes else f"{told}, as its shape says"
    raise ArgumentError(
        f"kind of {path}",
        given=reading.kind + (" without a number" if text is None else f" with the number {text!r}"),
        expected=f"its number of groups ({fitting}) after a colon" if reading.grouped else f"{reading.kind} alone",
        advice=f"In groups it is {_in_groups(reading.kind)}:{text}." if plain and text else "",
    )


def of_record(path: str, found: Sequence[Reading], kind: str, dialect: str, wanted: Wanted = None) -> Choice:
    """The reading that travels with the file. A convolution without a number may be one in groups all the same.

    Raises:
        ArgumentError: it does not fit the tensors.
        CheckpointError: it leaves two readings.
        UnsupportedError: the target's framework has no such layer.
    """
    alike = [reading for reading in found if reading.kind in (kind, f"grouped_{kind}")]
    return decide(path, alike, dialect, wanted) if len(alike) > 1 else stated(path, found, kind, dialect)


def decide(path: str, found: Sequence[Reading], dialect: str, wanted: Wanted = None) -> Choice:
    """The one reading of a layer that holds.

    Args:
        path: of the layer, for hints and messages.
        found: what ``modules.readings`` gave; at least one.
        dialect: the target's.
        wanted: the target's real names and shapes in this layer, when they are known.

    Raises:
        CheckpointError: readings are left whose names or shapes in the target differ; all are listed.
        UnsupportedError: the target's framework has no such layer.

    Example:
        >>> from mhabridge.checkpoint.planning.modules import readings
        >>> str(decide("wte", readings({"weight": (4, 3)}, "torch"), "mindspore"))
        'embedding'
    """
    choices = _possible(path, found, dialect)
    open_ones = [one for one in found if one.kind in kinds_of(dialect) and one.may_have(one.sizes.get("O", 0))]
    more = [Choice(reading, reading.sizes["O"]) for reading in open_ones]
    if wanted is not None:
        sizes = sorted({size for shape in wanted.values() for size in shape})
        in_groups = [*more, *(Choice(one, size) for one in open_ones for size in sizes if one.may_have(size))]
        fitting = [one for one in choices + in_groups if _fits(one, dialect, wanted)]
        named = [one for one in choices if {name for name, _ in one.written(dialect).values()} <= wanted.keys()]
        # Where no reading has the wanted shapes, names settle it, so that the shape is what does not fit.
        choices, more = fitting or named or choices, [one for one in in_groups if one in fitting] if fitting else more
    choices = _hinted(path, choices)
    different = {one.said(dialect): one for one in reversed(choices)}
    likely = {said: one for said, one in different.items() if not _unlikely(one.reading)} or different
    if len(likely) > 1:
        raise _undecided(path, likely)
    said, choice = next(iter(likely.items()))
    others = [one.reading.kind for text, one in different.items() if text != said]
    more = [one for one in more if one.reading.kind == _in_groups(choice.reading.kind)]
    others += [one.reading.kind for one in more if one.said(dialect) != said]
    return dataclasses.replace(choice, others=tuple(dict.fromkeys(others)), groups_open=bool(more))


def _unlikely(reading: Reading) -> bool:
    declared = mapping.table("layouts")["unlikely"]
    one = reading.kind in declared["kinds_of_one"] and reading.sizes.get("K") == 1
    return one or reading.kind in declared["kinds"]


def _in_groups(kind: str) -> str | None:
    """The kind that a convolution in groups is; None of everything else."""
    name = f"grouped_{kind}"
    return name if name in _all_kinds() else None


@functools.lru_cache(maxsize=None)  # noqa: UP033
def _all_kinds() -> frozenset[str]:
    return frozenset(kind for dialect in known_dialects() for kind in kinds_of(dialect))


def _possible(path: str, found: Sequence[Reading], dialect: str) -> list[Choice]:
    """The readings that the target has such layers for; groups that no shape tells are 1, or as many as channels."""
    known = [reading for reading in found if reading.kind in kinds_of(dialect)]
    if not known:
        raise UnsupportedError(
            path,
            given=f"a layer that can only be {', '.join(reading.kind for reading in found)}",
            expected=f"a layer that {dialect} has",
            advice="Leave it out (--drop), or keep its names and shapes with another target.",
        )
    plain = [Choice(reading) for reading in known if not reading.grouped or "G" in reading.sizes]
    return plain + [Choice(reading, reading.depthwise) for reading in known if reading.depthwise]


def fitting_dialect(found: Sequence[Reading], dialect: str, wanted: Wanted) -> str:
    """The target's dialect, or the one beside it in which a reading has the names that are wanted.

    A model of MindSpore may have layers of mindspore.nn beside some of mindspore.mint.

    Args:
        found: what ``modules.readings`` gave.
        dialect: the target's.
        wanted: the target's real names and shapes in this layer, when they are known.
    """
    beside = (dialect, *of_framework(dialect.partition(".")[0]))
    choices = [(one, Choice(reading)) for one in beside for reading in found if reading.kind in kinds_of(one)]
    return next((one for one, choice in choices if wanted and _fits(choice, one, wanted)), dialect)


def _fits(choice: Choice, dialect: str, wanted: Mapping[str, Shape]) -> bool:
    return all(wanted.get(name) == shape for name, shape in choice.written(dialect).values())


def _hinted(path: str, choices: list[Choice]) -> list[Choice]:
    """The readings that a hint speaks for, or all."""
    for part in _last_parts(path):
        for hints in mapping.table("layouts")["hints"]:
            fitting = [one for one in choices if _speaks_for(hints.get(one.reading.kind, ()), part)]
            if fitting:
                return fitting
    return choices


def not_ruled_out(path: str, found: Sequence[Reading]) -> list[Reading]:
    """The readings that the layer's name does not rule out.

    Example:
        >>> from mhabridge.checkpoint.planning.modules import readings
        >>> [not_ruled_out(path, readings({"weight": (4, 3, 3)}, "torch")) == [] for path in ("bilinear", "conv")]
        [True, False]
    """
    ruled_out = {
        kind
        for entry in mapping.table("layouts")["not_kinds"]
        if any(_speaks_for(entry["names"], part) for part in _last_parts(path))
        for kind in entry["kinds"]
    }
    return [reading for reading in found if reading.kind not in ruled_out]


def _last_parts(path: str) -> list[str]:
    return path.lower().split(".")[-2:][::-1]


def _speaks_for(patterns: Sequence[str], name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _undecided(path: str, choices: Mapping[str, Choice]) -> CheckpointError:
    first = next(iter(choices.values()))
    return CheckpointError(
        path or "the layer",
        given=" or ".join(sorted(f"{one.reading.kind} ({said})" for said, one in choices.items())),
        expected="one reading: the names and shapes in the file leave all of these",
        advice=f"Say which, as in --kind '{path or '*'}={first}', or give the target's own names with --names-of.",
    )
