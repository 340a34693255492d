"""Which layer of one checkpoint is which layer of the other, and which of its tensors is which.

Layers are matched by their paths after the user's rules, then without what wrappers put before them (``module.``), then
by what frameworks call the parts of their transformer layers. A path that two layers would have is nobody's: nothing is
guessed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from mhabridge.checkpoint.planning import kinds
from mhabridge.checkpoint.planning.modules import Reading
from mhabridge.checkpoint.planning.origins import Dialect
from mhabridge.checkpoint.planning.transformer_parts import transformer_parts
from mhabridge.diff.checkpoints.sides import Checkpoint, Group
from mhabridge.errors import MHABridgeError

# What stands before every name of a model that something was wrapped around: DataParallel, torch.compile, Lightning,
# MindSpore's cells for training, averaged models.
WRAPPERS = (
    *("module", "model", "_orig_mod", "network", "_backbone", "backbone", "net", "state_dict", "model_state_dict"),
    "transformer",  # what Hugging Face's GPT-2 with a head calls the model below it
)
_CANONICAL = Dialect("torch")


@dataclasses.dataclass(frozen=True)
class Match:
    """A layer of the first side, of the second, or of both.

    Args:
        first: None if the first side lacks it.
        second: likewise.
        how: "rule", "name", or "" when only one side has it.
    """

    first: Group | None
    second: Group | None
    how: str = ""


@dataclasses.dataclass(frozen=True)
class Pair:
    """A parameter of a layer on both sides.

    Args:
        tensor: what it is called in the report.
        first: its name among the first side's tensors; None if the first side lacks it.
        second: likewise.
        reshaped: the second's shape is another way to say the first's (axes of length 1, or of groups).
    """

    tensor: str
    first: str | None
    second: str | None
    reshaped: bool = False


def unwrapped(path: str) -> str:
    """A path without what wrappers put before it.

    Example:
        >>> unwrapped("module.model.encoder.0"), unwrapped("module")
        ('encoder.0', '')
    """
    pieces = path.split(".")
    while pieces and pieces[0] in WRAPPERS:
        pieces = pieces[1:]
    return ".".join(pieces)


def match_layers(first: Checkpoint, second: Checkpoint) -> list[Match]:
    """Every layer of both, in the first side's order; what only the second has comes last."""
    one, two = first.groups(), second.groups()
    canonical = _canonical_path(one), _canonical_path(two)
    found: dict[int, Match] = {}
    free = {id(group): group for group in two}
    for keys in ((_path, _path), (_unwrapped, _unwrapped), canonical):
        left = [group for group in one if id(group) not in found]
        mine, theirs = _unique(left, keys[0]), _unique(free.values(), keys[1])
        for key in mine.keys() & theirs.keys():
            group, other = mine[key], theirs[key]
            found[id(group)] = Match(group, other, "name" if group.path == group.own_path else "rule")
            del free[id(other)]
    matches = [found.get(id(group), Match(group, None)) for group in one]
    return matches + [Match(None, other) for other in free.values()]


def _path(group: Group) -> str:
    return group.path


def _unwrapped(group: Group) -> str:
    return unwrapped(group.path)


def _canonical_path(groups: Sequence[Group]) -> Callable[[Group], str]:
    """PyTorch's path of the parts of transformer layers; else the unwrapped one."""
    prefixes = [group.path for group in groups if group.block is not None]
    parts = transformer_parts(
        prefixes, [f"{group.path}.{leaf}" for group in groups for leaf in group.tensors], _CANONICAL
    )
    return lambda group: unwrapped(parts.get(group.path, group.path))


def _unique(groups: Iterable[Group], key: Callable[[Group], str]) -> dict[tuple[str, bool], Group]:
    """Those whose path no other one has; attention may have other tensors beside it under its own path."""
    found: dict[tuple[str, bool], list[Group]] = {}
    for group in groups:
        found.setdefault((key(group), group.block is not None), []).append(group)
    return {path: same[0] for path, same in found.items() if len(same) == 1}


