"""Tables for a terminal of any width: what does not fit is left out by columns, never cut in the middle of a number."""

from __future__ import annotations

import dataclasses
from typing import Literal

GAP = 2


@dataclasses.dataclass(frozen=True)
class Column:
    """One column.

    Args:
        name: its heading.
        justify: "left" or "right".
        drop: when the terminal is too narrow the column with the largest number goes first; 0 stays always.
    """

    name: str
    justify: Literal["left", "right"] = "left"
    drop: int = 0


def fitting(columns: list[Column], rows: list[list[str]], width: int | None) -> list[int]:
    """Which columns fit into a width (None: any number of columns), by index.

    Example:
        >>> columns = [Column("backend"), Column("where", drop=1), Column("verdict")]
        >>> fitting(columns, [["torch", "here", "equal"]], 20)
        [0, 2]
    """
    kept = list(range(len(columns)))
    while width is not None and _needed(columns, rows, kept) > width:
        droppable = [i for i in kept if columns[i].drop]
        if not droppable:
            break
        kept.remove(max(droppable, key=lambda i: columns[i].drop))
    return kept


def _needed(columns: list[Column], rows: list[list[str]], kept: list[int]) -> int:
    """How wide a table with these columns is."""
    return GAP + sum(max(len(columns[i].name), *(len(row[i]) for row in rows), 0) + GAP for i in kept)


def print_table(
    columns: list[Column],
    rows: list[list[str]],
    *,
    title: str = "",
    styles: dict[str, str] | None = None,
    group: int = 0,
) -> None:
    """Print a table; piped, it has all columns.

    Args:
        columns: its columns.
        rows: a text for each column.
        title: above it.
        styles: a colour for each text that has one, wherever it stands.
        group: an empty line after this many rows; 0 for none.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    kept = fitting(columns, rows, console.width if console.is_terminal else None)
    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for i in kept:
        table.add_column(columns[i].name, justify=columns[i].justify, no_wrap=True, overflow="crop")
    for number, row in enumerate(rows, 1):
        cells = [Text(row[i], (styles or {}).get(row[i], ""), justify=columns[i].justify) for i in kept]
        table.add_row(*cells, end_section=bool(group) and number % group == 0)
    if not console.is_terminal:
        console.width = max(console.width, _needed(columns, rows, kept))
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
