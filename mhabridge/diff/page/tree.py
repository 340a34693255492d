"""Layers' paths as a tree, in the order in which the layers ran.

Only neighbours are put together: a path that comes up again later begins another branch, since order is what leads to
the first divergence. A branch with one layer is no branch.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence

DEPTH = 6  # further levels are not worth their indentation; a hostile path may have thousands


@dataclasses.dataclass(frozen=True)
class Branch:
    """Some neighbouring layers whose paths begin alike.

    Args:
        label: what they have in common, without what the branches above have.
        members: branches, and the places of single layers in the list with what their path has beyond the labels.
    """

    label: str
    members: tuple[Branch | tuple[int, str], ...]

    @property
    def places(self) -> tuple[int, ...]:
        """Of all layers in it."""
        parts = (each.places if isinstance(each, Branch) else (each[0],) for each in self.members)
        return tuple(itertools.chain.from_iterable(parts))


def grown(paths: Sequence[str]) -> Branch:
    """The tree of some paths; its root has no label.

    Example:
        >>> tree = grown(["emb", "enc.0.attn", "enc.0.norm", "enc.1.attn", "head"])
        >>> [each.label if isinstance(each, Branch) else each for each in tree.members]
        [(0, 'emb'), 'enc.', (4, 'head')]
        >>> tree.members[1].members[0]
        Branch(label='0.', members=((1, 'attn'), (2, 'norm')))
        >>> tree.members[1].members[1]
        (3, '1.attn')
    """
    split = [(place, re.findall(r"[^./]*[./]|[^./]+", path)) for place, path in enumerate(paths)]
    return Branch("", _members(split, 0))


def _members(paths: list[tuple[int, list[str]]], depth: int) -> tuple[Branch | tuple[int, str], ...]:
    if depth >= DEPTH:
        return tuple((place, "".join(parts)) for place, parts in paths)
    members: list[Branch | tuple[int, str]] = []
    for _, group in itertools.groupby(paths, key=lambda path: path[1][:1]):
        alike = list(group)
        common = _common([parts[:-1] for _, parts in alike])
        if len(alike) == 1 or not common:
            members += [(place, "".join(parts)) for place, parts in alike]
            continue
        rest = [(place, parts[common:]) for place, parts in alike]
        members.append(Branch("".join(alike[0][1][:common]), _members(rest, depth + 1)))
    return tuple(members)


def _common(paths: list[list[str]]) -> int:
    """How many parts all paths begin with."""
    same = (len(set(parts)) == 1 for parts in zip(*paths, strict=False))
    return sum(1 for _ in itertools.takewhile(bool, same))
