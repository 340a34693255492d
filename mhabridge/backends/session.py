"""The private directories of one worker, and the removal of those that nobody needs any more.

A session has one directory in the temporary directory, for what the launcher writes (the child's stderr and the
exit status), and one in memory where the host has a tmpfs; both may hold bulk arrays on their way. The parent and the
launcher each hold a shared lock on them, and the launcher removes them if the parent dies. Should both be killed at the
same moment, a later session finds the directories unlocked and removes them.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

MEMORY = "/dev/shm"
_SETTLE_SECONDS = 60.0  # a directory is locked right after it is made; younger ones are left alone


class Session:
    """Private directories (mode 0700), locked for as long as this process lives or until ``close``."""

    def __init__(self) -> None:
        roots = _roots()
        _remove_leftovers(roots)
        self.places = [tempfile.mkdtemp(prefix=_prefix(), dir=root) for root in roots]
        self.control = self.places[-1]
        self._locks = [_lock(place) for place in self.places]

    @property
    def complete(self) -> bool:
        """Whether all directories are still there: those who tidy temporary files up delete old ones."""
        return all(os.path.isdir(place) for place in self.places)

    def read(self, name: str) -> dict[str, Any] | None:
        """A small JSON file that the launcher wrote; None while there is none."""
        try:
            content: dict[str, Any] = json.loads(Path(self.control, name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return content

    def stderr(self, limit: int = 4000) -> str:
        """The end of the child's stderr, at most ``limit`` bytes of it."""
        kept = b""
        for name in ("stderr.before", "stderr"):
            with contextlib.suppress(OSError):
                kept += Path(self.control, name).read_bytes()
        return kept[-limit:].decode("utf-8", "replace").strip()

    def close(self) -> None:
        """Remove the directories. Arrays that were received stay valid."""
        for place in self.places:
            shutil.rmtree(place, ignore_errors=True)
        while self._locks:
            os.close(self._locks.pop())


def _roots() -> list[str]:
    """Where bulk arrays go: memory first, the temporary directory last."""
    temporary = tempfile.gettempdir()
    usable = os.path.isdir(MEMORY) and os.access(MEMORY, os.W_OK | os.X_OK)
    return [MEMORY, temporary] if usable and not os.path.samefile(MEMORY, temporary) else [temporary]


def _prefix() -> str:
    return f"mhabridge-{os.getuid()}-"


def _lock(place: str) -> int:
    handle = os.open(place, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)
    return handle


def _remove_leftovers(roots: list[str]) -> None:
    for root in roots:
        for place in Path(root).glob(_prefix() + "*"):
            with contextlib.suppress(OSError):
                if time.time() - place.stat().st_mtime > _SETTLE_SECONDS and _is_abandoned(place):
                    shutil.rmtree(place, ignore_errors=True)


def _is_abandoned(place: Path) -> bool:
    if place.stat().st_uid != os.getuid():
        return False
    handle = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True
