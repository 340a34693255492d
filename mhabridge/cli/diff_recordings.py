"""``mhabridge diff recordings``: two recorded runs of a model, layer by layer; no framework is needed."""

from __future__ import annotations

import sys
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
    lines += list(report.notes)
    lines.append("verdict: " + ("rounding explains every difference" if report.ok else "NOT ok"))
    for line in lines:
        click.echo(printable(line))
