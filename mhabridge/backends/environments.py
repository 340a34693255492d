"""Makes and removes the isolated environments of backends: venv and pip, with the pins that mappings/ holds."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mhabridge import mapping
from mhabridge.backends import interpreters, settings
from mhabridge.backends.registry import end_worker
from mhabridge.backends.settings import Entry
from mhabridge.backends.worker import Worker
from mhabridge.errors import ArgumentError, BackendError

_SHOWN_CHARACTERS = 3000


def add(
    name: str,
    python: str,
    *,
    ssh: str | None = None,
    ssh_args: Sequence[str] = (),
    framework: str | None = None,
    installed: bool = False,
) -> Entry:
    """Register an interpreter as a backend, once its worker has started and told its framework's version.

    Args:
        name: "megengine", "torch@1.8.1"; any other name with ``framework``.
        python: path of its interpreter, on its host.
        ssh: "host" or "user@host"; None for this host.
        ssh_args: more arguments for ssh.
        framework: whose adapter it uses; None when the name says it.
        installed: its environment is ours.

    Raises:
        BackendError: it does not start, or has another version than the name says, or the settings cannot be written.
            Nothing is registered then.
        ArgumentError: an argument is wrong.
    """
    base, version = mapping.parse_name(name)
    if ssh is None:
        python = os.path.abspath(os.path.expanduser(python))  # links stay: a virtual environment is known by its own
    entry = Entry(name, framework or _framework_of(base), python, ssh, tuple(ssh_args), installed=installed)
    found = _check(entry)
    if version and version != found.partition("+")[0]:
        raise BackendError(f"backend {name!r}", given=f"version {found} at {python}", expected=f"version {version}")
    entry = Entry(**{**vars(entry), "version": found})
    settings.register(entry)
    end_worker(name)  # one that runs the framework that was there before
    return entry


def install(
    name: str,
    python: str | None = None,
    pip_args: Sequence[str] = (),
    progress: Callable[[str], None] | None = None,
) -> Entry:
    """Make an environment under ``$MHABRIDGE_HOME/environments``, check that it works, and register it.

    Args:
        name: a framework, or framework@version; mappings/ says which versions are known.
        python: path of the interpreter to use; None to look for one.
        pip_args: more arguments for ``pip install``, such as ("--index-url", "https://...").
        progress: called with a line for each step.

    Raises:
        BackendError: no interpreter, pip failed, or the framework does not work. Nothing is left behind.
        ArgumentError: that framework or version is not known.
    """
    settings.check_name(name)
    plan = plan_for(name)
    base = os.path.abspath(python) if python else interpreters.find(plan["python"])
    version = interpreters.answers(base)
    if version not in plan["python"]:
        raise BackendError(
            "python",
            given=f"{base}: " + (f"Python {version}" if version else "it does not start, or has no venv"),
            expected="Python " + " or ".join(plan["python"]),
        )
    folder = _folder(name)
    with settings.locked(folder.with_name(f".{name}.lock")):
        _forget(name)  # from here on it would be half an environment
        try:
            return _make(name, base, folder, plan["requirements"], pip_args, progress or (lambda line: None))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _make(
    name: str,
    base: str,
    folder: Path,
    requirements: list[str],
    pip_args: Sequence[str],
    progress: Callable[[str], None],
) -> Entry:
    progress(f"Making an environment with {base} in {folder}")
    _run([base, "-I", "-m", "venv", str(folder)], "venv")
    python = str(folder / "bin" / "python")
    progress("Installing " + " ".join(requirements))
    _run(
        [python, "-I", "-m", "pip", "install", "--disable-pip-version-check", *pip_args, *requirements],
        "pip",
    )
    progress("Starting it")
    return add(name, python, installed=True)


def _forget(name: str) -> None:
    """Remove what an earlier install of this name left, finished or not."""
    entry = settings.find(name)
    if entry and entry.installed:
        settings.unregister(name)
    end_worker(name)
    shutil.rmtree(_folder(name), ignore_errors=True)


def _folder(name: str) -> Path:
    return settings.home() / "environments" / name


def remove(name: str) -> Entry:
    """Forget a backend, and delete its environment if it was made by ``install``.

    Raises:
        BackendError: there is none of that name.
    """
    entry = settings.unregister(name)
    end_worker(name)
    if entry.installed:
        shutil.rmtree(_folder(name), ignore_errors=True)
    return entry


def plan_for(name: str) -> dict[str, Any]:
    """The environment that mappings/ describes for a framework, or framework@version.

    Raises:
        ArgumentError: none; it lists those that there are.

    Example:
        >>> plan_for("megengine")["python"]
        ['3.10', '3.9', '3.8']
    """
    base, version = mapping.parse_name(name)
    plans: list[dict[str, Any]] = mapping.table(_framework_of(base))["framework"].get("environments", [])
    for plan in plans:
        if version in (None, plan["version"]):
            return plan
    known = ", ".join(f"{base}@{plan['version']}" for plan in plans) or "none"
    raise ArgumentError(
        "name",
        given=repr(name),
        expected=f"one of the environments known: {known}",
        advice="Make an environment yourself, and register it with: mhabridge backends add NAME --python PATH",
    )


def _framework_of(base: str) -> str:
    if base in (*mapping.FRAMEWORKS, mapping.REFERENCE):
        return base
    known = ", ".join((*mapping.FRAMEWORKS, mapping.REFERENCE))
    raise ArgumentError("name", given=repr(base), expected=f"one of {known}", advice="Or say which with --framework.")


def _check(entry: Entry) -> str:
    """The framework's version, told by a worker."""
    worker = Worker(entry.python, entry.framework, ssh=entry.ssh, ssh_args=entry.ssh_args)
    try:
        return str(worker.describe()["version"])
    finally:
        worker.close()


def _run(command: list[str], what: str) -> None:
    """Run a step to its end; an error carries the end of what it printed. Its environment is that of the user."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL
        )
    except OSError as error:
        raise BackendError(what, given=str(error), expected="that it runs") from None
    if done.returncode:
        raise BackendError(
            what,
            given=f"exit status {done.returncode} from {Path(command[0])}",
            expected="that it succeeds",
            advice=f"It said:\n{done.stdout[-_SHOWN_CHARACTERS:].strip()}",
        )
