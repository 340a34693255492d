"""``mhabridge diff checkpoints``: the weights of two files, whatever their formats and layouts."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from mhabridge.cli import outputs

if TYPE_CHECKING:
    from mhabridge.diff import DiffReport, Entry

EXAMPLES = """\b
Examples:
  mhabridge diff checkpoints model.pt converted.ckpt
  mhabridge diff checkpoints a.safetensors b.safetensors --html report.html
"""
SHOWN = 40  # rows; --all shows every one


@click.command(epilog=EXAMPLES)
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@click.option("--num-heads", type=click.IntRange(1), help="H, where the layout needs it and no file says it.")
@click.option("--rename", multiple=True, metavar="FROM=TO", help="A rule that turns names of A into those of B.")
@click.option("--all", "every", is_flag=True, help="Show every tensor, not only those that differ.")
@outputs.options
def command(a: str, b: str, num_heads: int | None, rename: tuple[str, ...], every: bool, **given: Any) -> None:
    """Compare the weights of two checkpoints in canonical form, across frameworks and formats.

    Exit code 0: every tensor is equal, or one is the other rounded; 1: a difference; 2: it could not be done.
    """
    outputs.check(given, (a, b))
    from mhabridge.diff.checkpoints import diff_checkpoints

    report = diff_checkpoints(a, b, num_heads=num_heads, rename=rename, pictures=outputs.wants_pictures(given))
    outputs.give(report, given, lambda: show(report, every))
    sys.exit(report.exit_code)


def show(report: DiffReport, every: bool) -> None:
    """Print what differs as a table, then counts and the verdict."""
    from mhabridge.cli.tables import VERDICTS, Column, print_table, printable

    entries = [entry for entry in report.entries if every or not entry.ok]
    columns = [
        Column("layer", fold=True),
        Column("tensor", fold=True),
        Column("shape", drop=3),
        Column("dtype", drop=4),
        Column("max error", "right"),
        Column("max relative", "right", drop=2),
        Column("cosine", "right", drop=1),
        Column("worst at", drop=5),
        Column("verdict"),
    ]
    listed = entries if every else entries[:SHOWN]
    if listed:
        print_table(columns, [_row(entry) for entry in listed], styles=VERDICTS)
    if len(entries) > len(listed):
        click.echo(f"... and {len(entries) - len(listed)} more that differ; --all shows every tensor")
    for line in _words(report, listed):
        click.echo(printable(line))


def _row(entry: Entry) -> list[str]:
    from mhabridge.cli.tables import shown

    found = entry.comparison
    return [
        shown(entry.layer),
        shown(entry.tensor),
        " | ".join(dict.fromkeys(str(shape) for shape in found.shapes if shape is not None)),
        " | ".join(dict.fromkeys(name for name in found.dtypes if name)),
        _number(found.max_abs, ".2e"),
        _number(found.max_rel, ".1e"),
        _number(found.cosine, ".6f"),
        "" if found.index is None else str(found.index),
        found.verdict,
    ]


def _number(value: float, form: str) -> str:
    return "" if value != value else f"{value:{form}}"


def _words(report: DiffReport, listed: list[Entry]) -> list[str]:
    from mhabridge.cli.tables import shown

    counts: dict[str, int] = {}
    for entry in report.entries:
        counts[entry.comparison.verdict] = counts.get(entry.comparison.verdict, 0) + 1
    lines = [
        f"{shown('.'.join(filter(None, (entry.layer, entry.tensor))))}: {entry.comparison.reason}"
        for entry in listed
        if entry.comparison.reason
    ]
    lines += [f"{each.layer}: {each.words}" for each in report.diagnoses]
    lines += [f"  mend: {fault.mend}" for each in report.diagnoses for fault in each.faults]
    lines += list(report.notes)
    found = ", ".join(f"{count} {verdict}" for verdict, count in counts.items()) or "nothing to compare"
    return [
        *lines,
        f"{len(report.entries)} tensors compared: {found}",
        "verdict: " + ("the same" if report.ok else "NOT ok"),
    ]
