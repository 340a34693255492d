"""``mhabridge mapping A B``: the difference table of two dialects."""

from __future__ import annotations

import json

import click

from mhabridge.differences import Comparison, compare, signature


@click.command()
@click.argument("source")
@click.argument("target")
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
@click.option("--markdown", "as_markdown", is_flag=True, help="Print the table as a Markdown page.")
def command(source: str, target: str, as_json: bool, as_markdown: bool) -> None:
    """Show how the arguments of TARGET differ from those of SOURCE.

    Both are a dialect (torch, mindspore, megengine, megengine.functional, numpy), with a version or without: then the
    newest that is known.

    Example: mhabridge mapping torch@1.8.1 mindspore@2.3
    """
    if as_json and as_markdown:
        raise click.UsageError("Give --json or --markdown, not both.")
    found = compare(source, target)
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=2))
    elif as_markdown:
        click.echo(found.to_markdown(), nl=False)
    else:
        _print(found)


def _print(found: Comparison) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    console = Console()
    for spoken in (found.source, found.target):
        console.print(f"{spoken.label}", style="bold")
        console.print(signature(spoken), markup=False, highlight=False)
    arguments = Table("", found.source.label, found.target.label, Column("Difference", ratio=1))
    for row in found.rows:
        arguments.add_row(row.subcategory, row.source, row.target, row.difference)
    console.print(arguments)
    behaviour = Table("Without an argument", found.source.label, found.target.label)
    for entry in found.behaviour:
        behaviour.add_row(*entry)
    if found.behaviour:
        console.print(behaviour)
