"""Of several readings of a layer, the one that holds: what the user says, the target's names, then declared hints.

Where these leave two readings that would be written differently, both are listed and nothing is guessed. The hints are
data: ``[[hints]]`` and ``[unlikely]`` in mappings/layouts.toml.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from mhabridge import mapping
from mhabridge.checkpoint.planning.modules import Reading, Shape, kinds_of, of_framework
from mhabridge.errors import ArgumentError, CheckpointError, UnsupportedError


@dataclasses.dataclass(frozen=True)
class Choice:
    """A reading and its number of groups; ``others`` are the kinds that would fit too, and are written differently."""

    reading: Reading
    groups: int = 1
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.reading.kind if self.groups == 1 else f"{self.reading.kind}:{self.groups}"

    def written(self, dialect: str) -> dict[str, tuple[str, Shape]]:
        """Name and shape of each part in a framework, by its canonical name."""
        return self.reading.in_dialect(dialect, self.groups)

    def said(self, dialect: str) -> str:
        """What of it is written in a framework, for people."""
        return ", ".join(f"{name} {shape}" for name, shape in self.written(dialect).values())


def stated(path: str, found: Sequence[Reading], kind: str, dialect: str) -> Choice:
    """The reading that somebody states, such as "embedding" or "grouped_conv2d:32".

    Raises:
        ArgumentError: it does not fit the tensors.
    """
    name, _, text = kind.partition(":")
    for reading in found:
        if reading.kind == name and (not text or text.isdigit()) and name in kinds_of(dialect):
            return Choice(reading, int(text) if text else reading.depthwise or 1)
    raise ArgumentError(
        f"kind of {path}",
        given=repr(kind),
        expected="one of " + ", ".join(sorted({reading.kind for reading in found} & kinds_of(dialect).keys())),
        advice="Groups follow a colon, as in grouped_conv2d:32.",
    )


def decide(path: str, found: Sequence[Reading], dialect: str, wanted: Mapping[str, Shape] | None = None) -> Choice:
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
    if wanted is not None:
        more = [Choice(reading, groups) for reading in found for groups in reading.possible_groups()]
        choices = [one for one in choices + more if _fits(one, dialect, wanted)] or choices
    choices = _hinted(path, choices)
    different = {one.said(dialect): one for one in reversed(choices)}
    likely = {said: one for said, one in different.items() if not _unlikely(one.reading)} or different
    if len(likely) > 1:
        raise _undecided(path, likely)
    said, choice = next(iter(likely.items()))
    others = [one.reading.kind for text, one in different.items() if text != said]
    return dataclasses.replace(choice, others=tuple(dict.fromkeys(others + _in_groups(choice, found, dialect))))


def _unlikely(reading: Reading) -> bool:
    declared = mapping.table("layouts")["unlikely"]
    one = reading.kind in declared["kinds_of_one"] and reading.sizes.get("K") == 1
    return one or reading.kind in declared["kinds"]


def _in_groups(choice: Choice, found: Sequence[Reading], dialect: str) -> list[str]:
    """The kinds that this convolution would be in groups, which no shape tells, where these are written differently."""
    return [
        reading.kind
        for reading in found
        if reading.kind == f"grouped_{choice.reading.kind}" and reading.kind in kinds_of(dialect)
        for groups in reading.possible_groups()[:1]
        if Choice(reading, groups).said(dialect) != choice.said(dialect)
    ]


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


def fitting_dialect(found: Sequence[Reading], dialect: str, wanted: Mapping[str, Shape] | None) -> str:
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
    for part in reversed(path.lower().split(".")[-2:]):
        for hints in mapping.table("layouts")["hints"]:
            fitting = [one for one in choices if _speaks_for(hints.get(one.reading.kind, ()), part)]
            if fitting:
                return fitting
    return choices


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
