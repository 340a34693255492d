"""Canonical parameters as views of stored tensors, and stored tensors made of canonical parameters; nothing is read.

A layout packs parameters by steps that only move elements (``mhabridge.rearrange``), so each parameter is a view of the
tensor that holds it: a start and strides. A target's tensor is again such views, one after another.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from mhabridge import rearrange
from mhabridge.checkpoint.storage import transposing
from mhabridge.checkpoint.storage.stored import StoredFile, StoredTensor, bytes_of
from mhabridge.checkpoint.storage.writing import Outgoing, Sink, passed_through
from mhabridge.packing import Layout
from mhabridge.spec import MHASpec

View = StoredTensor


def parts_of(layout: Layout, spec: MHASpec, named: Mapping[str, StoredTensor]) -> dict[str, View]:
    """Each canonical parameter as a view of the layout's tensors.

    Args:
        layout: how the tensors are named and packed.
        spec: the layer; it decides the shapes.
        named: the tensors by the layout's names, of the shapes that the spec says.

    Returns:
        Views of the canonical shapes: those of the spec, and those that the layout has beyond it (zeros).
    """
    found: dict[str, View] = {}
    for tensor, parts in layout.active(spec):
        if tensor.name in named:  # else it holds nothing but zeros, and was left out
            found.update(zip(parts, split(named[tensor.name], tensor.steps, list(parts.values())), strict=True))
    return found


def split(tensor: StoredTensor, steps: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> list[View]:
    """The parts of a packed tensor."""
    return [part_of(tensor, steps, shapes, number) for number in range(len(shapes))]


def part_of(tensor: StoredTensor, steps: Sequence[str], shapes: Sequence[tuple[int, ...]], number: int) -> View:
    """One of the parts of a packed tensor, by its number."""
    shape, start, strides = _divided(tensor.shape, tensor.strides, tuple(steps), tuple(shapes))[number]
    return tensor.part(shape, tensor.start + start, strides)


@functools.lru_cache(maxsize=1024)
def _divided(
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None,
    steps: tuple[str, ...],
    shapes: tuple[tuple[int, ...], ...],
) -> list[tuple[tuple[int, ...], int, tuple[int, ...] | None]]:
    """Shape, start and strides of each part: the inverse steps are applied to an array that is only addressed, never
    read.
    """
    if strides is None:
        size = math.prod(shape)
        memory = np.empty(max(size, 1), np.uint8)
        array = memory[:size].reshape(shape)
    else:
        span = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        memory = np.empty(max(span, 1), np.uint8)
        array = np.lib.stride_tricks.as_strided(memory, shape, strides)
    return [_place(memory, part) for part in rearrange.unpack(steps, array, shapes)]


def _place(memory: np.ndarray, part: np.ndarray) -> tuple[tuple[int, ...], int, tuple[int, ...] | None]:
    start = part.__array_interface__["data"][0] - memory.__array_interface__["data"][0]
    inside = 0 <= start <= memory.size
    assert inside or not part.size, "a step copied the array"
    return part.shape, start if part.size else 0, None if part.flags.c_contiguous else part.strides


def zeros(name: str, dtype: str, shape: tuple[int, ...]) -> Outgoing:
    """A tensor of zeros."""
    outgoing = Outgoing(name, dtype, shape, lambda sink: sink.write(bytes(outgoing.nbytes)))
    return outgoing


def emitted(file: StoredFile, view: View, name: str, shape: tuple[int, ...] | None = None) -> Outgoing:
    """A view, written in C order, perhaps in another shape of the same elements in the same order."""
    source = transposing.source_of(view)
    outgoing = passed_through(file, view, name) if source is None else transposing.transposed(file, source, name)
    if shape is None or shape == outgoing.shape:
        return outgoing
    if math.prod(shape) != outgoing.size:
        raise ValueError(f"{name}: {outgoing.shape} has other elements than {shape}")
    return dataclasses.replace(outgoing, shape=shape)


def packed(file: StoredFile, name: str, steps: Sequence[str], parts: Sequence[View | Outgoing]) -> Outgoing:
    """A target's tensor: parts (views, or zeros) packed by the steps of its layout."""
    shapes = [part.shape for part in parts]
    shape = rearrange.packed_shape(steps, shapes)
    if "join columns" in steps:
        return _side_by_side(file, name, steps, parts, shape)
    turn = list(steps).count("transpose") % 2 == 1
    whole = None if turn else _joined(parts)
    if whole is not None:
        return emitted(file, whole, name, shape)
    made = [_turned(file, part, name) if turn else _outgoing(file, part, name) for part in parts]
    if len(made) == 1:
        return dataclasses.replace(made[0], name=name, shape=shape)

    def emit(sink: Sink) -> None:
        for one in made:
            one.write_to(sink)

    ties = [one.tied for one in made]
    return Outgoing(
        name, made[0].dtype, shape, emit, None if None in ties else f"{steps} " + " + ".join(map(str, ties))
    )


def _joined(parts: Sequence[View | Outgoing]) -> View | None:
    """Parts that lie one after another in a storage, as one; None if they do not."""
    first = parts[0]
    if not isinstance(first, StoredTensor):
        return None
    end = first.start
    for part in parts:
        if not isinstance(part, StoredTensor) or not part.plain or part.unreadable is not None:
            return None
        if (part.storage, part.extents, part.dtype, part.start) != (first.storage, first.extents, first.dtype, end):
            return None
        end += part.size
    return first.part((end - first.start,), first.start, None)


def _outgoing(file: StoredFile, part: View | Outgoing, name: str) -> Outgoing:
    return part if isinstance(part, Outgoing) else emitted(file, part, name)


def _turned(file: StoredFile, part: View | Outgoing, name: str) -> Outgoing:
    """A part with its axes reversed."""
    if isinstance(part, Outgoing):
        return dataclasses.replace(part, shape=part.shape[::-1])  # zeros
    strides = _strides(part)[::-1]
    shape = part.shape[::-1]
    plain = strides == _c_strides(shape)
    return emitted(file, dataclasses.replace(part, shape=shape, strides=None if plain else strides), name)


def _side_by_side(
    file: StoredFile, name: str, steps: Sequence[str], parts: Sequence[View | Outgoing], shape: tuple[int, ...]
) -> Outgoing:
    """Columns of several parts in each row: they are read whole, since no part's bytes lie together in the target."""
    views = [part for part in parts if isinstance(part, StoredTensor)]
    assert len(views) == len(parts), "only biases are filled with zeros, and they have no columns"
    for view in views:
        view.require_readable(file.path)

    def emit(sink: Sink) -> None:
        sink.write(bytes_of(rearrange.pack(steps, [file.words(view) for view in views])))

    return Outgoing(name, views[0].dtype, shape, emit)


def _strides(view: View) -> tuple[int, ...]:
    return _c_strides(view.shape) if view.strides is None else view.strides


def _c_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
