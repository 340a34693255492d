"""What a recording holds, read from its journal or its file: the metadata, and where each tensor lies.

This is for files that this user has just recorded: to finish one, and to take inputs from one. What compares
recordings of others reads them with ``mhabridge.recording.reading``, which believes nothing.

Also part of the record kit (Python 3.8, NumPy only).
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from mhabridge.errors import CheckpointError
from mhabridge.recording.journal import ITEM_SIZES, MAGIC, scan

if TYPE_CHECKING:
    import os

# 2: every call says which parameters are no longer what they were at the one before; a 1 cannot tell.
FORMAT = 2
FORMATS = (1, 2)
METADATA_KEY = "mhabridge.recording"
_LONGEST = 100_000_000  # bytes of a safetensors header, as its own library has it

_NUMPY = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "C64": "<c8",
    "BOOL": "?",
    **{f"I{bits}": f"<i{bits // 8}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"<u{bits // 8}" for bits in (8, 16, 32, 64)},
}
CODES = {np.dtype(kind).name: code for code, kind in _NUMPY.items() if code != "BF16"}
CODES["bfloat16"] = "BF16"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor lies in a file: its safetensors code, its shape, and its bytes."""

    code: str
    shape: tuple[int, ...]
    offset: int
    length: int


@dataclasses.dataclass
class Contents:
    """A recording's metadata (with ``layers``, ``calls``, ``left_out`` and ``complete``) and its tensors' places."""

    metadata: dict[str, Any]
    tensors: dict[str, Place]
    file: BinaryIO

    def read(self, name: str) -> np.ndarray:
        """A tensor's values; bfloat16 as float32, which holds it exactly."""
        place = self.tensors[name]
        self.file.seek(place.offset)
        data = np.frombuffer(bytearray(self.file.read(place.length)), _NUMPY[place.code]).reshape(place.shape)
        if place.code != "BF16":
            return data
        return (data.astype("<u4") << np.uint32(16)).view("<f4")

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def open_contents(path: str | os.PathLike[str]) -> Contents:
    """What a recording holds: a finished one, or a journal.

    Raises:
        CheckpointError: there is no such file, or it is neither.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 - the contents are read from it later
    except OSError as error:
        raise CheckpointError(str(path), given=str(error.strerror), expected="a recording") from error
    try:
        return of_journal(file) if file.read(len(MAGIC)) == MAGIC else _of_safetensors(file)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, CheckpointError) as error:
        file.close()
        raise CheckpointError(
            str(path), given=f"what is no recording ({error})", expected="a file that mb.record made"
        ) from error


def of_journal(file: BinaryIO) -> Contents:
    """What a journal says, up to its end or to where it broke off."""
    gathered = _Gathered()
    records = scan(file)
    for record in records:
        header = record.header
        if "tensor" in header:
            place = Place(header["dtype"], tuple(header["shape"]), record.offset, record.length)
            if place.length != math.prod(place.shape) * ITEM_SIZES[place.code]:
                raise CheckpointError(header["tensor"], given=f"{place.length} bytes", expected="those of its shape")
            gathered.tensors[header["tensor"]] = place
        else:
            gathered.event(header["event"])
    return Contents(gathered.metadata(records.broken), gathered.tensors, file)


class _Gathered:
    """The events of a journal, put together."""

    def __init__(self) -> None:
        self.tensors: dict[str, Place] = {}
        self.start: dict[str, Any] = {}
        self.layers: dict[str, Any] = {}
        self.calls: dict[int, dict[str, Any]] = {}
        self.grads: dict[int, dict[str, Any]] = {}
        self.left_out: list[str] = []
        self.complete: bool | None = None

    def event(self, event: dict[str, Any]) -> None:
        ((kind, what),) = event.items()
        if kind == "start":
            self.start = what
        elif kind == "layer":
            self.layers[what["path"]] = {name: item for name, item in what.items() if name != "path"}
        elif kind == "call":
            self.calls[what["index"]] = what
        elif kind == "grads":
            self.grads.setdefault(what["index"], {}).update(what["grads"])
        elif kind == "left_out":
            self.left_out.append(what)
        elif kind == "end":
            self.complete = bool(what["complete"])

    def metadata(self, broken: str) -> dict[str, Any]:
        left_out = list(self.left_out)
        calls = [self._with_grads(call, self.grads.get(index, {})) for index, call in self.calls.items()]
        if broken or self.complete is None:
            left_out.append(f"the end: {broken or 'the recording was not ended'}; what came after that is not here")
        return {
            **self.start,
            "complete": bool(self.complete) and not broken,
            "left_out": left_out,
            "layers": self.layers,
            "calls": calls,
        }

    def _with_grads(self, call: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
        grads = {**call.get("grads", {}), **found}
        # What was to have the gradient of another argument has none when no backward came there.
        grads = {name: entry for name, entry in grads.items() if entry.get("same_as", name) in grads}
        rest = {name: item for name, item in call.items() if name != "grads"}
        return {**rest, "grads": grads} if grads else rest


def _of_safetensors(file: BinaryIO) -> Contents:
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > _LONGEST:
        raise ValueError("its header is too long")
    header = json.loads(file.read(length))
    metadata = json.loads(header.pop("__metadata__", {})[METADATA_KEY])
    if metadata["format"] not in FORMATS:
        raise ValueError(f"format {metadata['format']}, made by a newer version")
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = Place(entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)
    return Contents(metadata, tensors, file)
