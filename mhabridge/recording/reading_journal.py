"""Reads the journal of a recording that is still running or broke off: records one after another, each with a checksum.

The format is that of ``mhabridge.recording.journal``. What comes after the first record that is cut off or whose
checksum is wrong is not read, and that is said; a record that is whole and makes no sense is refused: the file may be
anybody's.
"""

from __future__ import annotations

import dataclasses
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mhabridge.checkpoint.formats import safetensors_header
from mhabridge.checkpoint.storage import checking
from mhabridge.checkpoint.storage.stored import ITEM_SIZES, Extent, StoredFile, StoredTensor
from mhabridge.errors import CheckpointError
from mhabridge.recording.journal import LONGEST_HEADER, MAGIC

NAME = "mhabridge-journal"
_HEAD = struct.Struct("<IQI")
_CHUNK = 1 << 20
_MOST_RECORDS = 2 * checking.MOST_TENSORS


@dataclasses.dataclass(frozen=True)
class _Record:
    """A whole record: its header, and where its payload lies."""

    header: dict[str, Any]
    offset: int
    length: int


def damaged(path: Path, why: str) -> CheckpointError:
    """The error for a file that is no recording, or says impossible things."""
    return checking.damaged(path, why, "a recording made by mhabridge.record")


def read(path: Path) -> tuple[StoredFile, dict[str, Any]]:
    """The tensors of a journal, and what its events say, in the form that a finished recording has it.

    Raises:
        CheckpointError: it is no journal, has not even begun, or a whole record makes no sense.
    """
    tensors: list[StoredTensor] = []
    document = _Document(path)
    with checking.opened(path) as descriptor:
        size = os.fstat(descriptor).st_size
        end = len(MAGIC)
        for count, record in enumerate(_records(path, descriptor, size)):
            if count >= _MOST_RECORDS:
                raise damaged(path, f"more than {_MOST_RECORDS} records")
            if "tensor" in record.header:
                tensors.append(_tensor(path, record))
            else:
                document.add(record)
            end = record.offset + record.length
    if end != size:
        lost = f"the journal breaks off at byte {end} of {size}: what was being written then is lost"
        document.break_off(lost)
    return StoredFile(path, NAME, tensors), document.finished()


def _records(path: Path, descriptor: int, size: int) -> Iterator[_Record]:
    """The whole records up to the first one that is not."""
    position = len(MAGIC)
    while position + _HEAD.size <= size:
        length, payload, crc = _HEAD.unpack(os.pread(descriptor, _HEAD.size, position))
        start = position + _HEAD.size
        if length > LONGEST_HEADER or start + length + payload > size:
            return
        if _crc(descriptor, start, length + payload) != crc:
            return
        yield _Record(_header(path, os.pread(descriptor, length, start)), start + length, payload)
        position = start + length + payload


def _crc(descriptor: int, start: int, length: int) -> int:
    crc = 0
    for offset in range(0, length, _CHUNK):
        crc = zlib.crc32(os.pread(descriptor, min(_CHUNK, length - offset), start + offset), crc)
    return crc


def _header(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = checking.json_of(text, object_pairs_hook=safetensors_header.unique)
    except ValueError as error:
        raise damaged(path, f"a record's header is no JSON: {error!s:.200}") from None
    if not isinstance(header, dict) or not ("tensor" in header or isinstance(header.get("event"), dict)):
        raise damaged(path, "a record is neither a tensor nor an event")
    return header


def _tensor(path: Path, record: _Record) -> StoredTensor:
    name, code, shape = (record.header.get(key) for key in ("tensor", "dtype", "shape"))
    if not isinstance(name, str) or not safetensors_header.is_text(name):
        raise damaged(path, "a tensor's name is no text")
    if not isinstance(code, str) or code not in safetensors_header.DTYPES:
        raise damaged(path, f"{name!r:.200} is of dtype {code!r:.40}")
    if not isinstance(shape, list) or not checking.is_shape(shape):
        raise damaged(path, f"{name!r:.200} has the shape {str(shape)[:80]}")
    dtype = safetensors_header.DTYPES[code]
    if record.length != math.prod(shape) * (ITEM_SIZES[dtype] or 0):
        raise damaged(path, f"{name!r:.200} has {record.length} bytes, which is not what {shape} of {dtype} takes")
    return StoredTensor(name, dtype, tuple(shape), (Extent(0, record.offset, record.length),), name)


class _Document:
    """What the events say, one after another."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start: dict[str, Any] | None = None
        self._layers: dict[str, Any] = {}
        self._calls: dict[Any, dict[str, Any]] = {}
        self._left_out: list[Any] = []
        self._complete = False
        self._ended = False

    def add(self, record: _Record) -> None:
        """One event."""
        event = record.header["event"]
        if len(event) != 1 or record.length:
            raise damaged(self.path, f"an event with the keys {sorted(event)!s:.100} and {record.length} bytes")
        ((kind, content),) = event.items()
        adders: dict[str, tuple[type, Callable[[Any], None]]] = {
            "start": (dict, self._add_start),
            "layer": (dict, self._add_layer),
            "call": (dict, self._add_call),
            "grads": (dict, self._add_grads),
            "left_out": (str, self._left_out.append),
            "end": (dict, self._add_end),
        }
        expected, add = adders.get(kind, (None, None))
        if expected is None or add is None or not isinstance(content, expected):
            raise damaged(self.path, f"an event {kind!r:.60} that is none, or says {content!r:.60}")
        add(content)

    def _add_start(self, content: dict[str, Any]) -> None:
        if self._start is not None:
            raise damaged(self.path, "it starts twice")
        self._start = content

    def _add_layer(self, content: dict[str, Any]) -> None:
        fields = dict(content)
        name = fields.pop("path", None)
        if not isinstance(name, str) or name in self._layers:
            raise damaged(self.path, f"a layer of the path {name!r:.200}, which is none, or there twice")
        self._layers[name] = fields

    def _add_call(self, content: dict[str, Any]) -> None:
        index = content.get("index")
        if type(index) is not int or index in self._calls:
            raise damaged(self.path, f"a call of the index {index!r:.40}, which is none, or there twice")
        self._calls[index] = dict(content)

    def _add_grads(self, content: dict[str, Any]) -> None:
        index = content.get("index")
        call = self._calls.get(index) if type(index) is int else None
        if call is None or not isinstance(content.get("grads"), dict):
            raise damaged(self.path, f"gradients of the call {index!r:.40}, which is not there")
        call["grads"] = {**call.get("grads", {}), **content["grads"]}

    def _add_end(self, content: dict[str, Any]) -> None:
        self._complete, self._ended = content.get("complete") is True, True

    def break_off(self, why: str) -> None:
        """The journal ends in the middle of a record."""
        self._left_out.append(why)
        self._complete, self._ended = False, True

    def finished(self) -> dict[str, Any]:
        """All of it."""
        if self._start is None:
            raise damaged(self.path, "the journal breaks off before anything was recorded")
        if not self._ended:
            self._left_out.append("the journal has no end: the recording still runs, or was killed")
        calls = list(self._calls.values())
        left_out = [*_listed(self._start.get("left_out")), *self._left_out]
        parts = {"layers": self._layers, "calls": calls, "left_out": left_out, "complete": self._complete}
        return {**self._start, **parts}


def _listed(item: Any) -> list[Any]:
    return item if isinstance(item, list) else []
