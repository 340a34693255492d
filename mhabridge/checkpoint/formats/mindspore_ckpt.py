"""Reads MindSpore's .ckpt: one protobuf message whose entries give each tensor's name, shape, dtype and bytes.

Without protobuf (what MindSpore generated from the schema needs one certain version of it): only the few bytes before
each tensor's are looked at.

The message, in protobuf's language (``mindspore/train/checkpoint.proto``)::

    Checkpoint: repeated Value value = 1
    Value: required string tag = 1; oneof { TensorProto tensor = 2; MapTensorProto maptensor = 3 }
    TensorProto: repeated int64 dims = 1; required string tensor_type = 2; required bytes tensor_content = 3

A tensor of more than 512 MiB is several entries of the same tag, each with the dims of the whole; so are slices without
any bytes. A string is an entry of the type ``str`` in UTF-32. The tail ``crc_num`` is there when it was asked for.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from mhabridge.checkpoint.formats import scalars
from mhabridge.checkpoint.formats.mindspore_entries import SAVED_ONLY, TYPES, Entry, damaged, entries
from mhabridge.checkpoint.storage import checking, checksums
from mhabridge.checkpoint.storage.checksums import Checksum
from mhabridge.checkpoint.storage.stored import ITEM_SIZES, Extent, StoredFile, StoredObject, StoredTensor
from mhabridge.errors import CheckpointError

NAME = "mindspore-ckpt"
_TAIL = b"crc_num"
_TAIL_LENGTH = len(_TAIL) + 10  # a big-endian CRC-32 follows

# The first four bytes of each block of an encrypted file, little-endian (mindspore/core/utils/crypto.cc).
_ENCRYPTED = {
    0x7F3A5ED8.to_bytes(4, "little"): "AES-GCM",
    0x7F3A5ED9.to_bytes(4, "little"): "AES-CBC",
    0x7F3A5EDA.to_bytes(4, "little"): "SM4-CBC",
}


def sniff(head: bytes) -> bool:
    r"""Whether a file that begins so is probably a .ckpt, perhaps an encrypted one.

    Example:
        >>> sniff(b"\x0a\x12\x0a\x01x\x12\x0d\x08\x02\x12\x07Float32"), sniff(b"PK\x03\x04")
        (True, False)
    """
    if head[:4] in _ENCRYPTED:
        return True
    after_length = next((at + 1 for at in range(1, min(len(head), 11)) if head[at] < 0x80), len(head))
    return head[:1] == b"\x0a" and head[after_length : after_length + 1] == b"\x0a"


def read(path: str | os.PathLike[str], nested: Sequence[str] | None = None, verify: bool = False) -> StoredFile:
    """Open a MindSpore checkpoint; the tensors' bytes are skipped.

    Args:
        path: the file.
        nested: nothing can be nested in this format; accepted since every format's reader takes it.
        verify: also compare the checksum at the end, where there is one, which reads the whole file.

    Raises:
        CheckpointError: the file is cut off, damaged or encrypted, or has map tensors or 4-bit integers.
    """
    path = Path(path)
    with checking.opened(path) as descriptor:
        end, kept = _end(path, descriptor)
        notes: dict[str, None] = {}
        tensors, objects = [], []
        for slices in _by_tag(entries(path, descriptor, end, notes)):
            if slices[0].kind == "str":
                objects.append(_string(path, descriptor, slices))
            else:
                tensors.append(_tensor(path, slices))
    file = StoredFile(path, NAME, tensors, tuple(objects), notes=tuple(notes), checksums=kept)
    if verify:
        checksums.require_all(file)
    return file


def _end(path: Path, descriptor: int) -> tuple[int, tuple[Checksum, ...]]:
    """Where the entries end, and the checksum that follows, if there is one."""
    size = os.fstat(descriptor).st_size
    method = _ENCRYPTED.get(os.pread(descriptor, 4, 0))
    if method:
        raise CheckpointError(
            str(path),
            given=f"an encrypted file ({method})",
            expected="a .ckpt without a key",
            advice="Load it in MindSpore with dec_key, and save it again without enc_key.",
        )
    if size == 0:
        raise damaged(path, "it is empty")
    end = max(size - _TAIL_LENGTH, 0)
    tail = os.pread(descriptor, _TAIL_LENGTH, end)
    if len(tail) < _TAIL_LENGTH or not tail.startswith(_TAIL):
        return size, ()
    return end, (Checksum("", (Extent(0, 0, end),), int.from_bytes(tail[len(_TAIL) :], "big")),)


def _by_tag(found: Iterable[Entry]) -> Iterator[list[Entry]]:
    """The slices of each tensor: entries of one tag that follow each other."""
    for _, slices in itertools.groupby(found, key=lambda entry: entry.tag):
        yield list(slices)


def _tensor(path: Path, slices: list[Entry]) -> StoredTensor:
    first, length = slices[0], sum(entry.length for entry in slices)
    where = f"{path}: {first.tag}"
    if any((entry.dims, entry.kind) != (first.dims, first.kind) for entry in slices):
        raise damaged(path, f"the slices of {first.tag!r} differ in type or dims")
    dtype = TYPES.get(first.kind) or SAVED_ONLY.get(first.kind)
    if dtype is None:
        raise CheckpointError(
            where,
            given=f"type {first.kind!r}",
            expected="one of " + ", ".join([*TYPES, *SAVED_ONLY]),
            advice="Quantised weights have to be dequantised first, in MindSpore.",
        )
    item_size = ITEM_SIZES[dtype] or 0
    # MindSpore itself takes dims [0] for those of a scalar; without any bytes it is an empty vector.
    shape = () if first.dims == (0,) and length == item_size else first.dims
    if length != math.prod(shape) * item_size:
        raise damaged(path, f"{first.tag!r} has {length} bytes, which is not what shape {shape} of {dtype} takes")
    extents = tuple(Extent(0, entry.offset, entry.length) for entry in slices if entry.length)
    return StoredTensor(first.tag, dtype, shape, extents, first.tag)


def _string(path: Path, descriptor: int, slices: list[Entry]) -> StoredObject:
    tag, length = slices[0].tag, sum(entry.length for entry in slices)
    if length > scalars.LONGEST_TEXT:
        raise damaged(path, f"{tag!r} is a string of {length} bytes")
    data = b"".join(os.pread(descriptor, entry.length, entry.offset) for entry in slices)
    text = scalars.text_of(data)
    if text is None:
        raise damaged(path, f"{tag!r} is no text")
    return StoredObject(tag, text, text)
