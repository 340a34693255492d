"""The safetensors format: https://github.com/huggingface/safetensors, read and written without the library.

The library gives arrays, not the place of their bytes, and maps the whole file into memory to make them; writing, it
wants all tensors at once. Here only the header is read, and tensors stream through. What is written is, byte for byte,
what the library writes for the same tensors (with one entry of metadata at most: it holds several in no order).

A file is: the header's length (8 bytes, little-endian), the header (JSON: for each name dtype, shape and data_offsets;
``__metadata__`` maps strings to strings), and the tensors' bytes.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mhabridge.checkpoint.formats import mindspore_metadata, safetensors_header
from mhabridge.checkpoint.formats.safetensors_header import damaged
from mhabridge.checkpoint.storage import checking, checksums
from mhabridge.checkpoint.storage.stored import StoredFile, StoredObject
from mhabridge.checkpoint.storage.writing import Outgoing, Sink

NAME = "safetensors"
_DEEPEST = 100  # lists and dicts in each other; pickles are read to 60
OBJECTS = "mhabridge.objects"  # the key of the metadata under which entries that are no tensors are kept, as JSON


def sniff(head: bytes) -> bool:
    r"""Whether a file that begins so is probably a safetensors file.

    Example:
        >>> sniff(struct.pack("<Q", 2) + b"{}"), sniff(b"PK\x03\x04")
        (True, False)
    """
    return head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= safetensors_header.LONGEST


def read(path: str | os.PathLike[str], nested: Sequence[str] | None = None, verify: bool = False) -> StoredFile:
    """Open a safetensors file.

    Args:
        path: the file.
        nested: nothing can be nested in this format; accepted since every format's reader takes it.
        verify: also compare the checksum that MindSpore writes when it is asked to, which reads the whole file.

    Raises:
        CheckpointError: the file is cut off or damaged, or has tensors of less than a byte an element.
    """
    path = Path(path)
    with checking.opened(path) as descriptor:
        tensors, metadata = safetensors_header.read(path, descriptor)
    objects = _objects(path, metadata)
    notes, kept = mindspore_metadata.notes(metadata), mindspore_metadata.checksums(tensors, metadata)
    file = StoredFile(path, NAME, tensors, objects, metadata, notes=notes, checksums=kept)
    if verify:
        checksums.require_all(file)
    return file


def holds(entry: StoredObject) -> bool:
    """Whether an entry that is no tensor can be kept: anything that JSON can hold.

    Example:
        >>> holds(StoredObject("epoch", "3", 3)), holds(StoredObject("x", "a Point", inert=("shapes.Point",)))
        (True, False)
    """
    return not entry.inert and (entry.value is not None or entry.text == "None")


def write(
    sink: Sink,
    tensors: Sequence[Outgoing],
    objects: Sequence[StoredObject] = (),
    metadata: Mapping[str, str] | None = None,
    nested: Sequence[str] = (),
) -> None:
    """Write a safetensors file.

    Args:
        sink: where to.
        tensors: what; they are written in the library's order, by dtype and name.
        objects: entries that are no tensors; kept as JSON in one entry of the metadata.
        metadata: more of it. PyTorch's tools look for ``{"format": "pt"}``, MindSpore writes ``{"format": "ms"}``. What
            describes the bytes of another file (MindSpore's ``crc_num``) is left out.
        nested: accepted since every format's writer takes it; nothing is nested in this format.

    Raises:
        CheckpointError: a name occurs twice, or a dtype or an object has no place in this format.
    """
    ordered, header = _planned(tensors, objects, metadata)
    sink.reserve(8 + len(header) + sum(tensor.nbytes for tensor in ordered))
    sink.write(struct.pack("<Q", len(header)) + header)
    for tensor in ordered:
        sink.later(tensor.nbytes, tensor.write_to)


def require_room(
    tensors: Sequence[Outgoing],
    objects: Sequence[StoredObject] = (),
    metadata: Mapping[str, str] | None = None,
    nested: Sequence[str] = (),
) -> None:
    """Refuse what ``write`` refuses, before the first byte is written; the arguments are the same."""
    _planned(tensors, objects, metadata)


def _planned(
    tensors: Sequence[Outgoing], objects: Sequence[StoredObject], metadata: Mapping[str, str] | None
) -> tuple[list[Outgoing], bytes]:
    """The tensors in the order in which they are written, and the header for them."""
    kept = {name: text for name, text in (metadata or {}).items() if name not in mindspore_metadata.OF_THE_BYTES}
    if objects:
        kept[OBJECTS] = _json(objects)
    ordered = safetensors_header.in_order(tensors)
    return ordered, safetensors_header.text_of(ordered, kept)


def _json(objects: Sequence[StoredObject]) -> str:
    checking.require_kept(objects, holds, "what JSON can hold")
    checking.require_names([entry.name for entry in objects])
    found = {entry.name: entry.value for entry in objects}
    return json.dumps(found, ensure_ascii=False)


def _objects(path: Path, metadata: dict[str, str]) -> tuple[StoredObject, ...]:
    """The objects that ``write`` put into the metadata; they are taken out of it."""
    text = metadata.pop(OBJECTS, None)
    if text is None:
        return ()
    try:
        found = checking.json_of(text, object_pairs_hook=safetensors_header.unique)
    except ValueError as error:
        raise damaged(path, f"{OBJECTS} is no JSON: {error}") from None
    if not isinstance(found, dict) or not _is_plain(found, 0):
        raise damaged(path, f"{OBJECTS} is no JSON object of texts and numbers, at most {_DEEPEST} levels deep")
    return tuple(StoredObject(name, _text(value), value) for name, value in found.items())


def _is_plain(value: Any, depth: int) -> bool:
    """Whether other formats can hold it too: not nested deep, and no half of a surrogate pair, which JSON can hold."""
    if isinstance(value, dict):
        return depth < _DEEPEST and all(_is_plain(part, depth + 1) for pair in value.items() for part in pair)
    if isinstance(value, list):
        return depth < _DEEPEST and all(_is_plain(part, depth + 1) for part in value)
    return not isinstance(value, str) or safetensors_header.is_text(value)


def _text(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return f"a {type(value).__name__} of {len(value)} entries"
    return str(value)
