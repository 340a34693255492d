"""Writes MindSpore's .ckpt, byte for byte as ``mindspore.save_checkpoint`` does (2.10) for the same tensors in order.

But with the mode that the umask gives (MindSpore makes every file read-only), and never without a tensor: MindSpore
leaves empty ones out without a word. The format is described in ``mhabridge.checkpoint.formats.mindspore_ckpt``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mhabridge.checkpoint.formats import scalars
from mhabridge.checkpoint.formats.mindspore_entries import TYPES, head_of
from mhabridge.checkpoint.storage import checking
from mhabridge.checkpoint.storage.stored import StoredObject
from mhabridge.checkpoint.storage.writing import Outgoing, Sink
from mhabridge.errors import CheckpointError

SLICE = 512 << 20
_CODES = {name: code for code, name in TYPES.items()}


def holds(entry: StoredObject) -> bool:
    """Whether an entry that is no tensor can be kept: a string as such, a number or a bool as a tensor of shape ()."""
    return scalars.utf32(entry.value) is not None or scalars.as_tensor(entry) is not None


def write(
    sink: Sink,
    tensors: Sequence[Outgoing],
    objects: Sequence[StoredObject] = (),
    metadata: Mapping[str, str] | None = None,
    nested: Sequence[str] = (),
    keep_empty: bool = False,
    slice_size: int = SLICE,
) -> None:
    """Write a MindSpore checkpoint.

    Args:
        sink: where to.
        tensors: what, in this order.
        objects: entries that are no tensors, which come last: strings, and numbers as ``append_dict`` holds them (a
            float becomes float64 where float32 would change it).
        metadata: this format has no room for it; accepted since every format's writer takes it.
        nested: accepted for the same reason; nothing is nested in this format.
        keep_empty: write empty tensors. MindSpore leaves them out without a word; 2.10 reads those of two axes and more
            when they are there, 2.0 refuses the whole file. One of shape (0,) would be read as a scalar.
        slice_size: the most bytes of one entry.

    Raises:
        CheckpointError: there is an empty tensor, or a name, dtype or object that has no place in this format.
    """
    require_room(tensors, objects, keep_empty=keep_empty)
    sink.reserve(sum(tensor.nbytes for tensor in tensors))
    for tensor in tensors:
        _write(sink, tensor, slice_size)
    for entry in objects:
        scalar = scalars.as_tensor(entry)
        if scalar is None:
            text = scalars.utf32(entry.value) or b""
            sink.write(head_of(entry.name, (0,), "str", len(text)) + text)
        else:
            _write(sink, scalar, slice_size)


def _write(sink: Sink, tensor: Outgoing, slice_size: int) -> None:
    starts = range(0, max(tensor.nbytes, 1), slice_size)
    heads = sum(len(_head(tensor, min(slice_size, tensor.nbytes - start))) for start in starts)
    sink.later(heads + tensor.nbytes, lambda part: _Slices(part, tensor, slice_size).write_all())


def _head(tensor: Outgoing, length: int) -> bytes:
    return head_of(tensor.name, tensor.shape, _CODES[tensor.dtype], length)


class _Slices(Sink):
    """Puts the head of an entry before each slice of a tensor's bytes."""

    def __init__(self, sink: Sink, tensor: Outgoing, size: int) -> None:
        super().__init__(sink.descriptor)
        self.scratch = sink.scratch
        self._sink, self._tensor, self._size = sink, tensor, size
        self._room = 0

    def write_all(self) -> None:
        if self._tensor.nbytes == 0:
            self._begin()
        self._tensor.write_to(self)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        left = memoryview(data).cast("B")
        while left:
            here = self._next(len(left))
            self._sink.write(left[:here])
            left = left[here:]

    def copy(self, source: int, offset: int, length: int) -> None:
        while length:
            here = self._next(length)
            self._sink.copy(source, offset, here)
            offset, length = offset + here, length - here

    def _next(self, length: int) -> int:
        """How many bytes may be written now."""
        if self._room == 0:
            self._begin()
        here = min(length, self._room)
        self._room -= here
        self.position += here
        return here

    def _begin(self) -> None:
        self._room = min(self._size, self._tensor.nbytes - self.position)
        self._sink.write(_head(self._tensor, self._room))


def require_room(
    tensors: Sequence[Outgoing],
    objects: Sequence[StoredObject] = (),
    metadata: Mapping[str, str] | None = None,
    nested: Sequence[str] = (),
    keep_empty: bool = False,
) -> None:
    """Refuse what ``write`` refuses, before the first byte is written; the arguments are the same."""
    for tensor in tensors:
        if tensor.dtype not in _CODES:
            raise CheckpointError(
                tensor.name,
                given=f"dtype {tensor.dtype}, which MindSpore cannot load from a .ckpt",
                expected="one of " + ", ".join(_CODES),
            )
        if tensor.nbytes == 0 and (not keep_empty or tensor.shape == (0,)):
            raise CheckpointError(
                tensor.name,
                given=f"an empty tensor of shape {tensor.shape}, which MindSpore cannot load from a .ckpt",
                expected="at least one element",
                advice="Leave it out with drop (--drop), or write .safetensors, which MindSpore reads too.",
            )
    checking.require_kept(objects, holds, "a string, a number or a bool")
    checking.require_names([*(tensor.name for tensor in tensors), *(entry.name for entry in objects)])