def settle_blocks(first: Checkpoint, second: Checkpoint) -> list[str]:
    """Read attention alike on both sides; what only one side can tell to be attention is compared by name.

    Returns:
        Notes on layers that look like attention and are not compared as that.
    """
    for one, other in ((first, second), (second, first)):
        known = {unwrapped(prefix): block for prefix, block in other.blocks.items()}
        for prefix in list(one.unread):
            block, error = known.get(unwrapped(prefix)), one.unread[prefix]
            if block is not None:
                fields = {name: value for name, value in block.facts("").items() if name != "layout"}
                if one.try_block(prefix, fields):
                    one.borrowed.add(prefix)
                else:
                    one.unread[prefix] = error  # why it could not be read by itself
    for one, other in ((first, second), (second, first)):
        known = {unwrapped(prefix): block for prefix, block in other.blocks.items()}
        names = {unwrapped(name) for name in other.tensors}
        for prefix in list(one.blocks):
            plain = unwrapped(prefix)
            if plain not in known and any(name.startswith(f"{plain}." if plain else "") for name in names):
                del one.blocks[prefix]
    return [
        f"{side.file.path.name}: {prefix or 'the whole file'} is compared tensor by tensor, not as attention: {error}"
        for side in (first, second)
        for prefix, error in side.unread.items()
    ]


def pair_tensors(match: Match, sides: tuple[Checkpoint, Checkpoint]) -> tuple[list[Pair], str, list[str]]:
    """The parameters of a layer, what kind of layer it is, and notes."""
    one, other = match.first, match.second
    if one is None or other is None:
        group = one or other
        assert group is not None
        pairs = [Pair(name, name if one else None, name if other else None) for name in group.tensors]
        return pairs, _kind_alone(group), []
    if one.block is not None:
        return [Pair(part, *_there(part, one, other)) for part in _union(one.tensors, other.tensors)], ATTENTION, []
    readings = _common(one.readings, other.readings)
    if readings is None:
        return [Pair(leaf, *_there(leaf, one, other)) for leaf in _union(one.tensors, other.tensors)], "", []
    return _by_parts(one, other, *readings, sides)


ATTENTION = "MultiheadAttention"


def _by_parts(
    one: Group, other: Group, reading: Reading, second: Reading, sides: tuple[Checkpoint, Checkpoint]
) -> tuple[list[Pair], str, list[str]]:
    mine = {part: leaf for leaf, part in reading.parts.items()}
    theirs = {part: leaf for leaf, part in second.parts.items()}
    alike, named = _sizes(reading) == _sizes(second), (mine, theirs)
    notes: list[str] = []
    pairs: list[Pair] = []
    for part in _union(mine, theirs):
        lacks = [
            part not in names and not side.may_have(group, reading.kind, part)
            for names, side, group in zip(named, sides, (one, other), strict=True)
        ]
        if any(lacks):
            which = "first" if lacks[0] else "second"
            notes.append(f"{mine.get(part, theirs.get(part))}: the {which} side's framework keeps no {part}")
            continue
        pairs.append(Pair(mine.get(part, theirs.get(part, "")), mine.get(part), theirs.get(part), alike))
    return pairs, _kind(one, other, reading.kind), notes


def _there(name: str, one: Group, other: Group) -> tuple[str | None, str | None]:
    return (name if name in one.tensors else None, name if name in other.tensors else None)


def _union(first: Iterable[str], second: Iterable[str]) -> list[str]:
    return list(dict.fromkeys((*first, *second)))


def _common(first: Sequence[Reading], second: Sequence[Reading]) -> tuple[Reading, Reading] | None:
    """A reading of each, of one kind; the sizes agree if any two do."""
    both = [(one, other) for one in first for other in second if one.kind == other.kind]
    alike = [pair for pair in both if _sizes(pair[0]) == _sizes(pair[1])]
    return next(iter(alike or both), None)


def _sizes(reading: Reading) -> dict[str, int]:
    """Whether a convolution's groups are an axis or not, it has so many outputs."""
    sizes = {letter: size for letter, size in reading.sizes.items() if letter not in "GP"}
    if "G" in reading.sizes:
        sizes["O"] = reading.sizes["G"] * reading.sizes["P"]
    return sizes


def _kind(one: Group, other: Group, default: str) -> str:
    """By the hints that names give, where several kinds fit both."""
    there = {reading.kind for reading in other.readings}
    found = [reading for reading in one.readings if reading.kind in there]
    if all(reading.grouped for reading in found):
        return default  # how many groups there are is open, and does not matter here
    for group in (one, other):
        try:
            return kinds.decide(group.path, found, _CANONICAL.name).reading.kind
        except MHABridgeError:
            continue
    return default


def _kind_alone(group: Group) -> str:
    if group.block is not None:
        return ATTENTION
    return group.readings[0].kind if len({reading.kind for reading in group.readings}) == 1 else ""
