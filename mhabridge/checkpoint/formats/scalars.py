"""Numbers and strings beside the tensors of a checkpoint (an epoch, a name), for formats that keep tensors only."""

from __future__ import annotations

import struct
from typing import Any

from mhabridge.checkpoint.storage.stored import StoredObject
from mhabridge.checkpoint.storage.writing import Outgoing

LONGEST_TEXT = 1 << 20  # bytes of a string


def as_tensor(found: StoredObject) -> Outgoing | None:
    """A bool, an integer or a float as a tensor of shape (), of dtype bool, int64 or float64, which changes no value.

    Returns:
        None for anything else, and for an integer of more than 64 bits.

    Example:
        >>> as_tensor(StoredObject("epoch", "3", 3)).dtype
        'int64'
    """
    value = found.value
    if isinstance(value, bool):
        return _scalar(found.name, "bool", struct.pack("<?", value))
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return _scalar(found.name, "int64", struct.pack("<q", value))
    if isinstance(value, float):
        return _scalar(found.name, "float64", struct.pack("<d", value))
    return None


def utf32(value: Any) -> bytes | None:
    r"""A string as NumPy keeps it in an array, and MindSpore in a .ckpt: little-endian UTF-32, at least one character.

    Returns:
        None for what is no string, too long a one, or one that NumPy would give back without its last characters (NUL).

    Example:
        >>> utf32("a"), utf32(""), utf32(3)
        (b'a\x00\x00\x00', b'\x00\x00\x00\x00', None)
    """
    if not isinstance(value, str) or value.endswith("\0") or 4 * len(value) > LONGEST_TEXT:
        return None
    try:
        return (value or "\0").encode("utf-32-le")
    except UnicodeError:
        return None


def text_of(data: bytes) -> str | None:
    """The string that ``utf32`` wrote; None when that is none."""
    try:
        return data.decode("utf-32-le").rstrip("\0")
    except UnicodeError:
        return None


def _scalar(name: str, dtype: str, data: bytes) -> Outgoing:
    return Outgoing(name, dtype, (), lambda sink: sink.write(data))
