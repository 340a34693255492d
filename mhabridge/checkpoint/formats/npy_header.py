"""The header before an array's numbers in NumPy's .npy: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html.

It is a Python dict as text. Only what NumPy writes there is recognised; nothing is evaluated.
"""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from mhabridge import dtypes
from mhabridge.checkpoint.storage import checking

LONGEST = 10_000  # bytes of the header; NumPy's own limit
_NPY: Any = np.lib.format  # not annotated in NumPy 1
_MAGIC = b"\x93NUMPY"
_ENTRIES = re.compile(
    r"""\{\s*'descr'\s*:\s*(?:'(?P<plain>[^']*)'|(?P<fields>\[[^\]]*\]))\s*,"""
    r"""\s*'fortran_order'\s*:\s*(?P<order>True|False)\s*,\s*'shape'\s*:\s*\((?P<shape>[^()]*)\)\s*,?\s*\}\s*"""
)
_LENGTHS = re.compile(r"\s*|\s*\d{1,19}\s*,\s*(\d{1,19}\s*(,\s*\d{1,19}\s*)*,?\s*)?")
_TEXT = re.compile(r"<U\d{1,7}")
_OTHERS = re.compile(r"[<>|=]?([biufc]\d{1,2}|[SU]\d{1,7}|[mM]8(\[\w{1,12}\])?)")
_BFLOAT16 = re.compile(r"\[\s*\('bfloat16',\s*'<u2'\)\s*\]")


@dataclasses.dataclass(frozen=True)
class Header:
    """What a header says.

    Args:
        dtype: a key of ``ITEM_SIZES``, "text" for strings, or NumPy's name of another dtype.
        item_size: bytes of an element.
        shape: of the array.
        fortran_order: whether the first axis is the fastest.
        big_endian: the numbers' byte order.
        length: bytes of the header itself.
    """

    dtype: str
    item_size: int
    shape: tuple[int, ...]
    fortran_order: bool
    big_endian: bool
    length: int


def parse(head: Callable[[int], bytes]) -> Header:
    """Read a header.

    Args:
        head: gives the first bytes of the array's file, so many or all that there are.

    Raises:
        ValueError: that is none, or one of Python objects or records.
    """
    start = head(12)
    if start[:6] != _MAGIC or len(start) < 12 or start[6] not in (1, 2, 3) or start[7] != 0:
        raise ValueError(f"no .npy of version 1 to 3, but {start[:8]!r}")
    begin = 10 if start[6] == 1 else 12
    length = int.from_bytes(start[8:begin], "little")
    text = head(begin + length)[begin:] if length <= LONGEST else b""
    if len(text) != length or not length:
        raise ValueError(f"a .npy header of {length} bytes")
    found = _ENTRIES.fullmatch(text.decode("utf-8" if start[6] == 3 else "latin-1"))
    if found is None:
        raise ValueError(f"the .npy header {text[:80]!r}")
    dtype, item_size, big_endian = _dtype(found["plain"], found["fields"])
    return Header(dtype, item_size, _shape(found["shape"]), found["order"] == "True", big_endian, begin + length)


def header_for(kind: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """The header that NumPy writes for a little-endian array in C order.

    Example:
        >>> parse(lambda count: header_for(np.dtype("f4"), (2, 3))[:count]).shape
        (2, 3)
    """
    stream = io.BytesIO()
    descr = _NPY.dtype_to_descr(kind.newbyteorder("<"))
    _NPY.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def _dtype(plain: str | None, fields: str | None) -> tuple[str, int, bool]:
    if fields is not None and _BFLOAT16.fullmatch(fields):
        return "bfloat16", dtypes.BFLOAT16_WORDS.itemsize, False
    given = plain if plain is not None else str(fields)
    if re.search(r"(^|[|<>='])O", given):
        raise ValueError("Python objects, which would have to be unpickled")
    if plain is None or "V" in plain:
        raise ValueError(f"dtype {given}; the .npy format does not keep bfloat16, so use safetensors")
    if _TEXT.fullmatch(plain):
        return "text", 4 * int(plain[2:]), False
    if not _OTHERS.fullmatch(plain):
        raise ValueError(f"dtype {plain[:80]}")
    try:
        kind = np.dtype(plain)
    except TypeError as error:
        raise ValueError(f"dtype {plain}: {error}") from None
    return kind.name, kind.itemsize, plain[0] == ">"


def _shape(text: str) -> tuple[int, ...]:
    if not _LENGTHS.fullmatch(text):
        raise ValueError(f"the shape ({text[:80]})")
    shape = tuple(int(length) for length in re.findall(r"\d+", text))
    if not checking.is_shape(shape):
        raise ValueError(f"the shape ({text[:80]})")
    return shape
