"""What is written into a journal, and within which bounds: tensors up to a limit, and what was left out by name.

A value that cannot be kept is left out with the reason. What the file system refuses is an OSError here; the recorder
ends the recording with it, not the model's run.

Also part of the record kit (Python 3.8, NumPy only).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import threading
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from mhabridge.recording.contents import CODES
from mhabridge.recording.journal import ITEM_SIZES, Journal

if TYPE_CHECKING:
    from pathlib import Path

# All readers of safetensors refuse a header of more than 100 MB, and some one with more entries.
MOST_TENSORS = 100_000
MOST_TEXT = 32 << 20  # characters of JSON
NOT_WANTED = "attn_weights=False"  # why attention weights were left out that were there
_MOST_LINES = 5_000
_MOST_NESTED = 8


class Ledger:
    """The open journal of one recording.

    Args:
        path: the journal, which does not exist yet.
        adapter: the recording module of the model's framework.
        limit: bytes of tensors.

    Attributes:
        left_out: the lines that say what was left out.
        failure: what ended the recording too early; None as long as it goes on.
    """

    def __init__(self, path: Path, adapter: Any, limit: int) -> None:
        self.journal = Journal(path)
        self.adapter = adapter
        self.limit = limit
        self.left_out: list[str] = []
        self.failure: BaseException | None = None
        self._bytes = self._tensors = self._text = self._more = 0
        self._lock = threading.RLock()
        self._process = os.getpid()
        self._closed = False

    @property
    def writable(self) -> bool:
        """Whether more can be written: not after a failure or the end, and not by a forked child."""
        return self.failure is None and not self._closed and os.getpid() == self._process

    @property
    def full(self) -> bool:
        """Whether there is no room for the description of another call."""
        return self._tensors >= MOST_TENSORS or self._text >= MOST_TEXT

    def event(self, what: dict[str, Any]) -> None:
        """Write something that happened."""
        if not self.writable:
            return
        with self._lock:
            self._text += len(json.dumps(what))
            self.journal.event(what)

    def leave_out(self, line: str) -> None:
        """Say what is not in the recording, and why."""
        if len(self.left_out) >= _MOST_LINES:
            self._more += 1
            return
        self.left_out.append(line)
        self.event({"left_out": line})

    def keep(self, name: str, value: Any) -> dict[str, Any]:
        """Write a value, whatever it is.

        Args:
            name: of the tensor; what lies in a tuple or a list gets this and its number.
            value: a tensor, an array, something plain, or a tuple, list, mapping or dataclass of these.

        Returns:
            How the recording says it: {"tensor": name}, {"value": plain}, {"items": [...]}, {"named": {...}} or
            {"left_out": why}.
        """
        return self._keep(name, value, _MOST_NESTED)

    def digest(self, tensor: Any) -> int | None:
        """A number that is another one when a tensor's values are; None where they cannot be read.

        It reads all of them, at the speed of memory: counters of versions do not see what is written past them.
        """
        try:
            dtype, array = self.adapter.to_numpy(tensor)
            what = f"{dtype}{array.shape}".encode()
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            return zlib.crc32(data, zlib.crc32(what))
        except Exception:  # whatever a framework raises; keeping it says why
            return None

    def end(self, complete: bool) -> None:
        """Write the end of the recording."""
        if self._more:
            self.event({"left_out": f"{self._more} more things, for which there was no line"})
        self.event({"end": {"complete": complete}})

    def close(self) -> None:
        """Close the journal; what comes later is not written."""
        self._closed = True
        self.journal.close()

    def _keep(self, name: str, value: Any, depth: int) -> dict[str, Any]:
        if value is None or isinstance(value, (bool, str)) or is_plain_number(value):
            return {"value": value}
        if isinstance(value, (np.bool_, np.number)):
            return self._keep(name, value.item(), depth)
        if isinstance(value, float):  # NaN or inf, which JSON has not
            return self._keep_tensor(name, np.asarray(value))
        if isinstance(value, (tuple, list)) and depth and len(value) <= MOST_TENSORS:
            return {"items": [self._keep(f"{name}/{n}", item, depth - 1) for n, item in enumerate(value)]}
        if isinstance(value, np.ndarray) or self.adapter.is_tensor(value):
            return self._keep_tensor(name, value)
        named = _named(value)
        if named is not None and depth and len(named) <= MOST_TENSORS:
            return {"named": {key: self._keep(f"{name}/{key}", item, depth - 1) for key, item in named.items()}}
        kind = f"a {type(value).__module__}.{type(value).__qualname__}"
        return self._unkept(name, f"the number {value!s:.60}" if isinstance(value, int) else kind)

    def _keep_tensor(self, name: str, tensor: Any) -> dict[str, Any]:
        if not self.writable:
            return {"left_out": "the recording had ended"}
        is_array = isinstance(tensor, np.ndarray)
        try:
            # Asked before the values are: they may have to come from another device.
            reason = self._no_room(tensor.nbytes if is_array else self.adapter.nbytes(tensor))
            if reason:
                return self._unkept(name, reason)
            dtype, array = (tensor.dtype.name, tensor) if is_array else self.adapter.to_numpy(tensor)
        except Exception as error:
            return self._unkept(name, f"its values could not be read ({type(error).__name__}: {error})"[:300])
        if dtype not in CODES:
            return self._unkept(name, f"a tensor of {dtype}")
        self._write(name, CODES[dtype], array)
        return {"tensor": name}

    def _write(self, name: str, code: str, array: np.ndarray) -> None:
        shape = tuple(int(size) for size in array.shape)
        assert array.nbytes == math.prod(shape) * ITEM_SIZES[code], name
        little = array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)
        data = memoryview(little.reshape(-1).view(np.uint8).data)
        with self._lock:
            self._bytes += array.nbytes
            self._tensors += 1
            self.journal.tensor(name, code, shape, data)

    def _no_room(self, size: int) -> str:
        if self._tensors >= MOST_TENSORS:
            return f"the limit of {MOST_TENSORS} tensors was reached"
        if self._bytes + size > self.limit:
            return f"{readable(size)} more: the limit of {readable(self.limit)} was reached"
        return ""

    def _unkept(self, name: str, why: str) -> dict[str, Any]:
        self.leave_out(f"{name}: {why}")
        return {"left_out": why}


def _named(value: Any) -> Any:
    """The items of a mapping or a dataclass by their names; None of anything else."""
    if isinstance(value, dict):
        return value if all(isinstance(key, str) and key for key in value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    return None


def is_plain_number(value: Any) -> bool:
    """Whether JSON can hold a number: a finite float, or an integer of 64 bits.

    Example:
        >>> is_plain_number(3), is_plain_number(float("nan")), is_plain_number(2**70)
        (True, False, False)
    """
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    return isinstance(value, float) and math.isfinite(value)


def readable(size: int) -> str:
    """A number of bytes in words.

    Example:
        >>> readable(4 << 30), readable(1536), readable(10)
        ('4 GiB', '1.5 KiB', '10 bytes')
    """
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 1 << power:
            return f"{size / (1 << power):.3g} {unit}"
    return f"{size} bytes"
