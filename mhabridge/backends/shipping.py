"""What a worker is started with: our modules' sources, and the command line that brings the launcher in between."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import shlex
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Every module that may run in a worker; a framework's own adapter comes on top. All work on Python 3.8 and NumPy 1.23.
WORKER_MODULES = (
    "mhabridge",
    "mhabridge.adapters",
    "mhabridge.backends",
    "mhabridge.backends.line",
    "mhabridge.backends.service",
    "mhabridge.backends.wire",
    "mhabridge.arguments",
    "mhabridge.binding",
    "mhabridge.callable_module",
    "mhabridge.calls",
    "mhabridge.checks",
    "mhabridge.composed",
    "mhabridge.initial",
    "mhabridge.live",
    "mhabridge.dialects",
    "mhabridge.dropin",
    "mhabridge.dtypes",
    "mhabridge.envelope",
    "mhabridge.errors",
    "mhabridge.layouts",
    "mhabridge.lowering",
    "mhabridge.mapping",
    "mhabridge.masks",
    "mhabridge.native",
    "mhabridge.packing",
    "mhabridge.rearrange",
    "mhabridge.reference",
    "mhabridge.signatures",
    "mhabridge.spec",
    "mhabridge.state",
    "mhabridge.transformer",
    "mhabridge.transformer_reading",
    "mhabridge.transformer_weights",
    "mhabridge.weights",
)
# No password prompts; a host that is down, or goes down, is noticed in bounded time.
_SSH = ("ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=10")


def sources(framework: str) -> dict[str, str]:
    """The sources of all modules that a worker for this framework gets, by name."""
    return {**{name: source(name) for name in WORKER_MODULES}, **_adapter(f"mhabridge.adapters.{framework}")}


def source(name: str) -> str:
    """A module's source; the module itself is not imported.

    Example:
        >>> source("mhabridge.backends.launcher").splitlines()[0][:14]
        '\"\"\"Starts a wo'
    """
    return _file(name).read_text(encoding="utf-8")


def _file(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"no source for {name}", name=name)
    return Path(spec.origin)


def _adapter(name: str) -> dict[str, str]:
    """An adapter's modules: itself and, if it is a package, those in it.

    They are read from its folder: to look a module up by name imports its package, and so the framework.
    """
    file = _file(name)
    found = {name: file.read_text(encoding="utf-8")}
    if file.name == "__init__.py":
        paths = sorted(path for path in file.parent.glob("*.py") if path != file)
        found.update({f"{name}.{path.stem}": path.read_text(encoding="utf-8") for path in paths})
    return found


def launcher_command(
    python: str, ssh: str | None, ssh_args: Sequence[str], control: str, directories: list[str], echo: bool
) -> str:
    """The command that starts a launcher here, which starts the interpreter or, for another host, ssh.

    execnet splits it as a shell would and appends its own arguments (``-u -c ...``), which the launcher passes on.
    """
    options: dict[str, Any] = {"control": control, "directories": directories, "echo": echo, "parent": os.getpid()}
    if ssh:
        options.update(command=[*_SSH, *ssh_args, ssh, _remote_launcher(python)], through_shell=True)
    else:
        options.update(command=[python, "-I"], through_shell=False)
    return shlex.join([sys.executable, "-I", "-S", "-c", _launcher_code(), json.dumps(options)])


def _remote_launcher(python: str) -> str:
    options: dict[str, Any] = {"control": None, "directories": [], "echo": False, "parent": None}
    options.update(command=[python, "-I"], through_shell=False)
    return shlex.join([python, "-I", "-S", "-c", _launcher_code(), json.dumps(options)])


def _launcher_code() -> str:
    """The launcher as one line without quotes or line ends that some login shell would treat specially."""
    packed = base64.b64encode(zlib.compress(source("mhabridge.backends.launcher").encode())).decode()
    return f"import base64, zlib; exec(zlib.decompress(base64.b64decode({packed!r})))"
