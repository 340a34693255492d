"""``mhabridge diff recordings``: two recorded runs of a model, layer by layer; no framework is needed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from mhabridge.cli import outputs

if TYPE_CHECKING:
    from mhabridge.diff import DiffReport

EXAMPLES = """\b
Examples:
  mhabridge diff recordings torch.safetensors mindspore.safetensors
  mhabridge diff recordings a.safetensors b.safetensors.journal --rename 'encoder.*=model.encoder.*'
  mhabridge diff recordings a.safetensors b.safetensors --single-step --html report.html
"""


SHOWN = 6  # reasons why something was left out


@click.command(epilog=EXAMPLES)
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@click.option(
    "--rename", multiple=True, metavar="FROM=TO", help="A rule that turns layers' paths of A into those of B."
)
@click.option("--by-name", is_flag=True, help="Match layers by name only, not by order and shape.")
@click.option("--single-step", is_flag=True, help="Run B's layers on the inputs that A recorded, on B's framework.")
@outputs.options
def command(a: str, b: str, rename: tuple[str, ...], by_name: bool, single_step: bool, **given: Any) -> None:
    """Compare two recorded runs and mark the first layer that diverges.

    Record with `mb.record(model, path)`, or with the one file that `mhabridge record-kit` writes.
    Exit code 0: rounding explains all; 1: a difference; 2: it could not be done.
    """
    outputs.check(given, (a, b))
    from mhabridge.diff.recordings import diff_recordings

    report = diff_recordings(
        a, b, rules=rename, order=not by_name, single_step=single_step, pictures=outputs.wants_pictures(given)
    )
    outputs.give(report, given, lambda: show(report))
    sys.exit(report.exit_code)


def show(report: DiffReport) -> None:
    """Print the layers as a tree in the order in which they ran, then what explains the first divergence."""
    from mhabridge.cli.tables import printable
    from mhabridge.cli.tree import print_tree

    print_tree(report)
    lines = [f"{each.layer} ({each.side}): {each.words}" for each in report.diagnoses]
    lines += [f"  mend: {fault.mend}" for each in report.diagnoses for fault in each.faults]
    lines += [f"left out of {run.backend}: {line}" for run in report.runs for line in left_out(run.notes)]
    lines += list(report.notes)
    lines.append("verdict: " + (_in_words(report)))
    for text in lines:
        click.echo(printable(text))


def left_out(notes: Sequence[str]) -> list[str]:
    """What a recording lacks, each reason once.

    Example:
        >>> left_out(["a: it was not called", "b: it was not called", "parameters: parameters=False"])
        ['a and 1 more: it was not called', 'parameters: parameters=False']
    """
    reasons: dict[str, list[str]] = {}
    for note in notes:
        of, colon, why = note.partition(": ")
        reasons.setdefault(why if colon else "", []).append(of)
    lines: list[str] = []
    for why, what in reasons.items():
        more = f" and {len(what) - 1} more" if len(what) > 1 else ""
        lines += [f"{what[0]}{more}: {why}"] if why else what
    return lines if len(lines) <= SHOWN else [*lines[:SHOWN], f"... and {len(lines) - SHOWN} more reasons"]


def _in_words(report: DiffReport) -> str:
    """The verdict, and for one that is not good why."""
    if report.ok:
        return "rounding explains every difference"
    wrong = [entry for entry in report.entries if not entry.ok]
    said = [f"{run.backend}: {run.reason}" for run in report.runs if run.reason]
    if wrong:
        first = f", first in {report.first_divergence}" if report.first_divergence else ""
        said.insert(0, f"{len(wrong)} of {len(report.entries)} tensors differ by more than rounding{first}")
    return f"NOT ok: {'; '.join(said) or 'nothing was compared'}"
