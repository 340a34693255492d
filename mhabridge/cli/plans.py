"""Prints what a conversion did, or would do, to every tensor: alike ones together, unless all are asked for."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from mhabridge.checkpoint.conversion import ConversionReport
    from mhabridge.checkpoint.planning.plan import Entry

_LONG = 30  # entries; up to that many are shown one by one
_SAME = "(the same)"


def show(report: ConversionReport, *, to: str | None, dry_run: bool, verbose: bool) -> None:
    """Print a report: the plan as a table, then counts, what was kept and left out, notes, and the verdict.

    Args:
        report: what to print.
        to: the framework that was asked for.
        dry_run: whether nothing was to be written.
        verbose: show every tensor and every note.
    """
    from mhabridge.cli.tables import Column, print_table, printable

    grouped = not verbose and len(report.entries) > _LONG
    columns = [
        Column("tensors", "right"),
        Column("source", fold=True),
        Column("shape", drop=2),
        Column("target", fold=True),
        Column("its shape", drop=1),
        Column("dtype", drop=4),
        Column("rule", drop=3),
    ]
    rows = [row(group) for group in (alike(report.entries) if grouped else [[entry] for entry in report.entries])]
    first = 0 if grouped else 1
    title = f"{report.source} ({report.source_format}) to {report.target_format}{f', {to}' if to else ''}"
    print_table(columns[first:], [cells[first:] for cells in rows], title=title, styles={"left out": "yellow"})
    for line in words(report, dry_run=dry_run, verbose=verbose):
        click.echo(printable(line))


def alike(entries: tuple[Entry, ...]) -> list[list[Entry]]:
    """Entries that differ in nothing but numbers in their names, together, in the order of the first ones."""
    groups: dict[tuple[str, ...], list[Entry]] = {}
    for entry in entries:
        key = (entry.rule, entry.dtype, _pattern(" ".join(entry.sources)), _pattern(entry.target or ""))
        groups.setdefault(key, []).append(entry)
    return list(groups.values())


def row(group: list[Entry]) -> list[str]:
    """The cells for one entry, or for some that are alike."""
    first, many = group[0], len(group) > 1
    source, target = braced(first.sources), first.target or "left out"
    if many:
        source, target = _pattern(source), _pattern(target)
    before = _common([", ".join(dict.fromkeys(map(_shape, entry.before))) for entry in group])
    after = _common(["" if entry.after is None else _shape(entry.after) for entry in group])
    same = target == source
    return [
        str(len(group)),
        source,
        before,
        _SAME if same else target,
        _SAME if after == before and same else after,
        first.dtype,
        first.rule,
    ]


def braced(names: tuple[str, ...]) -> str:
    """Several names as one, as a shell would take it.

    Example:
        >>> braced(("a.query.weight", "a.key.weight")), braced(("a",))
        ('a.{query,key}.weight', 'a')
    """
    if len(names) == 1:
        return names[0]
    split = [name.split(".") for name in names]
    shortest = min(map(len, split)) - 1
    head = next((i for i in range(shortest) if len({parts[i] for parts in split}) > 1), shortest)
    tail = next((i for i in range(shortest - head) if len({parts[-1 - i] for parts in split}) > 1), shortest - head)
    middle = ",".join(".".join(parts[head : len(parts) - tail]) for parts in split)
    return ".".join([*split[0][:head], f"{{{middle}}}", *split[0][len(split[0]) - tail :]])


def words(report: ConversionReport, *, dry_run: bool, verbose: bool) -> list[str]:
    """The lines below the table."""
    lines = [f"{count:>8}  {rule}" for rule, count in report.counts.items()]
    if report.kept:
        lines.append(f"kept: {', '.join(report.kept)}")
    lines += [f"left out: {', '.join(e.sources)} ({e.rule})" for e in report.entries if e.target is None]
    lines += report.left_out
    return [*lines, *notes(report.notes, verbose), verdict(report, dry_run)]


def notes(texts: tuple[str, ...], verbose: bool = False) -> list[str]:
    """A line for each note; of those that differ in nothing but numbers only the first, unless all are asked for."""
    alike: dict[str, list[str]] = {}
    for text in texts:
        alike.setdefault(text if verbose else re.sub(r"\d+", "*", text), []).append(text)
    more = {key: f" (and {len(group) - 1} more like this)" if len(group) > 1 else "" for key, group in alike.items()}
    return [f"note: {group[0]}{more[key]}" for key, group in alike.items()]


def verdict(report: ConversionReport, dry_run: bool) -> str:
    """The last line: what there is now, and whether it is proved."""
    filled = [entry for entry in report.entries if entry.target is not None]
    sources = len({name for entry in filled for name in entry.sources})
    made = f" made of {sources}" if sources != len(filled) else ""
    what = f"{len(filled)} {'tensor' if len(filled) == 1 else 'tensors'}{made}, {size(report.bytes)}"
    if dry_run:
        return f"dry run: {what} would be written; nothing was"
    if report.verified is False:
        return "NOT verified: read back, the target is not what it should be; nothing was written"
    proof = "verified: every bit" if report.verified else "not verified"
    return f"wrote {report.target}: {what}; {proof}"


def size(count: int) -> str:
    """A number of bytes for people.

    Example:
        >>> size(90_900_000), size(12)
        ('90.9 MB', '12 B')
    """
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"


def _pattern(name: str) -> str:
    return re.sub(r"(?<![A-Za-z\d])\d+(?![A-Za-z\d])", "*", name)


def _shape(shape: tuple[int, ...]) -> str:
    return "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"


def _common(texts: list[str]) -> str:
    return texts[0] if len(set(texts)) == 1 else "(several)"
