"""A report of a model's layers as a tree, in the order in which they ran, with the first divergence marked.

Long runs of layers with nothing to say are one line, and so are those of layers that differ only since what came in
did.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mhabridge.cli.tables import VERDICTS, printable, shown

if TYPE_CHECKING:
    from mhabridge.diff.report import DiffReport, Entry, Layer

HERE = "<--- first divergence"
DOWNSTREAM = "differ, since their inputs do"
AS_ABOVE = "noted as above"
_DEPTH = 12  # further levels are not worth their indentation; a hostile path may have thousands
_LONG = 4  # lines in a row that are shown whole


@dataclasses.dataclass(frozen=True)
class Line:
    """One layer, or a run of them.

    Args:
        path: its names, from the model's down.
        verdict: of the worst entry; "" where there is none.
        worst: that entry in words.
        mark: what stands behind it.
        run: what it may be one of a run of; "" for what is shown by itself.
        notes: what is worth knowing, below it.
    """

    path: tuple[str, ...]
    verdict: str
    worst: str = ""
    mark: str = ""
    run: str = ""
    notes: tuple[str, ...] = ()


@dataclasses.dataclass
class _Node:
    name: str
    line: Line | None = None
    children: list[_Node] = dataclasses.field(default_factory=list)


def print_tree(report: DiffReport) -> None:
    """Print the layers of a report as a tree; piped, it is plain text."""
    rows = list(_rows(tree(lines(report)), ""))
    width = max((len(guide) for guide, line in rows if line is not None), default=0)
    colour = sys.stdout.isatty() or bool(os.environ.get("FORCE_COLOR"))
    if not colour:
        for guide, line in rows:
            print("  ".join(part for part in _cells(guide, line, width) if part).rstrip())
        return
    from rich.console import Console
    from rich.text import Text

    console = Console()
    for guide, line in rows:
        name, verdict, worst, mark = _cells(guide, line, width)
        style = VERDICTS.get(verdict.strip(), "")
        text = Text.assemble(name, "  ", (verdict, style), "  ", worst, "  " if mark else "", (mark, "bold red"))
        text.rstrip()
        console.print(text, soft_wrap=True)


def _cells(guide: str, line: Line | None, width: int) -> tuple[str, str, str, str]:
    if line is None:
        return guide, "", "", ""
    return guide.ljust(width), line.verdict.ljust(8), line.worst, line.mark


def lines(report: DiffReport) -> list[Line]:
    """One line for each layer, with long runs of what is alike as one."""
    entries: dict[str, list[Entry]] = {}
    for entry in report.entries:
        entries.setdefault(entry.layer, []).append(entry)
    return list(_folded([_line(layer, entries.get(layer.name, []), report) for layer in report.layers]))


def _line(layer: Layer, entries: list[Entry], report: DiffReport) -> Line:
    path = tuple(shown(layer.name).split(".", _DEPTH))
    other = f"is {shown(layer.other)}" if layer.other not in ("", layer.name) else ""
    if not entries:
        return Line(path, "", "; ".join(map(printable, layer.notes)))
    worst = max(entries, key=_how_bad)
    words = "; ".join(filter(None, (_words(worst), other)))
    mark = ""
    if layer.name == report.first_divergence:
        mark = f"{HERE}: {printable(layer.notes[0])}" if layer.notes else HERE
    notes = tuple(map(printable, layer.notes[1:] if mark else layer.notes))
    return Line(path, worst.comparison.verdict, words, mark, "" if mark else _run(entries), notes)


def _run(entries: list[Entry]) -> str:
    """What a layer may be folded with: others that are fine, or others that differ only since their inputs do."""
    wrong = [entry for entry in entries if not entry.ok]
    if not wrong:
        return "equal or rounding"
    inputs = [entry for entry in wrong if entry.tensor.startswith("inputs.")]
    others = [entry for entry in wrong if entry.tensor.partition(".")[0] not in ("inputs", "output", "grads")]
    judged = [each for entry in wrong for each in entry.comparison.distances if each is not None and not each.ok]
    return "" if others or judged or not inputs else DOWNSTREAM


def _how_bad(entry: Entry) -> tuple[int, float, float]:
    rank = list(VERDICTS).index(entry.comparison.verdict)
    apart = entry.comparison.max_abs
    return rank, _times(entry), apart if apart == apart else -1.0


def _times(entry: Entry) -> float:
    found = [each for each in entry.comparison.distances if each is not None]
    numbers = [number for each in found for number in (each.times_bound, each.times_mean_bound) if number == number]
    return max(numbers, default=-1.0)


def _words(entry: Entry) -> str:
    """The worst entry in words: its name, how far apart, and how much of the bound that is."""
    comparison, times = entry.comparison, _times(entry)
    if comparison.verdict == "equal":
        return ""
    said = shown(entry.tensor)
    if comparison.max_abs == comparison.max_abs:
        said += f" {comparison.max_abs:.2e}"
    if times >= 0:
        said += f" ({100 * times:.0f} % of bound)" if times < 10 else f" ({times:.3g} times the bound)"
    return said if comparison.ok or times > 1 else f"{said}: {printable(comparison.reason)}"


def _folded(found: list[Line]) -> Iterator[Line]:
    """Long runs as their first line, their last, and one for those between."""
    for (kind, notes), group in itertools.groupby(found, key=lambda line: (line.run, line.notes)):
        run = list(group)
        first, *others = run
        if not notes:
            shown = run
        elif kind == DOWNSTREAM:  # where the run is folded, its line says it
            kept = first.notes if len(run) <= _LONG else ()
            shown = [dataclasses.replace(first, notes=kept), *(dataclasses.replace(line, notes=()) for line in others)]
        else:
            shown = [first, *(dataclasses.replace(line, notes=(AS_ABOVE,)) for line in others)]
        if not kind or len(run) <= _LONG:
            yield from shown
        else:
            yield shown[0]
            alike = f", {AS_ABOVE}" if notes and kind != DOWNSTREAM else ""
            yield Line((*_common(run[1:-1]), f"... {len(run) - 2} layers {kind}{alike}"), "")
            yield shown[-1]


def _common(run: list[Line]) -> tuple[str, ...]:
    """What the paths of all of them begin with."""
    levels = zip(*(line.path[:-1] for line in run), strict=False)
    return tuple(names[0] for names in itertools.takewhile(lambda names: len(set(names)) == 1, levels))


# -- as a tree ---------------------------------------------------------------------------------------------------------


def tree(found: list[Line]) -> _Node:
    """Lines as nodes under what their paths have in common, in their order."""
    root = _Node("")
    for line in found:
        node = root
        for name in line.path[:-1]:
            if not node.children or node.children[-1].name != name or node.children[-1].line is not None:
                node.children.append(_Node(name))
            node = node.children[-1]
        last = node.children[-1] if node.children else None
        if last is not None and last.name == line.path[-1] and last.line is None:
            last.line = line  # it holds those before it, which ended earlier
        else:
            node.children.append(_Node(line.path[-1], line))
    for child in root.children:
        _shorten(child)
    return root


def _shorten(node: _Node) -> None:
    """A node with nothing but one child is that child, under both names."""
    while node.line is None and len(node.children) == 1:
        (child,) = node.children
        node.name, node.line, node.children = f"{node.name}.{child.name}", child.line, child.children
    for child in node.children:
        _shorten(child)


def _rows(node: _Node, indent: str) -> Iterator[tuple[str, Line | None]]:
    for number, child in enumerate(node.children):
        last = number == len(node.children) - 1
        yield f"{indent}{'└─' if last else '├─'} {child.name}", child.line
        below = indent + ("   " if last else "│  ")
        for note in child.line.notes if child.line is not None else ():
            yield f"{below}{'│' if child.children else ' '}  {note}", None
        yield from _rows(child, below)
