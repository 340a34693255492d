"""Bytes that a pickle holds as text: written out once, so that they can be read like the rest.

Protocols 0 to 2 have no bytes. An array's numbers are then a text in which every character is one byte, which makes
half of them two bytes long in the file.
"""

from __future__ import annotations

import codecs
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mhabridge.checkpoint.pickled.inert import Slice
from mhabridge.checkpoint.storage.stored import Extent
from mhabridge.errors import CheckpointError

PIECE = 256 * 1024


class Spill:
    """A temporary file of decoded bytes; made when the first are added.

    Args:
        descriptor: the checkpoint's file.
        path: of the checkpoint, for messages.
        number: how ``StoredFile.files`` will count the temporary file.

    Use it in a ``with`` statement, and open ``files`` before that ends: the file's name is gone afterwards.
    """

    def __init__(self, descriptor: int, path: Path, number: int = 1) -> None:
        self._source, self._path, self._number = descriptor, path, number
        self._file: Path | None = None
        self._target, self._size = -1, 0

    def __enter__(self) -> Spill:
        return self

    def __exit__(self, *_: object) -> None:
        if self._target >= 0:
            os.close(self._target)
            self._target = -1
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    @property
    def files(self) -> tuple[Path, ...]:
        """The checkpoint, and the temporary file if there is one."""
        return (self._path,) if self._file is None else (self._path, self._file)

    def add(self, text: str | Slice, encoding: str) -> Extent:
        """Writes a text out in a one-byte encoding.

        Args:
            text: as the pickle holds it.
            encoding: that turns each character into the byte it stands for.

        Raises:
            CheckpointError: some character stands for no byte.
        """
        start = self._size
        try:
            for piece in self._pieces(text):
                self._write(piece.encode(encoding))
        except UnicodeError as error:
            raise CheckpointError(
                str(self._path),
                given=f"an array whose bytes are written as a text that is none ({error.reason})",  # type: ignore[attr-defined]
                expected="one byte in each character",
                advice="The file is damaged: copy or download it again.",
            ) from error
        except OSError as error:
            raise CheckpointError(
                str(self._path),
                given=f"an array that cannot be written out ({error.strerror})",
                expected=f"room for it in {tempfile.gettempdir()}",
                advice="Free some space, or name another folder in TMPDIR.",
            ) from error
        return Extent(self._number, start, self._size - start)

    def _pieces(self, text: str | Slice) -> Iterator[str]:
        if isinstance(text, str):
            yield text
            return
        decoder = codecs.getincrementaldecoder(text.encoding)()
        for at in range(0, text.length, PIECE):
            yield decoder.decode(os.pread(self._source, min(PIECE, text.length - at), text.offset + at))
        yield decoder.decode(b"", final=True)

    def _write(self, data: bytes) -> None:
        if self._target < 0:
            self._target, name = tempfile.mkstemp(prefix="mhabridge-")
            self._file = Path(name)
        left = memoryview(data)
        while left:
            left = left[os.write(self._target, left) :]
        self._size += len(data)
