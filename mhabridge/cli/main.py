"""``mhabridge``: the group of commands, each loaded only when it is used.

Exit codes: 0 yes, 1 a difference or a loss was found, 2 it could not be done; as other tools have it, 130 after
Ctrl-C and 141 when the output's reader went away. With ``MHABRIDGE_TRACEBACK=1`` an error shows where it comes from.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Iterator

try:
    import click
except ImportError:  # pragma: no cover - proved by a test in a clean environment
    print(
        "mhabridge: the command line needs click and rich. Install them with: pip install 'mhabridge[cli]'",
        file=sys.stderr,
    )
    sys.exit(2)

from mhabridge import __version__
from mhabridge.cli.lazy import LazyGroup
from mhabridge.errors import BackendError, MHABridgeError, from_dict

TRACEBACK = "MHABRIDGE_TRACEBACK"
_LINES = "\n\t"  # a worker's own words may have several
COMPLETION = "_MHABRIDGE_COMPLETE"
COMMANDS = {
    "backends": ("mhabridge.cli.backends", "List, add, install, remove and check backends."),
    "diff": ("mhabridge.cli.diff", "Judge the difference between backends, checkpoints or recorded runs."),
    "record-kit": ("mhabridge.cli.record_kit", "Write the one file that records a run where nothing can be installed."),
    "convert": ("mhabridge.cli.convert", "Convert checkpoints to another format or framework, and prove it."),
    "inspect": ("mhabridge.cli.inspect", "Show what is in a checkpoint."),
    "fingerprint": ("mhabridge.cli.fingerprint", "Print hashes that are equal for equal weights in any layout."),
    "mapping": ("mhabridge.cli.mapping", "Show how one dialect's arguments differ from another's."),
}


@click.group(cls=LazyGroup, table=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mhabridge")
def cli() -> None:
    """Move multi-head attention between frameworks, and prove that it arrived.

    Exit codes: 0 yes, 1 a difference or a loss was found, 2 it could not be done.

    Example: mhabridge diff --backends torch,mindspore --embed-dim 64 --num-heads 8
    """


def main() -> None:
    """Run the command line; whatever goes wrong is a message and exit code 2, or that of a signal, never 1."""
    try:
        code = _invoke()
    except BaseException as error:
        code = explain(error)
    _flush()
    sys.exit(code)


def _invoke() -> int:
    """The command's exit code.

    Not through ``cli.main``: click's own handling of Ctrl-C and of a closed pipe exits with 1.
    """
    try:
        if COMPLETION in os.environ:  # a shell asks what could be typed here
            cli.main(prog_name="mhabridge")
        with cli.make_context("mhabridge", sys.argv[1:]) as context:
            cli.invoke(context)
    except click.exceptions.Exit as done:
        code = done.exit_code
    except SystemExit as done:
        if isinstance(done.__context__, BrokenPipeError):  # rich exits with 1 on a closed pipe
            raise done.__context__ from None
        if not isinstance(done.code, (int, type(None))):
            raise
        code = done.code or 0
    else:
        code = 0
    if sys.stdout:
        sys.stdout.flush()  # a full disk shows here at the latest
    return code


def explain(error: BaseException, code: int = 2) -> int:
    """Say what went wrong, on stderr, and give the exit code: that of a signal, or the given one."""
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return 128 + signal.SIGINT
    if isinstance(error, BrokenPipeError):  # who reads the output has seen enough
        return 128 + signal.SIGPIPE
    with contextlib.suppress(OSError):
        if os.environ.get(TRACEBACK):
            traceback.print_exception(error)
        if isinstance(error, click.ClickException):
            error.show()
        else:
            from mhabridge.cli.tables import printable

            # Only a worker's words have lines of their own: elsewhere they are a part of somebody's file or name.
            keep = _LINES if isinstance(error, BackendError) else ""
            click.echo(f"mhabridge: {printable(_message(error), keep=keep)}", err=True)
    return code


@contextlib.contextmanager
def about(file: str) -> Iterator[None]:
    """Have errors name the file that they are about, where there are several.

    Example:
        >>> with about("b.pkl"):
        ...     raise BackendError("a worker", given="nothing")
        Traceback (most recent call last):
        mhabridge.errors.BackendError: b.pkl: a worker: given nothing
    """
    try:
        yield
    except MHABridgeError as error:
        if file in str(error):
            raise
        raise from_dict({**error.to_dict(), "subject": f"{file}: {error.subject}"}) from error


def _message(error: BaseException) -> str:
    if isinstance(error, (MHABridgeError, OSError)):
        return str(error)
    if isinstance(error, MemoryError):
        return f"there is not enough memory. {error}".rstrip()
    text = " ".join(str(error).split())
    return (
        f"this is a bug in mhabridge: {type(error).__name__}: {text:.500}. "
        f"Set {TRACEBACK}=1 to see where, and please report it."
    )


def _flush() -> None:
    """Python flushes again at exit, and fails with a code of its own: what cannot be written stays unsaid."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
