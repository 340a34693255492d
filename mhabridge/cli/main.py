"""``mhabridge``: the group of commands, each loaded only when it is used.

Exit codes: 0 yes, 1 a difference or a loss was found, 2 it could not be done.
"""

from __future__ import annotations

import importlib
import sys

try:
    import click
except ImportError:  # pragma: no cover - proved by a test in a clean environment
    print(
        "mhabridge: the command line needs click and rich. Install them with: pip install 'mhabridge[cli]'",
        file=sys.stderr,
    )
    sys.exit(2)

from mhabridge import __version__
from mhabridge.errors import MHABridgeError

# name -> (module with a click command called `command`, its line in --help)
COMMANDS = {
    "backends": ("mhabridge.cli.backends", "List, add, install, remove and check backends."),
    "diff": ("mhabridge.cli.diff", "Run the same layer on several backends and judge the difference."),
    "mapping": ("mhabridge.cli.mapping", "Show how one dialect's arguments differ from another's."),
}


class LazyGroup(click.Group):
    """A group that imports a command's module only when that command is run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands' names, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(COMMANDS[cmd_name][0]).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands in --help, from the table."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mhabridge")
def cli() -> None:
    """Move multi-head attention between frameworks, and prove that it arrived.

    Example: mhabridge diff --backends torch,mindspore --embed-dim 64 --num-heads 8
    """


def main() -> None:
    """Run the command line; an error of ours is one message and exit code 2, never a traceback."""
    try:
        cli(prog_name="mhabridge")
    except MHABridgeError as error:
        click.echo(f"mhabridge: {error}", err=True)
        sys.exit(2)
