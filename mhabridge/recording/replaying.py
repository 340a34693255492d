"""Inputs of another recording, for the layers of this one: *single-step mode*.

Layers are matched by path, else by the order of their calls among attention layers whose inputs have equal shapes.

Also part of the record kit (Python 3.8, NumPy only).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from mhabridge.recording.contents import open_contents

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

_SEQUENCES = ("query", "key", "value")  # the same names in every framework's attention
_MASKS = ("key_padding_mask", "attn_mask")


@dataclasses.dataclass
class Inputs:
    """What a call is given.

    Args:
        path: the other recording's layer.
        arrays: values by argument; one array for arguments that are one tensor on both sides.
        lines: what could not be replaced, and why.
    """

    path: str = ""
    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    lines: list[str] = dataclasses.field(default_factory=list)


class Replay:
    """The other recording.

    Args:
        path: its file, or its journal.
        own_paths: the layers that are recorded here.

    Raises:
        CheckpointError: it is no recording.
    """

    def __init__(self, path: str | os.PathLike[str], own_paths: Sequence[str]) -> None:
        self.contents = open_contents(path)
        self.layers: dict[str, Any] = self.contents.metadata["layers"]
        self._own_paths = frozenset(own_paths)
        self._matched: dict[str, str] = {}
        self._calls: dict[str, list[dict[str, Any]]] = {}
        for call in sorted(self.contents.metadata["calls"], key=lambda call: call["index"]):
            self._calls.setdefault(call["layer"], []).append(call)

    def close(self) -> None:
        """Close the file."""
        self.contents.close()

    def inputs(self, path: str, settings: Mapping[str, Any], attention: bool, nth: int, own: Any) -> Inputs:
        """What the nth call of a layer is given.

        Args:
            path: of the layer here.
            settings: of the layer here.
            attention: whether it is an attention layer.
            nth: which of its calls.
            own: its tensor arguments: shape, whether floating, and identity.
        """
        other = self._match(path, settings, attention, own)
        if other is None:
            return Inputs(lines=["its inputs are its own: the other recording has no layer for it"])
        calls = self._calls.get(other, [])
        if nth >= len(calls):
            return Inputs(lines=[f"its inputs are its own: {other} has {len(calls)} calls in the other recording"])
        turn = attention and self._batch_first(other) != bool(settings.get("batch_first"))
        return self._filled(Inputs(other), calls[nth]["arguments"], attention, turn, own)

    def _match(self, path: str, settings: Mapping[str, Any], attention: bool, own: Any) -> str | None:
        if path in self.layers:
            return path
        if path not in self._matched and attention:
            taken = {*self._own_paths, *self._matched.values()}
            for other in self._calls:
                if other not in taken and self.layers[other]["attention"] and self._fits(other, settings, own):
                    self._matched[path] = other
                    break
        return self._matched.get(path)

    def _fits(self, other: str, settings: Mapping[str, Any], own: Any) -> bool:
        arguments = self._calls[other][0]["arguments"]
        turn = self._batch_first(other) != bool(settings.get("batch_first"))
        shapes = [self._shape(arguments, name, turn) for name in _SEQUENCES]
        return shapes == [own[name][0] if name in own else None for name in _SEQUENCES]

    def _shape(self, arguments: Mapping[str, Any], name: str, turn: bool) -> tuple[int, ...] | None:
        tensor = self._tensor(arguments, name)
        if tensor is None:
            return None
        shape = self.contents.tensors[tensor].shape
        return (shape[1], shape[0], shape[2]) if turn and len(shape) == 3 else shape

    def _batch_first(self, other: str) -> bool:
        return bool(self.layers[other]["settings"].get("batch_first"))

    def _tensor(self, arguments: Mapping[str, Any], name: str) -> str | None:
        entry = arguments.get(name, {})
        entry = arguments.get(entry["same_as"], {}) if "same_as" in entry else entry
        found: str | None = entry.get("tensor")
        return found

    def _filled(self, found: Inputs, arguments: Mapping[str, Any], attention: bool, turn: bool, own: Any) -> Inputs:
        names = self._names(arguments, attention, own)
        made: dict[tuple[str, int], np.ndarray] = {}
        for name, (shape, floating, identity) in own.items():
            tensor = self._tensor(arguments, names.get(name, name))
            if tensor is None:
                found.lines.append(f"{name}: it is its own: the other recording has none for it")
                continue
            if (tensor, identity) not in made:
                array = self.contents.read(tensor)
                if turn and name in _SEQUENCES and array.ndim == 3:
                    array = np.ascontiguousarray(array.swapaxes(0, 1))
                made[tensor, identity] = array
            array = made[tensor, identity]
            if attention and name in _MASKS:
                array = _as_mask(array, floating)
            if array.shape != shape or (array.dtype.kind == "f") != floating:
                found.lines.append(
                    f"{name}: it is its own: recorded {array.dtype} of shape {array.shape} does not fit"
                    f" where {'a float' if floating else 'no float'} of shape {shape} is expected"
                )
                continue
            found.arrays[name] = array
        if attention:
            for name in arguments:
                if name not in own and self._tensor(arguments, name) is not None:
                    found.lines.append(f"{name}: the other layer was given one and this one was not")
        return found

    def _names(self, arguments: Mapping[str, Any], attention: bool, own: Any) -> dict[str, str]:
        """The other side's name of each argument: an attention's are everywhere the same, others go by position."""
        if attention or all(name in arguments for name in own):
            return {}
        others = [name for name in arguments if self._tensor(arguments, name) is not None]
        return dict(zip(own, others))


def _as_mask(mask: np.ndarray, floating: bool) -> np.ndarray:
    """A mask as bool or as float, where that says the same; else as it is.

    Example:
        >>> _as_mask(np.array([True, False]), floating=True)
        array([-inf,   0.], dtype=float32)
        >>> _as_mask(np.array([-np.inf, 0.0]), floating=False), _as_mask(np.array([0.5]), floating=False)
        (array([ True, False]), array([0.5]))
    """
    blocked = mask == -np.inf if mask.dtype.kind == "f" else mask != 0
    if floating and mask.dtype.kind != "f":
        return np.where(blocked, np.float32(-np.inf), np.float32(0))
    return blocked if not floating and bool((blocked | (mask == 0)).all()) else mask
