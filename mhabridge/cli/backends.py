"""``mhabridge backends``: list, add, install, remove and check backends."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mhabridge.backends import BackendInfo
    from mhabridge.backends.settings import Entry

as_json = click.option("--json", "json_output", is_flag=True, help="Print JSON.")


@click.group(name="backends", invoke_without_command=True)
@as_json
@click.pass_context
def command(context: click.Context, json_output: bool) -> None:
    r"""List, add, install, remove and check backends.

    \b
    Example: mhabridge backends install megengine
             mhabridge backends add torch@1.8.1 --python ~/old/bin/python
             mhabridge backends doctor
    """
    if context.invoked_subcommand is None:
        context.invoke(list_backends, json_output=json_output)


@command.command("list")
@as_json
@click.option("--probe", is_flag=True, help="Also start the registered ones, which can take seconds.")
def list_backends(json_output: bool, probe: bool = False) -> None:
    """List the backends.

    Example: mhabridge backends list --json
    """
    from mhabridge.backends import backends

    infos = backends(probe=probe)
    if json_output:
        click.echo(json.dumps([info.to_dict() for info in infos], indent=2))
        return
    rows = [(info.name, info.framework, info.version, _place(info), _verdict(info.ok)) for info in infos]
    _print_table(("name", "framework", "version", "where", "ok"), rows, infos)


@command.command()
@click.argument("name")
@click.option("--python", required=True, help="Path of its interpreter, on its host.")
@click.option("--ssh", metavar="HOST", help="Another host, as ssh takes it: host or user@host.")
@click.option("--ssh-args", default="", metavar="ARGS", help="More arguments for ssh, in one word: '-F my_config'.")
@click.option("--framework", help="Whose adapter it uses, when the name does not say it.")
@as_json
def add(name: str, python: str, ssh: str | None, ssh_args: str, framework: str | None, json_output: bool) -> None:
    """Register an interpreter that has a framework and NumPy. It is started once, to see that it works.

    Example: mhabridge backends add torch@1.8.1 --python ~/old/bin/python
    """
    from mhabridge.backends import environments

    entry = environments.add(name, python, ssh=ssh, ssh_args=_words("--ssh-args", ssh_args), framework=framework)
    _print_entry("Added", entry, json_output)


@command.command()
@click.argument("name")
@click.option("--python", help="The interpreter to make the environment with; otherwise one is looked for.")
@click.option("--pip-args", default="", metavar="ARGS", help="More arguments for pip install, in one word.")
@as_json
def install(name: str, python: str | None, pip_args: str, json_output: bool) -> None:
    """Make an environment of its own for a framework, with venv and pip, and register it.

    Example: mhabridge backends install megengine
    """
    from mhabridge.backends import environments

    words = _words("--pip-args", pip_args)
    entry = environments.install(name, python, words, lambda line: click.echo(line, err=True))
    _print_entry("Installed", entry, json_output)


@command.command()
@click.argument("name")
@as_json
def remove(name: str, json_output: bool) -> None:
    """Forget a registered backend, and delete its environment if mhabridge made it.

    Example: mhabridge backends remove torch@1.8.1
    """
    from mhabridge.backends import environments

    _print_entry("Removed", environments.remove(name), json_output)


@command.command()
@as_json
@click.pass_context
def doctor(context: click.Context, json_output: bool) -> None:
    """Run a small known call in each backend, and say what is wrong and how to mend it.

    Exit code 1 when something that is there does not work; a framework that is just not installed is no fault.

    Example: mhabridge backends doctor
    """
    from mhabridge.backends.doctor import examine

    findings = examine()
    if json_output:
        click.echo(json.dumps([finding.to_dict() for finding in findings], indent=2))
    else:
        rows = [
            (
                finding.info.name,
                finding.info.version,
                _place(finding.info),
                _verdict(finding.info.ok),
                "" if finding.error is None else f"{finding.error:.1e}",
            )
            for finding in findings
        ]
        _print_table(("name", "version", "where", "ok", "max error"), rows, [finding.info for finding in findings])
    context.exit(1 if any(finding.needed for finding in findings) else 0)


def _words(option: str, text: str) -> list[str]:
    """What a shell would make of an option's text."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise click.BadParameter(f"{text!r}: {error}", param_hint=option) from None


def _place(info: BackendInfo) -> str:
    return "here" if info.where == "here" else f"{info.python} on {info.host}"


def _verdict(ok: bool) -> str:
    return "yes" if ok else "no"


def _print_entry(done: str, entry: Entry, json_output: bool) -> None:
    import dataclasses

    if json_output:
        click.echo(json.dumps(dataclasses.asdict(entry), indent=2))
    else:
        host = f" on {entry.ssh}" if entry.ssh else ""
        click.echo(f"{done} {entry.name}: {entry.framework} {entry.version or ''} at {entry.python}{host}")


def _print_table(titles: tuple[str, ...], rows: list[tuple[Any, ...]], infos: list[BackendInfo]) -> None:
    """A table, and below it, where there is room for them, the reasons."""
    from mhabridge.cli.tables import Column, print_table

    print_table([Column(title) for title in titles], [["" if c is None else str(c) for c in row] for row in rows])
    for info in infos:
        if info.reason:
            click.echo(f"{info.name}: {info.reason}")
