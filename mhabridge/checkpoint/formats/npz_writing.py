"""Writes NumPy's .npz: an archive of .npy members that are not compressed, in one pass.

bfloat16, which .npy does not know, is kept as words in a record of one field, which our reader gives back as bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mhabridge import dtypes
from mhabridge.checkpoint.formats import npy_header, scalars
from mhabridge.checkpoint.formats.zip_writer import ZipWriter
from mhabridge.checkpoint.storage import checking
from mhabridge.checkpoint.storage.stored import NOT_IN_NUMPY, StoredObject
from mhabridge.checkpoint.storage.writing import Outgoing, Sink
from mhabridge.errors import CheckpointError


def holds(entry: StoredObject) -> bool:
    """Whether an entry that is no tensor can be written: a string, a number or a bool, as an array of shape ()."""
    return scalars.utf32(entry.value) is not None or scalars.as_tensor(entry) is not None


def write(
    sink: Sink,
    tensors: Sequence[Outgoing],
    objects: Sequence[StoredObject] = (),
    metadata: Mapping[str, str] | None = None,
    nested: Sequence[str] = (),
) -> None:
    """Write an .npz archive.

    Args:
        sink: where to.
        tensors: what, in this order.
        objects: entries that are no tensors, which come last, as arrays of shape ().
        metadata: this format has no room for it; accepted since every format's writer takes it.
        nested: accepted for the same reason; nothing is nested in this format.

    Raises:
        CheckpointError: a name, dtype or object has no place in this format.
    """
    require_room(tensors, objects)
    sink.reserve(sum(tensor.nbytes for tensor in tensors))
    archive = ZipWriter(sink)
    for tensor in tensors:
        _add(archive, tensor.name, _kind(tensor), tensor.shape, tensor.nbytes, tensor.write_to)
    for entry in objects:
        text, scalar = scalars.utf32(entry.value), scalars.as_tensor(entry)
        if scalar is not None:
            _add(archive, entry.name, _kind(scalar), (), scalar.nbytes, scalar.write_to)
        elif text is not None:
            _add(archive, entry.name, np.dtype(f"<U{len(text) // 4}"), (), len(text), _writes(text))
    archive.finish()


def _add(
    archive: ZipWriter,
    name: str,
    kind: np.dtype[Any],
    shape: tuple[int, ...],
    nbytes: int,
    emit: Callable[[Sink], None],
) -> None:
    header = npy_header.header_for(kind, shape)

    def emit_member(sink: Sink) -> None:
        sink.write(header)
        emit(sink)

    archive.add_emitted(f"{name}.npy", len(header) + nbytes, emit_member)


def _writes(data: bytes) -> Callable[[Sink], None]:
    return lambda sink: sink.write(data)


def _kind(tensor: Outgoing) -> np.dtype[Any]:
    return dtypes.BFLOAT16_WORDS if tensor.dtype == "bfloat16" else np.dtype(tensor.dtype)


def require_room(
    tensors: Sequence[Outgoing],
    objects: Sequence[StoredObject] = (),
    metadata: Mapping[str, str] | None = None,
    nested: Sequence[str] = (),
) -> None:
    """Refuse what ``write`` refuses, before the first byte is written; the arguments are the same."""
    for tensor in tensors:
        if tensor.dtype in NOT_IN_NUMPY:
            raise CheckpointError(
                tensor.name,
                given=f"dtype {tensor.dtype}, which NumPy does not have",
                expected="bool, integers, floats of 16 bits and more, or complex numbers",
                advice="Write .safetensors instead.",
            )
    checking.require_kept(objects, holds, "a string, a number or a bool")
    names = [*(tensor.name for tensor in tensors), *(entry.name for entry in objects)]
    checking.require_names(names)
    for name in names:
        if "\0" in name:
            raise CheckpointError(
                repr(name[:80]), given="no name for a member of an archive", expected="one without the character NUL"
            )
