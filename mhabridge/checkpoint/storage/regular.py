"""Opening regular files only, without waiting: whatever was a file a moment ago may be a pipe now."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from mhabridge.errors import CheckpointError


def open_regular(path: Path) -> int:
    """The descriptor of a regular file; whoever asks has to close it.

    Raises:
        CheckpointError: it is missing, a folder, a pipe, or cannot be opened.
    """
    try:
        # A pipe without a writer would make a blocking open wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, ValueError) as error:  # ValueError: NUL in the path
        raise CheckpointError(
            str(path), given=_found(error), expected="a checkpoint file", advice="Check the path."
        ) from error
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise CheckpointError(
        str(path),
        given="a folder" if path.is_dir() else "no regular file",
        expected="a checkpoint file",
        advice="Check the path.",
    )


def _found(error: OSError | ValueError) -> str:
    if isinstance(error, OSError):
        return "nothing there" if isinstance(error, FileNotFoundError) else str(error.strerror)
    return str(error)
