"""The rearrangements that layouts are made of: named steps on a list of arrays, each with its inverse.

A layout packs some parameters into one tensor by applying steps in turn. Every step maps a list of arrays to a list of
arrays and only moves elements, so forward then inverse is exact for every dtype. The inverse is given the shapes that
went in, since they are not in the packed tensor.

This module also runs inside workers (Python 3.8).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    Shape = tuple[int, ...]
    Arrays = list[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Step:
    """One named rearrangement.

    Args:
        forward: arrays in, arrays out.
        inverse: what ``forward`` gave, and the shapes of what it was given; gives that back.
        shapes: the shapes that ``forward`` gives for arrays of these shapes.
        before: the shape that gives this one if it goes through alone; None when this one does not tell.
    """

    forward: Callable[[Arrays], Arrays]
    inverse: Callable[[Arrays, list[Shape]], Arrays]
    shapes: Callable[[list[Shape]], list[Shape]]
    before: Callable[[Shape], Shape | None]


def _joining(axis: int) -> Step:
    """Concatenate along an axis; the inverse cuts at the sizes of the parts."""

    def inverse(arrays: Arrays, shapes: list[Shape]) -> Arrays:
        ends = np.cumsum([shape[axis] for shape in shapes])[:-1]
        return list(np.split(arrays[0], ends, axis=axis))

    def joined(shapes: list[Shape]) -> list[Shape]:
        total = sum(shape[axis] for shape in shapes)
        return [(*shapes[0][:axis], total, *shapes[0][axis + 1 :])]

    return Step(lambda arrays: [np.concatenate(arrays, axis=axis)], inverse, joined, lambda shape: shape)


def _leading_axes(count: int) -> Step:
    """A vector as an array with ``count`` axes of size 1 before its own."""
    ones = (1,) * count
    return Step(
        forward=lambda arrays: [array.reshape(ones + array.shape) for array in arrays],
        inverse=lambda arrays, shapes: list(map(np.reshape, arrays, shapes)),
        shapes=lambda shapes: [ones + shape for shape in shapes],
        before=lambda shape: shape[count:] if shape[:count] == ones else None,
    )


# Transposing reverses the axes, so it leaves biases as they are: a whole layer's parameters can go through it.
_TRANSPOSE = Step(
    forward=lambda arrays: [array.T for array in arrays],
    inverse=lambda arrays, shapes: [array.T for array in arrays],
    shapes=lambda shapes: [shape[::-1] for shape in shapes],
    before=lambda shape: shape[::-1],
)
_FLATTEN = Step(
    forward=lambda arrays: [array.reshape(-1) for array in arrays],
    inverse=lambda arrays, shapes: list(map(np.reshape, arrays, shapes)),
    shapes=lambda shapes: [(math.prod(shape),) for shape in shapes],
    before=lambda shape: None,
)

STEPS = {
    "transpose": _TRANSPOSE,
    "flatten": _FLATTEN,
    "join rows": _joining(0),
    "join columns": _joining(1),
    "as (1, n)": _leading_axes(1),
    "as (1, 1, n)": _leading_axes(2),
}


def packed_shape(steps: Sequence[str], shapes: Sequence[Shape]) -> Shape:
    """The shape of the tensor that ``pack`` makes of parts of these shapes.

    Example:
        >>> packed_shape(["transpose", "flatten", "join rows", "as (1, n)"], [(4, 3), (4,)])
        (1, 16)
    """
    return _trail(steps, shapes)[-1][0]


def pack(steps: Sequence[str], parts: Sequence[np.ndarray]) -> np.ndarray:
    """One tensor made of the parts; it may share memory with them.

    Example:
        >>> pack(["transpose", "join columns"], [np.array([[1, 2]]), np.array([[3, 4]])])
        array([[1, 3],
               [2, 4]])
    """
    arrays = list(parts)
    for step in steps:
        arrays = STEPS[step].forward(arrays)
    return arrays[0]


def unpack(steps: Sequence[str], tensor: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
    """The parts of these shapes; the inverse of ``pack``. The tensor must have ``packed_shape(steps, shapes)``.

    Example:
        >>> unpack(["transpose", "join columns"], np.array([[1, 3], [2, 4]]), [(1, 2), (1, 2)])
        [array([[1, 2]]), array([[3, 4]])]
    """
    arrays = [tensor]
    trail = _trail(steps, shapes)
    for index in reversed(range(len(steps))):
        arrays = STEPS[steps[index]].inverse(arrays, trail[index])
    return arrays


def part_shape(steps: Sequence[str], shape: Shape) -> Shape | None:
    """The shape of a part that gives this packed shape by itself; None when the packed shape does not tell.

    Example:
        >>> part_shape(["transpose", "join columns"], (4, 12)), part_shape(["flatten"], (48,))
        ((12, 4), None)
    """
    found: Shape | None = shape
    for step in reversed(steps):
        found = STEPS[step].before(found) if found is not None else None
    return found


def _trail(steps: Sequence[str], shapes: Sequence[Shape]) -> list[list[Shape]]:
    """The shapes before each step, and after the last."""
    trail = [list(shapes)]
    for step in steps:
        trail.append(STEPS[step].shapes(trail[-1]))
    return trail
