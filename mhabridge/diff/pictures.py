"""What is drawn of two tensors: heads as small matrices, differences by their size, and the worst element's neighbours.

Everything here is small, whatever the size of the tensors, and is made in pieces, so that memory stays bounded:

- A *map* of a head has at most 64 x 64 cells. A larger matrix is drawn in blocks, and a block shows the one element in
  which the two sides differ most (where they do not differ, the largest one), on both sides the same element: an
  average would hide a single wrong element, and the maximum of each side would show a difference that is none.
- Of other tensors the last two axes are drawn in the same way, where the worst element lies, for the figure.
- At most 32 heads are drawn, those that differ most, in their order.
- Differences are counted in decades. The first bin holds what is equal, and what is 30 decades below the largest
  difference; elements that are NaN or infinite on a side are in none.
- The neighbourhood has at most 5 rows and 7 columns, over the last two axes.

One element differs more than another when it is NaN or infinite on one side only; then by absolute difference. NaN
beside NaN is no difference here: whether it belongs there is the verdict's business.
"""

from __future__ import annotations

import re

import numpy as np

from mhabridge import dtypes
from mhabridge.diff.comparing import unravel
from mhabridge.diff.report import Map, Picture

CELLS = 64
HEADS = 32
DECADES = 30
NEAR_ROWS, NEAR_COLUMNS = 5, 7
_PIECE = 1 << 20  # elements
_POWERS = np.array([float(f"1e{power}") for power in range(-323, 309)])


def picture(
    layer: str,
    tensor: str,
    first_name: str,
    second_name: str,
    first: np.ndarray,
    second: np.ndarray,
    *,
    index: tuple[int, ...] | None = None,
    unbatched: bool = False,
) -> Picture:
    """What is drawn of two tensors.

    Args:
        layer: as in their entry.
        tensor: likewise; one called "attn_weights" gets maps, any other gets none.
        first_name: of one side.
        second_name: of the other.
        first: of any dtype and shape; attention weights are (N, H, L, S), (N, L, S) or (L, S).
        second: likewise. Tensors of different shapes have no picture: all of it is empty.
        index: of the element whose neighbours are shown; None for the one that differs most.
        unbatched: attention weights of three axes are (H, L, S), not (N, L, S).

    Returns:
        Maps are float32, or float64 where a side is; neighbours are float64.

    Example:
        >>> exact = np.full((1, 2, 2, 2), 0.5)
        >>> wrong = exact.copy()
        >>> wrong[0, 1, 0] = 0.75, 0.25
        >>> drawn = picture("", "attn_weights", "reference", "torch", exact, wrong)
        >>> [each.title for each in drawn.maps], drawn.batch, drawn.counts, drawn.edges
        (['head 0', 'head 1'], 0, (6, 2), (0.0, 0.1, 1.0))
        >>> drawn.near_second - drawn.near_first
        array([[ 0.25, -0.25],
               [ 0.  ,  0.  ]])
    """
    names = (layer, tensor, first_name, second_name)
    if first.shape != second.shape or not first.size:
        return Picture(*names)
    worst, counts, edges = _survey(first, second)
    at = unravel(worst, first.shape) if index is None else index
    origin, window = _window(at, first.shape)
    heads, batch = _heads(tensor, first, second, at, unbatched)
    near = [_float64(np.atleast_2d(array[window])) for array in (first, second)]
    overview = _map("", first[at[:-2]], second[at[:-2]]) if not heads and first.ndim > 1 else None
    return Picture(*names, heads, batch, counts, edges, origin, near[0], near[1], overview)


def _float64(array: np.ndarray) -> np.ndarray:
    return dtypes.to_float64(array) if dtypes.name_of(array) in dtypes.FLOATS else array.astype(np.float64)


def _apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """By how much each element differs, float64: inf where it is NaN or infinite on a side, unless it is on both."""
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.abs(a - b)
    alike = (np.isnan(a) & np.isnan(b)) | (a == b)
    return np.where(alike, 0.0, np.where(np.isfinite(a) & np.isfinite(b), apart, np.inf))


def _survey(first: np.ndarray, second: np.ndarray) -> tuple[int, tuple[int, ...], tuple[float, ...]]:
    """The place of the worst element in C order, and the counts by decade with their edges."""
    x, y = first.reshape(-1), second.reshape(-1)
    totals = np.zeros(len(_POWERS) + 1, np.int64)
    worst, largest = 0, -1.0
    for start in range(0, x.size, _PIECE):
        a, b = _float64(x[start : start + _PIECE]), _float64(y[start : start + _PIECE])
        apart = _apart(a, b)
        at = int(np.argmax(apart))
        if apart[at] > largest:
            worst, largest = start + at, float(apart[at])
        places = np.where(apart > 0, np.searchsorted(_POWERS, apart, side="right"), 0)
        fine = np.isfinite(a) & np.isfinite(b) & np.isfinite(apart)
        totals += np.bincount(places[fine], minlength=len(totals))
    return worst, *_decades(totals)


