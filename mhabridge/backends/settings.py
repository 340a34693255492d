"""The settings folder, ``$MHABRIDGE_HOME``, and the file of registered backends in it, ``backends.json``."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mhabridge import mapping
from mhabridge.errors import ArgumentError, BackendError

FORMAT = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(@[A-Za-z0-9][A-Za-z0-9._+-]*)?")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One registered backend.

    Args:
        name: such as "megengine" or "torch@1.8.1".
        framework: whose adapter it uses.
        python: absolute path of the interpreter on its host.
        ssh: "host" or "user@host"; None for this host.
        ssh_args: more arguments for ssh.
        version: the framework's version when it was registered.
        installed: its environment was made by ``environments.install``.
    """

    name: str
    framework: str
    python: str
    ssh: str | None = None
    ssh_args: tuple[str, ...] = ()
    version: str | None = None
    installed: bool = False

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.framework not in (*mapping.FRAMEWORKS, mapping.REFERENCE):
            known = ", ".join((*mapping.FRAMEWORKS, mapping.REFERENCE))
            raise ArgumentError("framework", given=repr(self.framework), expected=f"one of {known}")
        _check_meaning(self.name, self.framework)
        if not os.path.isabs(self.python):
            raise ArgumentError("python", given=repr(self.python), expected="an absolute path")
        if self.ssh is not None and not re.match(r"[^-\s][^\s]*$", self.ssh):
            raise ArgumentError("ssh", given=repr(self.ssh), expected="host or user@host")


def check_name(name: str) -> None:
    """Names are also folder names, and the reference's plain name is taken by the judge in this process.

    Raises:
        ArgumentError: it is not a plain name, or name@version, or it is taken.
    """
    if name == mapping.REFERENCE:
        raise ArgumentError(
            "name",
            given=repr(name),
            expected="another name",
            advice="That is the reference in this process, which judges all others.",
        )
    if not _NAME.fullmatch(name):
        raise ArgumentError(
            "name",
            given=repr(name),
            expected="letters, digits, dots, underscores and hyphens, and perhaps @version",
            advice="For example torch@1.8.1.",
        )


def _check_meaning(name: str, framework: str) -> None:
    """A framework's name means that framework."""
    base = name.partition("@")[0]
    if base in (*mapping.FRAMEWORKS, mapping.REFERENCE) and base != framework:
        raise ArgumentError(
            "name",
            given=f"{name!r} for the framework {framework}",
            expected=f"a name that does not mean {base}",
            advice=f"For example {framework}-{base}.",
        )


def home() -> Path:
    """``$MHABRIDGE_HOME``, or else ``mhabridge`` in ``$XDG_DATA_HOME`` or ~/.local/share."""
    chosen = os.environ.get("MHABRIDGE_HOME")
    if chosen:
        return Path(chosen).expanduser().absolute()
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(data).expanduser().absolute() / "mhabridge"


def entries() -> list[Entry]:
    """The registered backends, in the order in which they were added.

    Raises:
        BackendError: the file is damaged.
    """
    path = _file()
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(path, str(error)) from None
    try:
        content = json.loads(text)
        if not isinstance(content, dict) or content.get("format") != FORMAT or set(content) != {"format", "backends"}:
            raise ValueError(f"it is not a file of format {FORMAT}")
        found = [_entry(fields) for fields in content["backends"]]
        if len({entry.name for entry in found}) != len(found):
            raise ValueError("a name occurs twice")
    except RecursionError:
        raise _damaged(path, "values nested too deeply") from None
    except (ValueError, TypeError, KeyError) as error:
        raise _damaged(path, str(error)) from None
    return found


def register(entry: Entry) -> None:
    """Add an entry, or replace the one of that name."""
    _change(lambda known: [other for other in known if other.name != entry.name] + [entry])


def unregister(name: str) -> Entry:
    """Remove an entry and return it.

    Raises:
        BackendError: there is none of that name.
    """
    found = find(name)
    if found is None:
        names = ", ".join(entry.name for entry in entries()) or "none"
        raise BackendError(f"backend {name!r}", given="no such registered backend", expected=f"one of: {names}")
    _change(lambda known: [other for other in known if other.name != name])
    return found


def find(name: str) -> Entry | None:
    """The entry of that name."""
    return next((entry for entry in entries() if entry.name == name), None)


def _entry(fields: Any) -> Entry:
    known = {field.name: field for field in dataclasses.fields(Entry)}
    if not isinstance(fields, dict) or not set(fields) <= set(known):
        raise ValueError(f"not an entry: {fields!r}")
    arguments = fields.get("ssh_args", [])
    texts = [fields.get(name) for name in ("name", "framework", "python")]
    optional = [fields[name] for name in ("ssh", "version") if fields.get(name) is not None]
    if not isinstance(arguments, list) or not all(isinstance(text, str) for text in (*texts, *optional, *arguments)):
        raise ValueError(f"not an entry: {fields!r}")
    if not isinstance(fields.get("installed", False), bool):
        raise ValueError(f"not an entry: {fields!r}")
    return Entry(**{**fields, "ssh_args": tuple(arguments)})


def _change(change: Callable[[list[Entry]], list[Entry]]) -> None:
    """Read, change and replace the file, all of it or nothing; others who do the same wait."""
    path = _file()
    with locked(path.with_suffix(".lock")):
        changed = [dataclasses.asdict(entry) for entry in change(entries())]
        with _writable():
            _replace(path, json.dumps({"format": FORMAT, "backends": changed}, indent=2) + "\n")


def _replace(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(prefix=".backends-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file's lock; whoever else wants it waits.

    Raises:
        BackendError: the settings folder cannot be written.
    """
    with _writable():
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w", encoding="utf-8")  # noqa: SIM115  # closed below, outside of what can fail here
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _writable() -> Iterator[None]:
    """An error of the file system as one of ours, which names the folder."""
    try:
        yield
    except OSError as error:
        raise BackendError(
            str(home()),
            given=str(error),
            expected="a folder for settings and environments that can be written",
            advice="Set MHABRIDGE_HOME to another one.",
        ) from None


def _file() -> Path:
    return home() / "backends.json"


def _damaged(path: Path, problem: str) -> BackendError:
    return BackendError(
        str(path),
        given=problem,
        expected="the list of registered backends, as mhabridge writes it",
        advice="Repair it, or delete it and add the backends again.",
    )
