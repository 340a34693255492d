"""Finds a Python interpreter of a given version that really answers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from mhabridge.errors import BackendError

ANSWER_SECONDS = 20.0


def find(versions: Sequence[str]) -> str:
    """The path of an interpreter of one of these versions, the first version preferred.

    Looks at this interpreter, on PATH, in pyenv's versions folder and among uv's managed ones, and runs what it finds:
    a pyenv shim named python3.10 can exist and yet fail.

    Raises:
        BackendError: there is none; it says what to install.

    Example:
        >>> import sys
        >>> find([f"{sys.version_info.major}.{sys.version_info.minor}"]) == sys.executable
        True
    """
    for version in versions:
        for candidate in _candidates(version):
            if answers(candidate) == version:
                return candidate
    raise BackendError(
        "python",
        given=f"no working Python {' or '.join(versions)} on PATH, in pyenv's versions or among uv's",
        expected=f"Python {versions[0]}",
        advice=f"Install one (pyenv install {versions[0]}; uv python install {versions[0]}; or your system's "
        f"python{versions[0]} with its venv package), or give its path with --python.",
    )


def answers(python: str) -> str | None:
    """The version ("3.10") of an interpreter that has venv and pip's bootstrap; None if it does not answer.

    Example:
        >>> answers("/nonexistent/python") is None
        True
    """
    code = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run(
            [python, "-I", "-c", code], capture_output=True, text=True, timeout=ANSWER_SECONDS, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _candidates(version: str) -> Iterator[str]:
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        yield sys.executable
    name = f"python{version}"
    for directory in os.get_exec_path():
        found = shutil.which(name, path=directory)
        if found:
            yield os.path.abspath(found)
    for root, pattern in _roots(version):
        for folder in sorted(root.glob(pattern), reverse=True):
            if (folder / "bin" / name).exists():
                yield str(folder / "bin" / name)


def _roots(version: str) -> Iterator[tuple[Path, str]]:
    yield Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions", f"{version}.*"
    data = Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser()
    yield Path(os.environ.get("UV_PYTHON_INSTALL_DIR") or data / "uv" / "python"), f"*-{version}.*"
