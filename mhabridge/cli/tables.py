"""Tables for a terminal of any width: what does not fit is left out by columns, never cut in the middle of a number."""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import Literal

GAP = 2
_FOLDED = 24  # characters


@dataclasses.dataclass(frozen=True)
class Column:
    """One column.

    Args:
        name: its heading.
        justify: "left" or "right".
        drop: when the terminal is too narrow the column with the largest number goes first; 0 stays always.
        fold: whether its texts may go over several lines there; names may, numbers never.
    """

    name: str
    justify: Literal["left", "right"] = "left"
    drop: int = 0
    fold: bool = False


def fitting(columns: list[Column], rows: list[list[str]], width: int) -> list[int]:
    """Which columns fit into a width, by index.

    Example:
        >>> columns = [Column("backend"), Column("where", drop=1), Column("verdict")]
        >>> fitting(columns, [["torch", "here", "equal"]], 20)
        [0, 2]
    """
    kept = list(range(len(columns)))
    while _needed(columns, rows, kept) > width:
        droppable = [i for i in kept if columns[i].drop]
        if not droppable:
            break
        kept.remove(max(droppable, key=lambda i: columns[i].drop))
    return kept


def _needed(columns: list[Column], rows: list[list[str]], kept: list[int]) -> int:
    """How wide a table with these columns is."""
    return GAP + sum(width + GAP for width in (_width(columns[i], [row[i] for row in rows]) for i in kept))


def _width(column: Column, texts: list[str]) -> int:
    """What a column needs; one that may be folded needs a line of bearable length."""
    whole = max(len(column.name), *map(len, texts), 0)
    return min(whole, _FOLDED) if column.fold else whole


def print_table(
    columns: list[Column],
    rows: list[list[str]],
    *,
    title: str = "",
    styles: dict[str, str] | None = None,
    group: int = 0,
) -> None:
    """Print a table; piped, it is plain text and has all columns.

    Args:
        columns: its columns.
        rows: a text for each column.
        title: above it.
        styles: a colour for each text that has one, wherever it stands.
        group: an empty line after this many rows; 0 for none.
    """
    title, rows = printable(title), [[printable(cell) for cell in row] for row in rows]
    if sys.stdout.isatty() or os.environ.get("FORCE_COLOR"):
        _print_rich(columns, rows, title, styles or {}, group)
    else:
        _print_plain(columns, rows, title, group)


def printable(text: str, keep: str = "") -> str:
    r"""A text whose invisible characters are escaped: names come from files, and a terminal obeys some sequences.

    Example:
        >>> printable("a\x1b[2J\n")
        'a\\x1b[2J\\n'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def shown(text: str, most: int = 200) -> str:
    """A text from a file as it is printed: escaped, and without its middle when it is very long.

    Example:
        >>> shown("a" * 300, 9)
        'aaa...aaa'
    """
    text = printable(text[:most] + text[-most:] if len(text) > 2 * most else text)
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"


def _print_plain(columns: list[Column], rows: list[list[str]], title: str, group: int) -> None:
    """Without rich, whose import and layout take longer than reading a checkpoint's names."""
    widths = [max(len(column.name), *(len(row[i]) for row in rows), 0) for i, column in enumerate(columns)]
    lines = [title] if title else []
    lines += [
        _plain_line(columns, widths, [column.name for column in columns]),
        "-" * (sum(widths) + GAP * len(widths)),
    ]
    for number, row in enumerate(rows, 1):
        lines.append(_plain_line(columns, widths, row))
        if group and number % group == 0:
            lines.append("")
    print("\n".join([*lines, ""] if lines[-1] else lines))


def _plain_line(columns: list[Column], widths: list[int], cells: list[str]) -> str:
    adjusted = [
        cell.rjust(width) if column.justify == "right" else cell.ljust(width)
        for column, width, cell in zip(columns, widths, cells, strict=True)
    ]
    return f" {(' ' * GAP).join(adjusted)}".rstrip()


def _print_rich(columns: list[Column], rows: list[list[str]], title: str, styles: dict[str, str], group: int) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    kept = fitting(columns, rows, console.width)
    shown = Text(title, "italic") if title else None
    table = Table(title=shown, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in (columns[i] for i in kept):
        overflow: Literal["fold", "crop"] = "fold" if column.fold else "crop"
        table.add_column(column.name, justify=column.justify, no_wrap=not column.fold, overflow=overflow)
    for number, row in enumerate(rows, 1):
        cells = [Text(row[i], styles.get(row[i], ""), justify=columns[i].justify) for i in kept]
        table.add_row(*cells, end_section=bool(group) and number % group == 0)
    console.print(table)
    dropped = [columns[i].name for i in range(len(columns)) if i not in kept]
    if dropped:
        print(f"(not shown in {console.width} columns: {', '.join(dropped)})")


VERDICTS = {
    "equal": "green",
    "rounding": "green",
    "off": "red",
    "broken": "red",
    "refused": "red",
    "failed": "red",
}
