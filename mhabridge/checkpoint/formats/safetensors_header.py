"""The header of a safetensors file: JSON that gives each tensor's dtype, shape and place, checked before it is used.

The rules are the library's own (https://github.com/huggingface/safetensors, 0.8): at most 100,000,000 bytes, no name
twice, and the tensors' bytes follow each other without gaps or overlaps from the header's end to the file's.
"""

from __future__ import annotations

import collections
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mhabridge.checkpoint.formats import mindspore_metadata
from mhabridge.checkpoint.storage import checking
from mhabridge.checkpoint.storage.stored import ITEM_SIZES, Extent, StoredTensor
from mhabridge.checkpoint.storage.writing import Outgoing
from mhabridge.errors import CheckpointError

LONGEST = 100_000_000
METADATA = "__metadata__"

# In the order of the library's list of dtypes, by which it sorts what it writes.
DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
_CODES = {name: code for code, name in DTYPES.items()}
_RANKS = {name: rank for rank, name in enumerate(DTYPES.values())}
_SUB_BYTE = re.compile(r"(I|U|F|FP|NF|INT|UINT)[1-7](_\w{1,20})?")  # F4, F6_E2M3 and F6_E3M2 in 0.8; I4 elsewhere


def read(path: Path, descriptor: int) -> tuple[list[StoredTensor], dict[str, str]]:
    """The tensors of an open file, in the order of their bytes, and its metadata.

    Raises:
        CheckpointError: the header is not what the format asks for, or a tensor has less than a byte an element.
    """
    size = os.fstat(descriptor).st_size
    header, start = _parsed(path, descriptor, size)
    metadata = _metadata(path, header.pop(METADATA, None))
    tensors = [_tensor(path, name, entry, start, metadata) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.extents[0].offset, tensor.extents[0].length))
    _require_no_gaps(path, tensors, start, size)
    return tensors, metadata


def text_of(tensors: Sequence[Outgoing], metadata: Mapping[str, str]) -> bytes:
    """The header for tensors that are written in this order, padded so that they are aligned.

    Raises:
        CheckpointError: a name occurs twice or is no text, or the header gets too long.
    """
    checking.require_names([tensor.name for tensor in tensors])
    entries: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    position = 0
    for tensor in tensors:
        if tensor.name == METADATA:
            raise CheckpointError(tensor.name, given="a name that is taken", expected="one tensor of each name")
        offsets = [position, position + tensor.nbytes]
        entries[tensor.name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        position += tensor.nbytes
    try:
        text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except UnicodeError as error:
        raise CheckpointError("a name or the metadata", given=f"no text ({error})", expected="UTF-8") from None
    text += b" " * (-len(text) % 8)
    if len(text) > LONGEST:
        raise CheckpointError("the header", given=f"{len(text)} bytes", expected=f"at most {LONGEST}")
    return text


def in_order(tensors: Sequence[Outgoing]) -> list[Outgoing]:
    """Tensors in the library's order: large items first, which keeps all of them aligned, then by name.

    Raises:
        CheckpointError: a dtype has no place in this format.
    """
    for tensor in tensors:
        if tensor.dtype not in _RANKS:
            raise CheckpointError(
                tensor.name,
                given=f"dtype {tensor.dtype}, which safetensors does not have",
                expected="one of " + ", ".join(_RANKS),
            )
    return sorted(tensors, key=lambda tensor: (-_RANKS[tensor.dtype], tensor.name))


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no key occurs twice; for ``object_pairs_hook``.

    Raises:
        ValueError: one does.

    Example:
        >>> json.loads('{"a": 1, "a": 2}', object_pairs_hook=unique)
        Traceback (most recent call last):
        ValueError: two entries are named 'a'
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        ((name, _),) = collections.Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"two entries are named {name!r}")
    return found


def damaged(path: Path, why: str) -> CheckpointError:
    """The error for a file that is no safetensors file, or no whole one."""
    return checking.damaged(path, why, "a whole .safetensors file")


def _parsed(path: Path, descriptor: int, size: int) -> tuple[dict[str, Any], int]:
    """The header, and where the tensors' bytes begin."""
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if size < 8 or length > min(size - 8, LONGEST):
        raise damaged(path, f"a header of {length} bytes in a file of {size}")
    text = os.pread(descriptor, length, 8)
    try:
        header = checking.json_of(text, object_pairs_hook=unique, parse_int=_short)
    except ValueError as error:
        raise damaged(path, f"the header is no JSON: {error}") from None
    if not isinstance(header, dict) or text[:1] != b"{":
        raise damaged(path, "the header is no JSON object")
    if len(header) > checking.MOST_TENSORS:
        raise damaged(path, f"{len(header)} tensors")
    return header, 8 + length


def _short(digits: str) -> int:
    """No size has more than 19 digits, and converting millions of them takes quadratic time."""
    if len(digits) > 20:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _metadata(path: Path, found: Any) -> dict[str, str]:
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise damaged(path, f"{METADATA} does not map strings to strings")
    if not is_text("".join((*found, *found.values()))):
        raise damaged(path, f"{METADATA} is no text")
    return found


def is_text(given: str) -> bool:
    """Whether there is no half of a surrogate pair in it, which JSON can hold and no file."""
    try:
        return bool(given.isascii() or given.encode("utf-8"))
    except UnicodeError:
        return False


def _tensor(path: Path, name: str, entry: Any, start: int, metadata: Mapping[str, str]) -> StoredTensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise damaged(path, f"{name!r} has not just dtype, shape and data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    dtype = _dtype(path, name, entry["dtype"], metadata)
    if not isinstance(shape, list) or not checking.is_shape(shape):
        raise damaged(path, f"{name!r} has the shape {str(shape)[:80]}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(checking.is_shape([n]) for n in offsets):
        raise damaged(path, f"{name!r} has the data_offsets {str(offsets)[:80]}")
    begin, end = offsets
    if end - begin != math.prod(shape) * (ITEM_SIZES[dtype] or 0):
        raise damaged(path, f"{name!r} has {end - begin} bytes, which is not what shape {shape} of {dtype} takes")
    return StoredTensor(name, dtype, tuple(shape), (Extent(0, start + begin, end - begin),), name)


def _dtype(path: Path, name: str, code: Any, metadata: Mapping[str, str]) -> str:
    if not is_text(name):
        raise damaged(path, f"the name {name!r} is no text")
    if (isinstance(code, str) and _SUB_BYTE.fullmatch(code.upper())) or mindspore_metadata.is_packed(name, metadata):
        raise CheckpointError(
            f"{path}: {name}",
            given=f"dtype {metadata.get(name, code)}, of less than a byte an element",
            expected="one of " + ", ".join(DTYPES),
            advice="Quantised weights have to be dequantised first, by the library that wrote them.",
        )
    if not isinstance(code, str) or code not in DTYPES:
        raise CheckpointError(
            f"{path}: {name}",
            given=f"dtype {str(code)[:40]!r}, which no version of safetensors up to 0.8 has",
            expected="one of " + ", ".join(DTYPES),
            advice="The file is damaged, or newer than this reader.",
        )
    return DTYPES[code]


def _require_no_gaps(path: Path, tensors: list[StoredTensor], start: int, size: int) -> None:
    position = start
    for tensor in tensors:
        (extent,) = tensor.extents
        if extent.offset != position:
            what = "a gap before" if extent.offset > position else "an overlap at"
            raise damaged(path, f"there is {what} {tensor.name!r}")
        position += extent.length
    if position != size:
        raise damaged(path, f"it has {size} bytes, and its header speaks of {position}")
