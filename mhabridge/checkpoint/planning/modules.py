"""Layers of a checkpoint that are no attention: which kinds of layer one can be, and what a framework calls it.

Everything about the frameworks is data: ``[[modules]]`` in their tables. All that ever changes is a parameter's name,
and axes of length 1 or of groups; the elements and their order stay. Which reading holds is in ``kinds``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping

from mhabridge import mapping
from mhabridge.errors import ArgumentError

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Part:
    """One parameter of a kind of layer in one framework: its canonical and its own name, and its axes."""

    part: str
    name: str
    axes: tuple[str, ...]
    optional: bool


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of layer in one framework: its parameters, and what no size of it is below."""

    parts: tuple[Part, ...]
    smallest: int


@dataclasses.dataclass(frozen=True)
class Reading:
    """One way to understand the tensors of a layer.

    Args:
        kind: of the layer, such as "linear".
        parts: the canonical name of each tensor, by the name it has.
        sizes: of the layer, by letter.
    """

    kind: str
    parts: dict[str, str]
    sizes: dict[str, int]

    @property
    def grouped(self) -> bool:
        """Whether it is a convolution in groups."""
        return self.kind.startswith("grouped_")

    @property
    def depthwise(self) -> int:
        """The groups of a convolution in unknown groups of one input channel each; 0 for all other layers."""
        open_groups = self.grouped and "G" not in self.sizes
        outputs = self.sizes["O"] if open_groups and self.sizes.get("I") == 1 else 0
        return outputs if outputs > 1 else 0

    def may_have(self, groups: int) -> bool:
        """Whether it is a convolution in unknown groups that may be so many, and more than one."""
        return self.grouped and "G" not in self.sizes and groups > 1 and self.sizes["O"] % groups == 0

    def in_dialect(self, dialect: str, groups: int = 1) -> dict[str, tuple[str, Shape]]:
        """Name and shape of each part in a framework, by its canonical name; parts that it has not are left out.

        Raises:
            ArgumentError: the groups do not divide the layer's outputs.

        Example:
            >>> reading = readings({"weight": (4, 3, 5)}, "torch")[0]
            >>> reading.kind, reading.in_dialect("mindspore")
            ('conv1d', {'weight': ('weight', (4, 3, 1, 5))})
        """
        sizes = self._all_sizes(groups)
        return {
            part.part: (part.name, tuple(1 if axis == "1" else sizes[axis] for axis in part.axes))
            for part in kinds_of(dialect)[self.kind].parts
            if part.part in self.parts.values()
        }

    def _all_sizes(self, groups: int) -> dict[str, int]:
        """The sizes, with those that tell of groups in both ways: O outputs, or G groups of P."""
        sizes = dict(self.sizes)
        if "G" in sizes:
            sizes["O"] = sizes["G"] * sizes["P"]
        elif "O" in sizes:
            if groups < 1 or sizes["O"] % groups:
                raise ArgumentError("groups", given=str(groups), expected=f"a divisor of {sizes['O']}")
            sizes.update(G=groups, P=sizes["O"] // groups)
        return sizes


def readings(tensors: Mapping[str, Shape], dialects: str | Iterable[str] | None = None) -> list[Reading]:
    """All ways to understand one layer's own tensors, names without what goes before them.

    Args:
        tensors: the shape of each, by name.
        dialects: the frameworks that the file may be from; None for all.

    Example:
        >>> [reading.kind for reading in readings({"weight": (4, 3)}, "torch")]
        ['linear', 'embedding']
        >>> [reading.kind for reading in readings({"gamma": (4,), "beta": (4,)})]
        ['norm']
    """
    found: list[Reading] = []
    for dialect in (dialects,) if isinstance(dialects, str) else dialects or known_dialects():
        for name, kind in kinds_of(dialect).items():
            reading = _read(name, kind, tensors)
            if reading is not None and reading not in found:
                found.append(reading)
    return found


def _read(name: str, kind: Kind, tensors: Mapping[str, Shape]) -> Reading | None:
    own = {part.name: part for part in kind.parts}
    missing = [part.name for part in kind.parts if part.name not in tensors and not part.optional]
    if missing or not tensors.keys() <= own.keys():
        return None
    sizes: dict[str, int] = {}
    for tensor, shape in tensors.items():
        if len(shape) != len(own[tensor].axes):
            return None
        for axis, size in zip(own[tensor].axes, shape, strict=True):
            if (1 if axis == "1" else sizes.setdefault(axis, size)) != size:
                return None
    if "G" in sizes and sizes.get("O", sizes["G"] * sizes["P"]) != sizes["G"] * sizes["P"]:
        return None
    if any(size < kind.smallest for size in sizes.values()):
        return None
    return Reading(name, {tensor: own[tensor].part for tensor in tensors}, sizes)


@functools.lru_cache(maxsize=None)  # noqa: UP033
def not_everywhere(dialect: str) -> tuple[str, ...]:
    """Patterns of a framework's tensors that are optional, and that another framework does not have at all.

    Example:
        >>> not_everywhere("torch")
        ('*num_batches_tracked',)
    """
    everywhere = [{part.part for kind in kinds_of(other).values() for part in kind.parts} for other in known_dialects()]
    optional = [part for kind in kinds_of(dialect).values() for part in kind.parts if part.optional]
    return tuple(dict.fromkeys(f"*{p.name}" for p in optional if any(p.part not in known for known in everywhere)))


@functools.lru_cache(maxsize=None)  # noqa: UP033
def known_dialects() -> dict[str, str]:
    """Every way to name layers, with the framework whose table has it.

    Example:
        >>> known_dialects()["mindspore.mint"]
        'torch'
    """
    found = {framework: framework for framework in mapping.FRAMEWORKS}
    for framework in mapping.FRAMEWORKS:
        found.update(mapping.table(framework)["framework"]["checkpoints"].get("others", {}))
    return found


def of_framework(framework: str) -> tuple[str, ...]:
    """The ways in which one framework names layers; a file may have several, and does not say which.

    Example:
        >>> of_framework("mindspore")
        ('mindspore', 'mindspore.mint')
    """
    return tuple(name for name in known_dialects() if name.partition(".")[0] == framework)


@functools.lru_cache(maxsize=None)  # noqa: UP033
def kinds_of(dialect: str) -> dict[str, Kind]:
    """The kinds of layer of a framework, by name."""
    return {
        entry["kind"]: Kind(
            tuple(
                Part(part["part"], part["name"], tuple(part["shape"].split()), part.get("optional", False))
                for part in entry["parts"]
            ),
            entry.get("smallest", 0),
        )
        for entry in mapping.table(known_dialects()[dialect])["modules"]
    }
