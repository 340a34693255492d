"""Pictures as the page shows them: heat maps of heads, the histogram of differences, the worst element's neighbours."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np

from mhabridge.diff.comparing import VERDICTS, Comparison
from mhabridge.diff.page import colours, text
from mhabridge.diff.report import DiffReport, Entry, Map, Picture

ROOM = 8 << 20  # characters that the heat maps of one page may take


@dataclasses.dataclass(frozen=True)
class Head:
    """One head: three images, and where the sides differ most.

    Args:
        title: "head 3".
        images: addresses: the first side, the second, the difference.
        largest: the largest difference, in words.
        place: the row and the column of the cell with the largest difference.
        leads: whether no head differs more.
    """

    title: str
    images: tuple[str, str, str]
    largest: str
    place: tuple[int, int]
    leads: bool


@dataclasses.dataclass(frozen=True)
class Bin:
    """One line of the histogram.

    Args:
        label: which differences are counted.
        count: of elements.
        width: of the bar, 0 to 100; the logarithm of the count.
        state: "equal", "within", "crossing" or "beyond" (the bound); "" where there is no bound.
        bounds: that lie in it, in words.
    """

    label: str
    count: int
    width: float
    state: str = ""
    bounds: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Cell:
    """One element of the neighbourhood: its two values and their difference, as text, and whether it is the worst."""

    first: str
    second: str
    difference: str
    worst: bool


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A picture, ready for the page. ``left_out`` says why it has no maps although there were some."""

    heads: tuple[Head, ...] = ()
    left_out: str = ""
    batch: int | None = None
    rows: str = ""
    columns: str = ""
    attention: colours.Scale = dataclasses.field(default_factory=lambda: colours.Scale(0, 1))
    difference: colours.Scale = dataclasses.field(default_factory=lambda: colours.Scale(-1, 1))
    bins: tuple[Bin, ...] = ()
    uncounted: int = 0
    around: str = ""
    near_columns: tuple[int, ...] = ()
    near: tuple[tuple[int | None, tuple[Cell, ...]], ...] = ()


Key = tuple[str, str, str, str]


def key(item: Entry | Picture) -> Key:
    """What a picture and its entry have in common."""
    return item.layer, item.tensor, item.first, item.second


def most_telling(report: DiffReport) -> tuple[Picture, Entry] | None:
    """The picture that shows what is wrong, in the first divergence if there is one; of several one with maps.

    Heads that are equal, or differ by rounding alone while the output does not, show nothing: the output does then.
    """
    entries = {key(entry): entry for entry in (*report.pairs, *report.entries)}
    pictures = [picture for picture in report.pictures if picture.counts and key(picture) in entries]
    known = [(picture, entries[key(picture)]) for picture in pictures]
    here = [each for each in known if each[1].layer == report.first_divergence] or known
    return max(here, key=lambda each: _telling(*each), default=None)


def _telling(picture: Picture, entry: Entry) -> tuple[bool, bool, bool, int]:
    found = entry.comparison
    bounds = [bound for bound, _ in bounds_of(picture, found)]
    # Two sides with other weights may both be right by their own, and yet be further apart than both may be off.
    beyond = bool(bounds) and not found.max_abs <= sum(bounds)
    return not found.ok, beyond, bool(picture.maps) and found.max_abs != 0.0, VERDICTS.index(found.verdict)


def drawn(report: DiffReport, room: int = ROOM) -> dict[Key, Drawn]:
    """All pictures that show anything; those that differ most get their maps first, until there is no more room."""
    entries = {key(entry): entry.comparison for entry in (*report.pairs, *report.entries)}
    pictures = [picture for picture in report.pictures if picture.counts and key(picture) in entries]
    found = {}
    for picture in sorted(pictures, key=lambda picture: _rank(entries[key(picture)])):
        heads = _heads(picture)
        size = sum(len(image) for head in heads for image in head.images)
        fits = size <= room
        room -= size if fits else 0
        found[key(picture)] = _draw(picture, entries[key(picture)], heads if fits else ())
    return found


def _rank(comparison: Comparison) -> tuple[int, float]:
    apart = comparison.max_abs
    return -VERDICTS.index(comparison.verdict), -apart if apart == apart else -math.inf


def _draw(picture: Picture, comparison: Comparison, heads: tuple[Head, ...]) -> Drawn:
    maps = picture.maps
    elements = math.prod(comparison.shapes[0] or ())
    columns, near = _near(picture, comparison)
    return Drawn(
        heads=heads,
        left_out=f"{text.counted(len(maps), 'heat map')}: no room on this page" if maps and not heads else "",
        batch=picture.batch,
        rows=_starts(maps, comparison, -2),
        columns=_starts(maps, comparison, -1),
        attention=_attention_scale(maps),
        difference=_difference_scale(maps),
        bins=tuple(_bins(picture, bounds_of(picture, comparison))),
        uncounted=max(0, elements - sum(picture.counts)),
        around=text.place(picture.origin[:-2]) if len(picture.origin) > 2 else "",
        near_columns=columns,
        near=near,
    )


