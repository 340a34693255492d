"""How one dialect's arguments differ from another's: a table in the form of MindSpore's own API-mapping page.

``python -m mhabridge.differences docs/api-mapping.md`` writes the page of the pairs that people ask for.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from mhabridge.arguments import Argument, Dialect, dialect

PAIRS = (
    ("torch@1.8.1", "mindspore@2.3"),
    ("torch", "mindspore"),
    ("torch", "megengine"),
    ("mindspore", "megengine"),
    ("torch", "megengine.functional"),
    ("megengine", "megengine.functional"),
    ("torch@1.8.1", "torch"),
    ("mindspore", "mindspore@2.12"),
)
_BIASES = ("q_bias", "k_bias", "v_bias", "out_bias")


@dataclasses.dataclass(frozen=True)
class Row:
    """One argument on both sides.

    Args:
        category: "Parameters" of the layer, or "Input" of a call.
        subcategory: "Parameter1", "Input3" ...
        source: its names in the first dialect; empty when it has none.
        target: its names in the second.
        kinds: how they differ: "name", "default", "dtypes", "only", "position", "missing"; empty when they do not.
        difference: the same in words.
    """

    category: str
    subcategory: str
    source: str
    target: str
    kinds: tuple[str, ...]
    difference: str


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two dialects, argument by argument.

    Args:
        source: the first dialect.
        target: the second.
        rows: parameters, then inputs; the first dialect's in its order, then what only the second has.
        behaviour: (topic, in the first, in the second), where they differ without any argument.
    """

    source: Dialect
    target: Dialect
    rows: tuple[Row, ...]
    behaviour: tuple[tuple[str, str, str], ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return {
            "source": {"name": self.source.name, "version": self.source.version, "path": self.source.path},
            "target": {"name": self.target.name, "version": self.target.version, "path": self.target.path},
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "behaviour": [dict(zip(("topic", "source", "target"), entry, strict=True)) for entry in self.behaviour],
        }

    def to_markdown(self, level: int = 1) -> str:
        """The page: both signatures, the table, and the behaviour; headings start at ``level``."""
        mark = "#" * level
        lines = [f"{mark} Differences between {_full_name(self.source)} and {_full_name(self.target)}", ""]
        for spoken in (self.source, self.target):
            lines += [f"{mark}# {_full_name(spoken)}", "", "```python", signature(spoken), "```", ""]
            if spoken.docs:
                lines += [f"For more information, see [{spoken.path}]({spoken.docs}).", ""]
        lines += [f"{mark}# Differences", "", *self._rows_in_markdown(), ""]
        lines += [f"{mark}# Behaviour", "", *self._behaviour_in_markdown(), ""]
        return "\n".join(lines)

    def _rows_in_markdown(self) -> list[str]:
        cells: list[tuple[str, ...]] = [
            ("Categories", "Subcategories", self.source.label, self.target.label, "Difference")
        ]
        previous = ""
        for row in self.rows:
            category = "" if row.category == previous else row.category
            cells.append((category, row.subcategory, row.source, row.target, row.difference))
            previous = row.category
        return _markdown_table(cells)

    def _behaviour_in_markdown(self) -> list[str]:
        if not self.behaviour:
            return ["No other difference is known."]
        return _markdown_table(
            [("What differs without an argument", self.source.label, self.target.label), *self.behaviour]
        )


def compare(source: str, target: str) -> Comparison:
    """How two dialects differ.

    Args:
        source: a dialect, with or without a version: "torch@1.8.1".
        target: another.

    Raises:
        ArgumentError: no such dialect, or a version before those that are known.

    Example:
        >>> [(row.source, row.target) for row in compare("torch@1.8.1", "mindspore@2.3").rows if row.kinds][:3]
        [('bias', 'has_bias'), ('', 'batch_first'), ('', 'dtype')]
    """
    first, second = dialect(source), dialect(target)
    rows = _rows(first, second, "Parameters", ("parameter", "weights")) + _rows(first, second, "Input", ("input",))
    there = {entry.topic: entry.text for entry in second.behaviour}
    behaviour = tuple(
        (entry.topic, entry.text, there[entry.topic])
        for entry in first.behaviour
        if there.get(entry.topic, entry.text) != entry.text
    )
    return Comparison(first, second, tuple(rows), behaviour)


def signature(spoken: Dialect) -> str:
    """A dialect's constructor and call as one piece of Python, one parameter a line."""
    lines = ",\n".join(f"    {word}" for word in _parameters(spoken.constructor_arguments()))
    if spoken.function:
        return f"{spoken.path}(\n{lines}\n)"
    return f"class {spoken.path}(\n{lines}\n)({', '.join(_parameters(spoken.call_arguments()))})"


def document() -> str:
    """The page of all ``PAIRS``: docs/api-mapping.md."""
    head = [
        "# API mapping",
        "",
        "Generated from mappings/ by `python -m mhabridge.differences docs/api-mapping.md`; do not edit.",
        "Any other pair: `mhabridge mapping A B`, with versions as in `torch@1.8.1`.",
        "A version newer than those that the tables know is taken to be like the newest.",
        "",
    ]
    return "\n".join(head) + "\n" + "\n".join(compare(*pair).to_markdown(2) for pair in PAIRS)


def _rows(source: Dialect, target: Dialect, category: str, roles: tuple[str, ...]) -> list[Row]:
    here = _by_field(source, target, roles)
    there = _by_field(target, source, roles)
    noun = "Parameter" if category == "Parameters" else "Input"
    rows: list[Row] = []
    for field in (*here, *(field for field in there if field not in here)):
        mine, theirs = here.get(field, []), there.get(field, [])
        if mine and theirs:
            kinds, text = _both(source, target, mine, theirs)
        elif mine:
            kinds, text = ("missing",), _one(source, target, mine)
        else:
            kinds, text = ("missing",), _one(target, source, theirs)
        rows.append(Row(category, f"{noun}{len(rows) + 1}", _names(mine), _names(theirs), kinds, text))
    return rows


def _by_field(spoken: Dialect, other: Dialect, roles: tuple[str, ...]) -> dict[str, list[Argument]]:
    """A dialect's arguments by what they say; four bias flags stand together where the other side has one for all."""
    one_for_all = spoken.argument_for("bias") is None and other.argument_for("q_bias") is None
    groups: dict[str, list[Argument]] = {}
    for argument in spoken.of_role(*roles):
        field = argument.field or f"{spoken.name}: {argument.name}"
        groups.setdefault("bias" if one_for_all and field in _BIASES else field, []).append(argument)
    return groups


def _both(
    source: Dialect, target: Dialect, mine: list[Argument], theirs: list[Argument]
) -> tuple[tuple[str, ...], str]:
    one, other = mine[0], theirs[0]
    said = {
        "default": _default_text(source, target, one, other),
        "dtypes": _dtypes_text(source, target, one, other),
        "only": _only_text(source, one) + _only_text(target, other),
        "position": _position_text(source, target, one, other),
    }
    kinds = tuple(kind for kind, text in said.items() if text)
    text = "".join(said.values()) + _notes(source, target, one, other)
    renamed = _names(mine) != _names(theirs)
    agrees = "default" not in kinds and "dtypes" not in kinds and "only" not in kinds
    head = "Consistent function" if agrees else ""
    if renamed:
        kinds = ("name", *kinds)
        head = head + ", under another name" if head else "Another name."
    return kinds, f"{head}.{text}" if head and text and agrees else f"{head}{text}".strip()


def _default_text(source: Dialect, target: Dialect, one: Argument, other: Argument) -> str:
    if one.required == other.required and one.default_value == other.default_value:
        return ""
    return f" Default: {_default(one)} in {source.label}, {_default(other)} in {target.label}."


def _dtypes_text(source: Dialect, target: Dialect, one: Argument, other: Argument) -> str:
    if one.dtypes == other.dtypes:
        return ""
    return f" Mask dtypes: {_listed(one.dtypes)} in {source.label}, {_listed(other.dtypes)} in {target.label}."


def _only_text(spoken: Dialect, argument: Argument) -> str:
    return f" {spoken.label} accepts only {argument.only}: {argument.reason}." if argument.only else ""


def _position_text(source: Dialect, target: Dialect, one: Argument, other: Argument) -> str:
    # A function counts the layer's arguments and the call's together: there every position differs, and says nothing.
    if one.position == other.position or (source.function is None) != (target.function is None):
        return ""
    here, there = (argument.position or "by keyword only" for argument in (one, other))
    return f" Position: {here} in {source.label}, {there} in {target.label}."


def _notes(source: Dialect, target: Dialect, one: Argument, other: Argument) -> str:
    if one.note == other.note:
        return f" Both: {one.note}." if one.note else ""
    sides = ((source, one), (target, other))
    return "".join(f" {spoken.label}: {argument.note}." for spoken, argument in sides if argument.note)


def _one(having: Dialect, lacking: Dialect, arguments: list[Argument]) -> str:
    """The words for an argument that only one side has."""
    argument = arguments[0]
    fixed = lacking.fixed_for(argument.field or "")
    text = f"Only in {having.label}"
    text += f": {argument.reason}." if argument.reason and not argument.only else "."
    if fixed is not None:
        value = f"always {fixed.value}: " if fixed.value is not None else ""
        text += f" In {lacking.label} {value}{fixed.reason}."
    return text + _only_text(having, argument) + (f" {having.label}: {argument.note}." if argument.note else "")


def _names(arguments: list[Argument]) -> str:
    return ", ".join(argument.name for argument in arguments)


def _default(argument: Argument) -> str:
    if argument.default is None:
        return "none (required)"
    means = "" if argument.default_value is not None or argument.means is None else f" (that is {argument.means})"
    return argument.default + means


def _parameters(arguments: tuple[Argument, ...]) -> list[str]:
    """The arguments as Python writes them; a star stands before those that are taken by keyword only."""
    words = [entry.name if entry.default is None else f"{entry.name}={entry.default}" for entry in arguments]
    first = next((index for index, entry in enumerate(arguments) if entry.position is None), None)
    return words if first is None else [*words[:first], "*", *words[first:]]


def _listed(words: tuple[str, ...]) -> str:
    return " or ".join((", ".join(words[:-1]), words[-1])) if len(words) > 1 else "".join(words)


def _full_name(spoken: Dialect) -> str:
    return f"{spoken.path} ({spoken.label})"


def _markdown_table(cells: list[tuple[str, ...]]) -> list[str]:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in cells]
    rule = ["---"] * len(cells[0])
    return [f"| {' | '.join(row)} |" for row in (escaped[0], rule, *escaped[1:])]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(document(), encoding="utf-8")