def _decades(totals: np.ndarray) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Of all counts those bins that are used; ``totals[k]`` lies between the powers k - 1 and k."""
    used = np.flatnonzero(totals[1:]) + 1
    if not len(used):
        return (int(totals[0]),), (0.0, float(_POWERS[0]))
    low = max(int(used[0]), int(used[-1]) - DECADES)
    counts = (int(totals[:low].sum()), *(int(count) for count in totals[low : used[-1] + 1]))
    powers = [float(power) for power in _POWERS[low - 1 : used[-1] + 1]]
    return counts, (0.0, *powers, *([float("inf")] if used[-1] == len(_POWERS) else []))


def _window(at: tuple[int, ...], shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[slice | int, ...]]:
    """The first index of the neighbourhood, and how to cut it out."""
    sizes = {len(shape) - 1: NEAR_COLUMNS, len(shape) - 2: NEAR_ROWS}
    origin, cut = list(at), list[slice | int](at)
    for axis, size in sizes.items():
        if axis >= 0:
            origin[axis] = max(0, min(at[axis] - size // 2, shape[axis] - size))
            cut[axis] = slice(origin[axis], origin[axis] + size)
    return tuple(origin), tuple(cut)


def _heads(
    tensor: str, first: np.ndarray, second: np.ndarray, at: tuple[int, ...], unbatched: bool
) -> tuple[tuple[Map, ...], int | None]:
    """The maps of attention weights, and the batch element that they are of."""
    if not re.search(r"(^|\W)attn_weights$", tensor) or first.ndim not in (2, 3, 4):
        return (), None
    has_batch = first.ndim == 4 or (first.ndim == 3 and not unbatched)
    a, b = (first[at[0]], second[at[0]]) if has_batch else (first, second)
    single = a.ndim == 2
    if single:
        a, b = a[None], b[None]
    kept = range(len(a)) if len(a) <= HEADS else _most_different(a, b)
    maps = tuple(_map("average of the heads" if single else f"head {head}", a[head], b[head]) for head in kept)
    return maps, at[0] if has_batch else None


def _most_different(a: np.ndarray, b: np.ndarray) -> list[int]:
    apart = [_largest(head, other) for head, other in zip(a, b, strict=True)]
    return sorted(sorted(range(len(apart)), key=lambda head: -apart[head])[:HEADS])


def _largest(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference between two matrices, row by row to save memory."""
    return max((float(_apart(_float64(x), _float64(y)).max()) for x, y in zip(a, b, strict=True)), default=0.0)


def _map(title: str, first: np.ndarray, second: np.ndarray) -> Map:
    height, width = (-(-size // CELLS) for size in first.shape)
    rows, columns = (tuple(range(0, size, step)) for size, step in zip(first.shape, (height, width), strict=True))
    wide = np.float64 if "float64" in (dtypes.name_of(first), dtypes.name_of(second)) else np.float32
    drawn = np.empty((2, len(rows), len(columns)), wide)
    for at, row in enumerate(rows):
        strips = [_float64(array[row : row + height]) for array in (first, second)]
        for side, values in enumerate(_of_blocks(strips[0], strips[1], width)):
            drawn[side, at] = values
    return Map(title, drawn[0], drawn[1], rows, columns)


def _of_blocks(a: np.ndarray, b: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Of a strip of rows, in each block of columns the element to show, of both sides."""
    missing = -a.shape[1] % width

    def blocks(array: np.ndarray, filler: float) -> np.ndarray:
        padded = np.pad(array, ((0, 0), (0, missing)), constant_values=filler)
        cut: np.ndarray = padded.reshape(len(a), -1, width).transpose(1, 0, 2)
        return cut.reshape(len(cut), -1)

    apart, large = blocks(_apart(a, b), -1.0), blocks(np.nan_to_num(np.abs(a), nan=0.0), -1.0)
    chosen = np.where(apart.max(1) > 0, apart.argmax(1), large.argmax(1))[:, None]
    return tuple(np.take_along_axis(blocks(array, 0.0), chosen, 1)[:, 0] for array in (a, b))  # type: ignore[return-value]
