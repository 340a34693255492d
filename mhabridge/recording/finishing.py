"""Makes the safetensors file of a journal: streamed, so that it takes no memory, and whole or not there at all.

Also part of the record kit (Python 3.8, the standard library and NumPy).
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from mhabridge.checkpoint.storage.atomic import replacing
from mhabridge.recording.contents import METADATA_KEY, Contents, of_journal
from mhabridge.recording.journal import ITEM_SIZES

if TYPE_CHECKING:
    from pathlib import Path

_PIECE = 1 << 20
_RANKS = {code: rank for rank, code in enumerate(ITEM_SIZES)}


def finish(journal: Path, path: Path, overwrite: bool = False) -> dict[str, Any]:
    """Write the file of a journal, and remove the journal.

    Returns:
        The recording's metadata, with ``left_out``.

    Raises:
        CheckpointError: the target exists, or there is no room for it; the journal is still there then.
        OSError: something else went wrong with the files.
    """
    with open(journal, "rb") as file:
        contents = of_journal(file)
        with replacing(path, force=overwrite) as descriptor:
            _write(contents, descriptor)
    os.unlink(journal)
    return contents.metadata


def _write(contents: Contents, descriptor: int) -> None:
    # Large elements first: then all are aligned, whatever their number.
    names = sorted(contents.tensors, key=lambda name: _RANKS[contents.tensors[name].code])
    header: dict[str, Any] = {"__metadata__": {METADATA_KEY: json.dumps(contents.metadata, separators=(",", ":"))}}
    position = 0
    for name in names:
        place = contents.tensors[name]
        offsets = [position, position + place.length]
        header[name] = {"dtype": place.code, "shape": list(place.shape), "data_offsets": offsets}
        position += place.length
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    _write_all(descriptor, len(text).to_bytes(8, "little") + text)
    for name in names:
        _copy(contents, name, descriptor)


def _copy(contents: Contents, name: str, descriptor: int) -> None:
    place = contents.tensors[name]
    contents.file.seek(place.offset)
    left = place.length
    while left:
        piece = contents.file.read(min(left, _PIECE))
        if not piece:
            raise OSError(f"{name}: the journal ended while it was read")
        _write_all(descriptor, piece)
        left -= len(piece)


def _write_all(descriptor: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]
