"""Where a diff's report goes besides the terminal: JSON, CSV, one page of HTML, one figure."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from mhabridge.diff import DiffReport

Command = TypeVar("Command", bound=Callable[..., Any])


def options(command: Command) -> Command:
    """Add --json, --csv, --html and --png to a command."""
    for decorate in (
        click.option("--png", type=click.Path(dir_okay=False), help="Also draw the most telling picture here."),
        click.option("--html", type=click.Path(dir_okay=False), help="Also write one self-contained page here."),
        click.option("--csv", type=click.Path(dir_okay=False), help="Also write the table here."),
        click.option("--json", "as_json", is_flag=True, help="Print everything as JSON."),
    ):
        command = decorate(command)
    return command


def check(given: dict[str, Any], inputs: Sequence[str | None] = ()) -> None:
    """Refuse, before anything is computed, to write over a file that is read, twice to one file, or into no folder.

    Raises:
        click.UsageError: the option, and what is wrong with it.
    """
    targets = {kind: pathlib.Path(given[kind]) for kind in ("csv", "html", "png") if given[kind]}
    for kind, path in targets.items():
        if not path.parent.is_dir():
            raise click.UsageError(f"--{kind}: there is no folder {str(path.parent)!r}.")
        if kind == "png" and path.suffix.lower() != ".png":
            raise click.UsageError(f"--png: {str(path)!r} does not end in .png, and nothing else is drawn.")
        others = [pathlib.Path(other) for other in inputs if other]
        if any(path.exists() and other.exists() and path.samefile(other) for other in others):
            raise click.UsageError(f"--{kind}: {str(path)!r} is one of the files that are compared.")
        if any(path.resolve() == other.resolve() for name, other in targets.items() if name != kind):
            raise click.UsageError(f"--{kind}: {str(path)!r} is given twice.")


def give(report: DiffReport, given: dict[str, Any], show: Callable[[], None]) -> None:
    """Write what was asked for, and print the report: as JSON, or as ``show`` does."""
    if given["csv"]:
        write_text(given["csv"], report.to_csv())
    if given["html"]:
        report.to_html(given["html"])
    if given["png"]:
        report.to_png(given["png"])
    if given["as_json"]:
        click.echo(report.to_json())
        return
    show()
    for kind in ("html", "png", "csv"):
        if given[kind]:
            click.echo(f"{kind}: {given[kind]}")


def write_text(path: str, text: str) -> None:
    """Write a file, whole or not at all; one that is there is replaced."""
    from mhabridge.checkpoint.storage import atomic

    with atomic.replacing(path, force=True, sync=False) as descriptor, open(descriptor, "wb", closefd=False) as file:
        file.write(text.encode("utf-8", "surrogateescape"))  # a path may be no text


def wants_pictures(given: dict[str, Any]) -> bool:
    """Whether anything drawn was asked for."""
    return bool(given["html"] or given["png"])
