"""Pictures of the tensors that differ most, of those that are small enough to be looked at whole."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mhabridge.checkpoint.storage.memory import Scratch
from mhabridge.diff.checkpoints.entries import Item
from mhabridge.diff.checkpoints.streaming import Side
from mhabridge.diff.comparing import VERDICTS
from mhabridge.diff.report import Picture

MOST = 12
_LARGEST = 2 << 20  # elements of a tensor that is drawn: it is in memory whole, and more than once


def draw(items: Sequence[Item], names: tuple[str, str]) -> tuple[Picture, ...]:
    """Pictures of what differs, the worst first."""
    from mhabridge.diff.pictures import picture

    found = [item for item in items if _can_be_drawn(item)]
    worst = sorted(found, key=_how_bad, reverse=True)[:MOST]
    scratch = Scratch()
    return tuple(
        picture(item.layer, item.tensor, *names, *(_whole(side, item.pair[0].shape, scratch) for side in item.pair))
        for item in worst
    )


def _can_be_drawn(item: Item) -> bool:
    there = item.comparison is not None and item.comparison.verdict != "equal"
    if not there or item.first is None or item.second is None or item.first.tensor.size != item.second.tensor.size:
        return False
    numbers = not any(side.dtype.startswith("complex") for side in item.pair)
    return numbers and 0 < item.first.tensor.size <= _LARGEST


def _how_bad(item: Item) -> tuple[int, float]:
    assert item.comparison is not None
    apart = item.comparison.max_rel
    return VERDICTS.index(item.comparison.verdict), apart if apart == apart else -1.0


def _whole(side: Side, shape: tuple[int, ...], scratch: Scratch) -> np.ndarray:
    whole: np.ndarray = np.concatenate([piece.copy() for piece in side.pieces(scratch)])
    return whole.reshape(shape)
