"""One figure of a report, for a slide or an issue: the verdict in words, the most telling tensor, the histogram.

Drawn with matplotlib's objects alone: no window, no global state. Names are shown as they are, never as formulas.
"""

from __future__ import annotations

import math
import os
import warnings
from typing import TYPE_CHECKING

import numpy as np

from mhabridge.checkpoint.storage.atomic import replacing
from mhabridge.diff.comparing import VERDICTS
from mhabridge.diff.page import colours, text
from mhabridge.diff.page.contents import cause, sentences
from mhabridge.diff.page.drawing import bounds_of, difference, how_far, most_telling
from mhabridge.diff.report import DiffReport, Entry, Picture
from mhabridge.errors import BackendError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

HEADS = 3
_TONES = {"equal": "#2f6f6b", "rounding": "#33658a", "off": "#a14a00", "broken": "#a3123f", "failed": "#5b4a8a"}
_MARKS = {"equal": "o", "rounding": "s", "off": "^", "broken": "X"}


def write(report: DiffReport, path: str | os.PathLike[str]) -> None:
    """Write the figure as a PNG file; a file of that name is replaced once the new one is whole.

    Args:
        report: of any kind. Without pictures the largest differences of all tensors are drawn.
        path: of the image, in a folder that exists.

    Raises:
        BackendError: matplotlib is not installed.
        CheckpointError: the file cannot be written.

    Example:
        >>> import pathlib, tempfile
        >>> target = pathlib.Path(tempfile.mkdtemp()) / "report.png"
        >>> write(DiffReport((), ()), target)
        >>> target.read_bytes()[1:4]
        b'PNG'
    """
    try:
        import matplotlib.figure
    except ImportError as error:
        raise BackendError(
            "the figure",
            given=str(error),
            expected="matplotlib",
            advice="Install it with: pip install 'mhabridge[report]'",
        ) from error

    figure = matplotlib.figure.Figure(figsize=(11, 6.6), dpi=150, layout="constrained")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph that the font lacks is a box; a crowded layout is still one
        head, body = figure.subfigures(2, 1, squeeze=False, height_ratios=(1, 3.6)).ravel()
        _words(head, report)
        telling = most_telling(report)
        if telling is not None:
            _draw(body, *telling)
        elif report.entries:
            _dots(body.subplots(), report.entries)
        with replacing(path, force=True) as descriptor, os.fdopen(os.dup(descriptor), "wb") as file:
            figure.savefig(file, format="png")


def _words(head: SubFigure, report: DiffReport) -> None:
    tone = _TONES[report.verdict]
    lines = [*sentences(report), f"Cause: {cause(report)}" if report.diagnoses else ""]
    head.text(0.02, 0.95, report.verdict.capitalize(), size=26, weight="bold", color=tone, va="top", parse_math=False)
    shown = "\n".join(_short(line, 115) for line in lines if line)
    head.text(0.02, 0.52, shown, size=11, va="top", linespacing=1.4, parse_math=False)


def _draw(body: SubFigure | Figure, picture: Picture, entry: Entry) -> None:
    if not picture.maps and picture.overview is None:
        _histogram(body.subplots(), picture, entry)
        return
    left, right = body.subfigures(1, 2, squeeze=False, width_ratios=(1.5, 1)).ravel()
    _maps(left, picture)
    _histogram(right.subplots(), picture, entry)


def _maps(body: SubFigure, picture: Picture) -> None:
    """The heads that differ most, or the whole tensor, on both sides and as a difference, on common scales."""
    all_maps = picture.maps or tuple(filter(None, [picture.overview]))
    maps = sorted(all_maps, key=lambda each: -float(how_far(each.first, each.second).max(initial=0.0)))[:HEADS]
    values = colours.attention_scale([side for each in all_maps for side in (each.first, each.second)])
    apart = colours.difference_scale([difference(each) for each in all_maps])
    rows = body.subplots(len(maps), 3, squeeze=False)
    for axes, each in zip(rows, maps, strict=True):
        for axis, matrix, scale in (
            (axes[0], each.first, values),
            (axes[1], each.second, values),
            (axes[2], difference(each), apart),
        ):
            _matrix(axis, matrix, scale)
        axes[0].set_ylabel(text.visible(each.title) or "rows", parse_math=False)
    titles = (picture.first, picture.second, f"difference (to ±{text.number(apart.high)})")
    for axis, title in zip(rows[0], titles, strict=True):
        axis.set_title(_ending(text.visible(title), 26), size=9, parse_math=False)
    body.suptitle(_told(picture, len(maps)), size=10, parse_math=False)


