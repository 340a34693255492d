"""Whose layers a checkpoint has, where only their names can tell: what speaks for a framework, and what against it.

The names are data: ``names`` and ``shared_names`` in ``[framework.checkpoints]`` of each table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mhabridge import mapping
from mhabridge.checkpoint.planning import modules
from mhabridge.checkpoint.planning.drafts import by_module
from mhabridge.checkpoint.planning.modules import Reading, Shape


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What names tell.

    Args:
        dialects: the frameworks whose names these may be.
        note: why, for people.
    """

    dialects: tuple[str, ...]
    note: str


def weigh(shapes: Mapping[str, Shape]) -> Verdict | None:
    """The framework that the names in a file speak for, or one that they only seem to speak for.

    A name that only one framework's layers have decides. One that others have too, such as gamma, counts
    where a layer of the framework is whole, and against all layers that the framework would call otherwise.

    Args:
        shapes: of every tensor, by name.

    Returns:
        None when no name speaks for any framework.

    Example:
        >>> weigh({"norm.gamma": (4,), "norm.beta": (4,)}).dialects
        ('mindspore', 'mindspore.mint')
        >>> "mindspore" in weigh({"ls.gamma": (4,), "norm.weight": (4,), "norm.bias": (4,)}).dialects
        False
    """
    leaves: dict[str, str] = {}
    for name in shapes:
        leaves.setdefault(name.rpartition(".")[2], name)
    for framework in mapping.FRAMEWORKS:
        own = [leaf for leaf in _declared(framework).get("names", ()) if leaf in leaves]
        if own:
            why = f"only its layers have {', '.join(own)} (as in {leaves[own[0]]})"
            return Verdict(modules.of_framework(framework), _said(framework, why))
    for framework in mapping.FRAMEWORKS:
        shared = [leaf for leaf in _declared(framework).get("shared_names", ()) if leaf in leaves]
        if shared:
            return _weighed(framework, shared, leaves[shared[0]], shapes)
    return None


def _weighed(framework: str, shared: list[str], first: str, shapes: Mapping[str, Shape]) -> Verdict:
    """Whether a file is a framework's that has names which others' layers have, too."""
    others = tuple(one for one in mapping.FRAMEWORKS if one != framework)
    whole, against = [], []
    for path, own, readings in _layers(shapes, framework):
        if any(_is_whole(framework, reading) for reading in readings if own.keys() & shared):
            whole.append(path)
        elif not readings and modules.readings(own, others):
            against.append(path)
    if whole and len(whole) >= len(against):
        why = f"its layers have {', '.join(shared)} (as in {first})"
        why += f", and {len(against)} have other names (such as {against[0]})" if against else ""
        return Verdict(modules.of_framework(framework), _said(framework, why))
    title = _title(framework)
    why = "no layer is whole with it"
    if against:
        why = f"{_count(len(against), 'layer has', 'layers have')} names and shapes that {title}'s have not"
        why += f" (such as {against[0]})"
    note = f"not read as {title}'s although {first} is there: {why}. --from {framework} says otherwise."
    return Verdict(others, note)


def _layers(shapes: Mapping[str, Shape], framework: str) -> Iterator[tuple[str, dict[str, Shape], list[Reading]]]:
    """Each layer: its path, its own tensors, and the framework's layers that it can be."""
    known: dict[Any, list[Reading]] = {}
    for path, leaves in by_module(shapes).items():
        own = {leaf: tuple(shapes[name]) for leaf, name in leaves.items()}
        alike = tuple(own.items())
        if alike not in known:
            known[alike] = modules.readings(own, framework)
        yield path, own, known[alike]


def _is_whole(framework: str, reading: Reading) -> bool:
    return {part.name for part in modules.kinds_of(framework)[reading.kind].parts} == reading.parts.keys()


def _said(framework: str, why: str) -> str:
    others: Iterable[str] = (one for one in mapping.FRAMEWORKS if one != framework)
    return f"read as {_title(framework)}'s: {why}. --from {' or '.join(others)} says otherwise."


def _count(number: int, one: str, more: str) -> str:
    return f"{number} {one if number == 1 else more}"


def _title(framework: str) -> str:
    return str(mapping.table(framework)["framework"]["title"])


def _declared(framework: str) -> dict[str, Any]:
    declared: dict[str, Any] = mapping.table(framework)["framework"]["checkpoints"]
    return declared