def _starts(maps: tuple[Map, ...], comparison: Comparison, axis: int) -> str:
    """The first index of each block, and at the end the size of the axis."""
    shape = comparison.shapes[0]
    if not maps or shape is None or len(shape) < 2:
        return ""
    return " ".join(str(start) for start in (*(maps[0].rows if axis == -2 else maps[0].columns), shape[axis]))


def _attention_scale(maps: tuple[Map, ...]) -> colours.Scale:
    return colours.attention_scale([side for each in maps for side in (each.first, each.second)])


def _difference_scale(maps: tuple[Map, ...]) -> colours.Scale:
    return colours.difference_scale([difference(each) for each in maps])


def difference(each: Map) -> np.ndarray:
    """The second side less the first, float64."""
    with np.errstate(invalid="ignore", over="ignore"):
        return each.second.astype(np.float64) - each.first.astype(np.float64)


def _heads(picture: Picture) -> tuple[Head, ...]:
    attention, scale = _attention_scale(picture.maps), _difference_scale(picture.maps)
    apart = [how_far(each.first, each.second) for each in picture.maps]
    worst = int(np.argmax([float(each.max(initial=0.0)) for each in apart])) if apart else 0
    return tuple(
        Head(
            text.visible(each.title),
            (
                colours.png(each.first, attention),
                colours.png(each.second, attention),
                colours.png(difference(each), scale),
            ),
            _largest(apart[number]),
            _argmax(apart[number]),
            number == worst,
        )
        for number, each in enumerate(picture.maps)
    )


def how_far(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The absolute difference, float64; inf where only one of the two is NaN, or where one is infinite."""
    a, b = first.astype(np.float64), second.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.abs(a - b)
    apart[(np.isnan(a) & np.isnan(b)) | (a == b)] = 0.0
    return np.where(np.isnan(apart), np.inf, apart)


def _largest(apart: np.ndarray) -> str:
    largest = float(apart.max(initial=0.0))
    if math.isinf(largest):
        return "NaN or infinite on a side"
    return f"differs by {text.number(largest)}" if largest else "no difference"


def _argmax(apart: np.ndarray) -> tuple[int, int]:
    row, column = np.unravel_index(int(np.argmax(apart)), apart.shape)
    return int(row), int(column)


def bounds_of(picture: Picture, comparison: Comparison) -> list[tuple[float, str]]:
    """What rounding justifies at each side's worst element, with that side's name, ascending; a reference has none."""
    sides = zip((picture.first, picture.second), comparison.distances, strict=True)
    known = [(distance.bound, text.visible(name)) for name, distance in sides if distance is not None]
    return sorted((bound, name) for bound, name in known if 0 < bound < math.inf)


def _bins(picture: Picture, bounds: list[tuple[float, str]]) -> Iterable[Bin]:
    scale = math.log10(1 + max(picture.counts)) or 1.0
    for place, count in enumerate(picture.counts):
        low, high = picture.edges[place], picture.edges[place + 1]
        label = "equal" if place == 0 else f"{low:.0e} to {high:.0e}"
        inside = tuple(f"bound of {name}: {text.number(bound)}" for bound, name in bounds if low <= bound < high)
        yield Bin(label, count, round(100 * math.log10(1 + count) / scale, 1), _state(place, low, high, bounds), inside)


def _state(place: int, low: float, high: float, bounds: list[tuple[float, str]]) -> str:
    if place == 0:
        return "equal"
    if not bounds:
        return ""
    largest = bounds[-1][0]
    return "beyond" if low >= largest else "crossing" if high > largest else "within"


def _near(
    picture: Picture, comparison: Comparison
) -> tuple[tuple[int, ...], tuple[tuple[int | None, tuple[Cell, ...]], ...]]:
    """The columns' indices, and each row's index with its cells."""
    first, second, origin = picture.near_first, picture.near_second, picture.origin
    if not first.size:
        return (), ()
    left = origin[-1] if origin else 0
    top = origin[-2] if len(origin) > 1 else None
    worst = _worst_near(picture, comparison)
    rows = []
    for i in range(first.shape[0]):
        cells = [_cell(first[i, j], second[i, j], (i, j) == worst) for j in range(first.shape[1])]
        rows.append((None if top is None else top + i, tuple(cells)))
    return tuple(range(left, left + first.shape[1])), tuple(rows)


def _worst_near(picture: Picture, comparison: Comparison) -> tuple[int, int]:
    """Where the comparison's worst element lies in the neighbourhood; else where the neighbours differ most."""
    index, origin, shape = comparison.index, picture.origin, picture.near_first.shape
    if index is not None and len(index) == len(origin) and index[:-2] == origin[:-2]:
        offset = [a - b for a, b in zip(index[-2:], origin[-2:], strict=True)]
        row, column = ([0, 0] + offset)[-2:]
        if 0 <= row < shape[0] and 0 <= column < shape[1]:
            return row, column
    return _argmax(how_far(picture.near_first, picture.near_second))


def _cell(a: float, b: float, worst: bool) -> Cell:
    with np.errstate(invalid="ignore", over="ignore"):
        return Cell(f"{a:.5g}", f"{b:.5g}", text.signed(float(b) - float(a)), worst)
