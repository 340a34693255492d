"""Room on the disk for a file that is about to be written: found missing at once, and taken in few large pieces.

Python's ``os.posix_fallocate`` is not used: where a file system cannot reserve, libc instead writes a byte into every
block, which over a network takes longer than the file itself.
"""

from __future__ import annotations

import ctypes
import errno
import os

_KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE of <linux/falloc.h>: the file does not seem to be longer than it is
_WORTH_IT = 1 << 20  # bytes
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def reserve(descriptor: int, length: int) -> None:
    """Reserve room for a file's first bytes; where the system or the file system cannot, nothing happens.

    Args:
        descriptor: of the file.
        length: at most as many bytes as will be written; what is reserved and not written is lost to others.

    Raises:
        OSError: there is no room.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryFile() as file:
        ...     reserve(file.fileno(), 3 << 20)
        ...     os.fstat(file.fileno()).st_size
        0
    """
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None) if os.name == "posix" else None
    if fallocate is None or length < _WORTH_IT:
        return
    failed = fallocate(descriptor, _KEEP_SIZE, ctypes.c_int64(0), ctypes.c_int64(length))
    if failed and ctypes.get_errno() in _NO_ROOM:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