def _told(picture: Picture, shown: int) -> str:
    """What the matrices are; of more heads than are drawn, how many are left out."""
    if not picture.maps:
        return f"{_name(picture)}: the last two axes, where the sides differ most"
    known = len(picture.maps)
    which = f"{shown} of {known} heads, those that differ most" if shown < known else f"{text.counted(known, 'head')}"
    return f"{_name(picture)}: {which}"


def _matrix(axis: Axes, values: np.ndarray, scale: colours.Scale) -> None:
    codes = scale.codes(values)
    shown = (colours.DIVERGING if scale.diverging else colours.SEQUENTIAL)[np.minimum(codes, colours.LEVELS - 1)]
    shown[codes == colours.LEVELS] = 255
    axis.imshow(shown, interpolation="nearest", aspect="auto")
    for row, column in np.argwhere(codes == colours.LEVELS)[:400]:
        axis.plot(column, row, marker="x", color="#16191f", markersize=3)
    axis.set_xticks([])
    axis.set_yticks([])


def _histogram(axis: Axes, picture: Picture, entry: Entry) -> None:
    labels = ["equal", *(f"{low:.0e}" for low in picture.edges[1:-1])]
    bounds = bounds_of(picture, entry.comparison)
    limit = bounds[-1][0] if bounds else math.inf
    tones = [_TONES["off"] if low >= limit else _TONES["rounding"] for low in picture.edges[:-1]]
    places = np.arange(len(picture.counts))
    axis.barh(places, np.array(picture.counts), color=tones, log=True)
    axis.set_yticks(places, labels, fontfamily="monospace", size=8)
    axis.invert_yaxis()
    axis.set_xlabel("elements")
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(f"{_name(picture)}\nelements by difference", size=10, parse_math=False)
    axis.set_xlim(left=0.5)
    for at, words in _lines(bounds, picture.edges):
        axis.axhline(at, color="#16191f", linestyle="--", linewidth=1)
        axis.text(1, at, words, size=8, va="bottom", ha="right", linespacing=1.3,
                  transform=axis.get_yaxis_transform(), parse_math=False)  # fmt: skip


def _name(picture: Picture) -> str:
    """Of a tensor; of a long path the end tells most."""
    layer, tensor = _ending(text.visible(picture.layer), 24), _short(text.visible(picture.tensor), 18)
    return " ".join(filter(None, (layer, tensor)))


def _lines(bounds: list[tuple[float, str]], edges: tuple[float, ...]) -> list[tuple[float, str]]:
    """Where lines are drawn and what is written on each; bounds too near to each other for two texts share one."""
    found: list[tuple[float, str]] = []
    apart = 0.1 * max(1, len(edges) - 1)  # in bars: two lines of text among so many
    for bound, side in bounds:
        at, words = _between(bound, edges), f"bound of {_ending(side, 20)}: {text.number(bound)}"
        if found and at - found[-1][0] < apart:
            at, words = found[-1][0], f"{found[-1][1]}\n{words}"
            found.pop()
        found.append((at, words))
    return found


def _between(bound: float, edges: tuple[float, ...]) -> float:
    """Where a bound lies among bars that are one unit wide each."""
    place = int(np.searchsorted(edges, bound, side="right")) - 1
    if not 0 < place < len(edges) - 1:  # what is equal is inside every bound
        return min(max(place, 1), len(edges) - 1) - 0.5
    low, high = (math.log10(edges[place + i]) if edges[place + i] < math.inf else 309.0 for i in (0, 1))
    return place - 0.5 + (math.log10(bound) - low) / (high - low)


def _dots(axis: Axes, entries: tuple[Entry, ...]) -> None:
    """Every comparison's largest difference, in order; the mark and the colour are the verdict's."""
    found = [entry.comparison for entry in entries]
    known = [each.max_abs for each in found if 0 < each.max_abs < math.inf]
    none = min(known, default=1e-8) / 10
    for verdict in VERDICTS:
        chosen = [place for place, each in enumerate(found) if each.verdict == verdict]
        if chosen:
            heights = [found[place].max_abs or none for place in chosen]
            label = f"{verdict} ({len(chosen)})"
            axis.scatter(chosen, heights, marker=_MARKS[verdict], color=_TONES[verdict], label=label)
    axis.set_yscale("log")
    axis.set_xlabel("comparison, in order")
    axis.set_ylabel("largest difference (lowest: none)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend()


def _short(line: str, longest: int) -> str:
    return line if len(line) <= longest else f"{line[: longest - 3]}..."


def _ending(line: str, longest: int) -> str:
    return line if len(line) <= longest else f"...{line[3 - longest :]}"
