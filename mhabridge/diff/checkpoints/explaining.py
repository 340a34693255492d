"""Names what was done to the layers of two checkpoints that differ, as far as their weights alone tell."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from mhabridge.checkpoint.storage.memory import Scratch
from mhabridge.diff.checkpoints.entries import Item, Matched
from mhabridge.diff.checkpoints.streaming import Side
from mhabridge.diff.comparing import Comparison
from mhabridge.diff.diagnosis.findings import Diagnosis
from mhabridge.diff.diagnosis.weights import REARRANGED, diagnose_weights

# Layers that are searched in a row without finding anything: where these are other weights, so are the rest.
_FRUITLESS = 4
_LISTED = 8


@dataclasses.dataclass(frozen=True)
class StoredSource:
    """A parameter that lies in a file.

    Args:
        side: the tensor.
        scratch: memory to work in.
    """

    side: Side
    scratch: Scratch

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return self.side.shape

    @property
    def dtype(self) -> str:
        """Of the tensor."""
        return self.side.dtype

    def blocks(self, turned: bool = False) -> Iterator[np.ndarray]:
        """Whole rows, about as many as are read at a time."""
        side = self.side.turned() if turned else self.side
        length = side.shape[1] if len(side.shape) == 2 else 1
        left: list[np.ndarray] = []
        have = 0
        for piece in side.pieces(self.scratch):
            left.append(piece)
            have += len(piece)
            if have >= length:
                joined = np.concatenate(left)
                whole = have // length * length
                yield joined[:whole].reshape(-1, length)
                left, have = [joined[whole:]], have - whole
            else:
                left[-1] = piece.copy()


def explain(matched: Sequence[Matched], side: str) -> tuple[tuple[Diagnosis, ...], list[str]]:
    """A diagnosis of each attention layer in which something differs, in order, and of others that can be explained.

    Args:
        matched: the layers, compared.
        side: the name of the second side.

    Returns:
        The diagnoses, and notes on layers that were not searched.
    """
    found: list[Diagnosis] = []
    skipped: list[str] = []
    scratches, fruitless = (Scratch(), Scratch()), 0
    for layer in matched:
        wrong = {item.tensor: item.comparison for item in layer.items if item.comparison and not item.comparison.ok}
        wrong.pop("num_heads", None)  # a fact of the layer, and no parameter
        if not wrong or layer.match.first is None or layer.match.second is None:
            continue
        if fruitless == _FRUITLESS:
            skipped.append(layer.name)
            continue
        cosines = {name: comparison.cosine for name, comparison in wrong.items()}
        costly = any(len(comparison.shapes[0] or ()) > 1 for comparison in wrong.values() if _far(comparison))
        one = _diagnosis(layer, cosines, side, scratches)
        fruitless = 0 if one.explained else fruitless + costly
        if one.explained or layer.match.first.block is not None:
            found.append(one)
    more = f" and {len(skipped) - _LISTED} more" if len(skipped) > _LISTED else ""
    told = f"not searched for what was done to them, after {_FRUITLESS} in vain: {', '.join(skipped[:_LISTED])}{more}"
    return tuple(found), [told] if skipped else []


def _far(comparison: Comparison) -> bool:
    return not abs(comparison.cosine) > REARRANGED


def _diagnosis(
    layer: Matched, differing: Mapping[str, float], side: str, scratches: tuple[Scratch, Scratch]
) -> Diagnosis:
    mine = {item.tensor: StoredSource(item.first, scratches[0]) for item in layer.items if item.first is not None}
    theirs = {item.tensor: StoredSource(item.second, scratches[1]) for item in layer.items if item.second is not None}
    names = {item.tensor: _name(layer, item) for item in layer.items}
    return diagnose_weights(layer.name, side, mine, theirs, differing, names, _heads(layer))


def _name(layer: Matched, item: Item) -> str:
    """What the second side's file calls it; of a part of a packed tensor also which part."""
    group = layer.match.second
    if group is None or item.second is None:
        return f"{layer.name}.{item.tensor}" if layer.name else item.tensor
    name = item.second.tensor.name
    shared = [part for part, full in group.names.items() if full == group.names.get(item.tensor)]
    return f"{name} ({item.tensor})" if len(shared) > 1 else name


def _heads(layer: Matched) -> int | None:
    groups = (layer.match.first, layer.match.second)
    blocks = [group.block for group in groups if group is not None and group.block is not None]
    return next((block.spec.num_heads for block in blocks if block.heads_known), None)
