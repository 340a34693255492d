"""NumPy's pickled arrays, dtypes and scalars, interpreted from inert records: where the numbers lie and what they are.

The forms are those that NumPy 1 and 2 write: an array is ``_reconstruct(ndarray, (0,), b"b")`` with the state
``(1, shape, dtype, fortran, bytes)``, in protocol 5 ``_frombuffer(bytes, dtype, shape, order)``; a dtype is
``dtype("f4", False, True)`` with the state ``(3, "<", None, None, None, -1, -1, 0)``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from mhabridge.checkpoint.pickled.inert import Made, Name, Node, Slice, Table
from mhabridge.checkpoint.storage import checking
from mhabridge.checkpoint.storage.stored import ITEM_SIZES, Extent, StoredTensor

RECONSTRUCT = "numpy.core.multiarray._reconstruct"
FROM_BUFFER = "numpy.core.numeric._frombuffer"
SCALAR = "numpy.core.multiarray.scalar"
ENCODE = "_codecs.encode"

CODES = {
    **{"b1": "bool", "i1": "int8", "i2": "int16", "i4": "int32", "i8": "int64"},
    **{"u1": "uint8", "u2": "uint16", "u4": "uint32", "u8": "uint64"},
    **{"f2": "float16", "f4": "float32", "f8": "float64", "c8": "complex64", "c16": "complex128"},
}
# Types that are not NumPy's own stand in a dtype by their class.
_CLASSES = {"megengine.core._imperative_rt.pybfloat16": "bfloat16"}
_CLASSES.update({f"ml_dtypes.{name}": name for name in ITEM_SIZES if name.startswith(("bfloat16", "float8"))})
_LATIN = ("latin1", "latin-1", "iso-8859-1")


@dataclasses.dataclass(frozen=True)
class Element:
    """What an array is made of.

    Args:
        dtype: a key of ``ITEM_SIZES``; empty if no format has it.
        big_endian: the byte order.
        text: what it is, for people.
    """

    dtype: str
    big_endian: bool
    text: str


def element(node: Node) -> Element | None:
    """What a record of a NumPy dtype stands for; None if it is no such record.

    Example:
        >>> element(Made(Name("numpy", "dtype"), ("f4", False, True), state=(3, ">", None, None, None, -1, -1, 0)))
        Element(dtype='float32', big_endian=True, text='float32')
    """
    if not (isinstance(node, Made) and node.known_as == "numpy.dtype" and node.args):
        return None
    code, state = node.args[0], node.state if isinstance(node.state, tuple) else ()
    if isinstance(code, Name):
        dtype, label = _CLASSES.get(code.known_as, ""), str(code)
    elif isinstance(code, str):
        dtype, label = CODES.get(code, ""), code[:20]
    else:
        return None
    if len(state) > 8 and isinstance(state[8], Table) and state[8].pairs:
        return Element("", False, f"{label} with metadata of its own (MegEngine's quantised numbers)")
    fields = state[2:5] if len(state) > 5 else state[1:3]
    if any(part is not None for part in fields):
        return Element("", False, "a structured dtype")
    order = (state[1] if len(state) > 5 else state[0]) if state else "<"
    return Element(dtype, order == ">", dtype or label)


def array_element(node: Node) -> Element | None:
    """What the array that a record stands for is made of; None if it is no array."""
    if not isinstance(node, Made):
        return None
    if node.known_as == FROM_BUFFER and len(node.args) == 4:
        return element(node.args[1])
    state = _array_state(node)
    return element(state[1]) if state else None


def _array_state(node: Made) -> tuple[Any, ...]:
    """(shape, dtype, fortran, bytes) of an array of that class itself, else an empty tuple."""
    plain = node.known_as == RECONSTRUCT and node.args and isinstance(node.args[0], Name)
    if not plain or node.args[0].known_as != "numpy.ndarray" or not isinstance(node.state, tuple):
        return ()
    return node.state[-4:] if len(node.state) in (4, 5) else ()


def array(node: Made, name: str, storage: str, extent_of: Callable[[Node], Extent | None]) -> StoredTensor | str:
    """The array that a record stands for, or what is wrong with the record.

    Args:
        node: a record for which ``array_element`` names a dtype.
        name: the tensor's.
        storage: the tensor's ``storage``.
        extent_of: where the bytes of a payload lie; None if it is no payload.
    """
    found = array_element(node)
    assert found is not None
    if node.known_as == FROM_BUFFER:
        payload, _, shape, order = node.args
        fortran = order == "F"
    else:
        shape, _, fortran, payload = _array_state(node)
    if not isinstance(shape, tuple) or not checking.is_shape(shape):
        return "an array whose shape is no tuple of lengths"
    extent = extent_of(payload)
    if extent is None:
        return "an array without bytes"
    nbytes = math.prod(shape) * (ITEM_SIZES[found.dtype] or 0)
    if extent.length != nbytes:
        return f"{extent.length} bytes for {found.dtype} of shape {shape}, which takes {nbytes}"
    strides = fortran_strides(shape) if fortran and sum(length > 1 for length in shape) > 1 else None
    return StoredTensor(name, found.dtype, shape, (extent,), storage, 0, strides, found.big_endian)


def fortran_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements of an array whose first index runs fastest.

    Example:
        >>> fortran_strides((2, 3, 4))
        (1, 2, 6)
    """
    return tuple(math.prod(shape[:axis]) for axis in range(len(shape)))


def text_payload(node: Node) -> tuple[str | Slice, str] | None:
    """A payload that is written as text, and the encoding that makes bytes of it; None for others."""
    if isinstance(node, str):  # a string of Python 2
        return node, "utf-8"
    if isinstance(node, Made) and node.known_as == ENCODE and len(node.args) == 2 and node.args[1] in _LATIN:
        text = node.args[0]
        if isinstance(text, str) or (isinstance(text, Slice) and text.encoding):
            return text, "latin-1"
    return None


def scalar(node: Made, read: Callable[[Node], bytes]) -> Any:
    """A NumPy scalar as a plain Python number; None if it is none that Python has.

    Args:
        node: a record of ``SCALAR``.
        read: the bytes of a payload.
    """
    found = element(node.args[0]) if len(node.args) == 2 else None
    if found is None or found.dtype not in np.sctypeDict or found.dtype.startswith("complex"):
        return None
    data = read(node.args[1])
    dtype = np.dtype(found.dtype).newbyteorder(">" if found.big_endian else "<")
    return np.frombuffer(data, dtype)[0].item() if len(data) == dtype.itemsize else None
