"""MegEngine's checkpoints: plain pickles, as ``megengine.save`` writes them, of arrays or of its own tensors.

``Module.state_dict()`` gives arrays, so most files ask for NumPy alone. Written here is protocol 4 with the names
of NumPy 1, which every MegEngine reads; NumPy 2 knows them too.
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from mhabridge.checkpoint.pickled import arrays, emitting, nesting, pickles
from mhabridge.checkpoint.pickled.emitting import holds as holds
from mhabridge.checkpoint.pickled.spill import Spill
from mhabridge.checkpoint.pickled.values import Interpreter
from mhabridge.checkpoint.storage import checking
from mhabridge.checkpoint.storage.stored import ITEM_SIZES, StoredFile, StoredObject
from mhabridge.checkpoint.storage.streams import ByteStream
from mhabridge.checkpoint.storage.writing import Outgoing, Sink
from mhabridge.errors import CheckpointError

NAME = "megengine"
_PROTOCOL = 4
_BFLOAT16 = ("megengine.core._imperative_rt", "pybfloat16")
_CODES = {dtype: code for code, dtype in arrays.CODES.items()}
_LARGE = 2**32  # bytes that need an 8-byte length

# What the first opcodes of dicts and lists look like in protocols 0 and 1, which have no header.
_OLD_STARTS = (b"ccollections\n", b"(dp", b"(lp", b"}q", b"]q", b"cnumpy", b"(i")


def sniff(head: bytes) -> bool:
    r"""Whether a file begins as a pickle does; PyTorch's legacy files do too, so ask ``torch_legacy.sniff`` before.

    Example:
        >>> sniff(b"\x80\x04\x95"), sniff(b"PK\x03\x04")
        (True, False)
    """
    return (head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5")) or head.startswith(_OLD_STARTS)


def read(path: str | os.PathLike[str], nested: Sequence[str] | None = None, verify: bool = False) -> StoredFile:
    """Opens a checkpoint.

    Args:
        path: the file.
        nested: the keys under which the state dict lies, () for the top; None to find it.
        verify: accepted since every format's reader takes it; a pickle has no checksum.

    Raises:
        CheckpointError: it is damaged or no pickle, asks for something else than tensors and plain data, or it is not
            clear which part is the state dict.
    """
    path = Path(path)
    with checking.opened(path) as descriptor, Spill(descriptor, path) as spill:
        stream = ByteStream(descriptor, path)
        loaded = pickles.load(stream)
        if stream.left:
            raise checking.damaged(path, f"{stream.left} bytes after the pickle's end", "one pickle")
        found = nesting.find(Interpreter(path, descriptor, spill), loaded, nested)
        return found.opened(path, NAME, spill.files)


def write(
    sink: Sink,
    tensors: Sequence[Outgoing],
    objects: Sequence[StoredObject] = (),
    metadata: Mapping[str, str] | None = None,
    nested: Sequence[str] = (),
) -> None:
    """Write a checkpoint that ``megengine.load`` reads: a state dict of NumPy arrays.

    Args:
        sink: where to.
        tensors: what; those that are tied, of one shape, become one array.
        objects: entries that are no tensors.
        metadata: this format has no room for it; accepted since every format's writer takes it.
        nested: the keys under which to put the state dict.

    Raises:
        CheckpointError: a name occurs twice, an object is not plain data, or NumPy and MegEngine have no such dtype.
    """
    before, heads, after = _planned(tensors, objects, nested)
    uses = Counter(map(_identity, tensors))
    sink.reserve(_written(tensors))
    sink.write(emitting.start(_PROTOCOL) + before)
    memo: dict[object, int] = {}
    for tensor, head in zip(tensors, heads, strict=True):
        same = _identity(tensor)
        sink.write(emitting.value(tensor.name))
        if same in memo:
            sink.write(emitting.recall(memo[same]))
            continue
        sink.write(head)
        sink.later(tensor.nbytes, tensor.write_to)
        sink.write(emitting.TUPLE + emitting.BUILD)
        if tensor.tied is not None and uses[same] > 1:
            memo[same] = len(memo)
            sink.write(emitting.remember(memo[same]))
    sink.write(after + emitting.STOP)


def require_room(
    tensors: Sequence[Outgoing],
    objects: Sequence[StoredObject] = (),
    metadata: Mapping[str, str] | None = None,
    nested: Sequence[str] = (),
) -> None:
    """Refuse what ``write`` refuses, before the first byte is written; the arguments are the same."""
    _planned(tensors, objects, nested)


def _planned(
    tensors: Sequence[Outgoing], objects: Sequence[StoredObject], nested: Sequence[str]
) -> tuple[bytes, list[bytes], bytes]:
    """What comes before the tensors, each one's own beginning, and what comes after them."""
    before, after = emitting.wrapped(tensors, objects, nested)
    for tensor in tensors:
        emitting.value(tensor.name)  # refuses a name that is too long
    return before, [_head(tensor) for tensor in tensors], after


def _written(tensors: Sequence[Outgoing]) -> int:
    """Bytes of all arrays; those of one value of ``tied`` are written once."""
    tied = {_identity(tensor): tensor.nbytes for tensor in tensors if tensor.tied is not None}
    return sum(tied.values()) + sum(tensor.nbytes for tensor in tensors if tensor.tied is None)


def _identity(tensor: Outgoing) -> object:
    return (tensor.tied, tensor.dtype, tensor.shape)


def _head(tensor: Outgoing) -> bytes:
    """An array up to its first byte: ``_reconstruct(ndarray, (0,), b"b")``, and its state but for the end."""
    call = emitting.name("numpy.core.multiarray", "_reconstruct")
    made = b"".join([call, emitting.MARK, emitting.name("numpy", "ndarray"), emitting.value((0,)), b"C\1b"])
    length = (
        b"\x8e" + struct.pack("<Q", tensor.nbytes)
        if tensor.nbytes >= _LARGE
        else b"B" + struct.pack("<I", tensor.nbytes)
    )
    state = [emitting.value(1), emitting.value(tensor.shape), _dtype(tensor), emitting.value(False), length]
    return b"".join([made, emitting.TUPLE, emitting.CALL, emitting.MARK, *state])


def _dtype(tensor: Outgoing) -> bytes:
    """A NumPy dtype, or MegEngine's bfloat16, which stands in its place by its class."""
    if tensor.dtype == "bfloat16":
        code, sizes = (
            emitting.name(*_BFLOAT16),
            (2, 2, 112),
        )  # its item size, alignment and flags, as NumPy 1 writes them
    elif tensor.dtype in _CODES:
        code, sizes = emitting.value(_CODES[tensor.dtype]), (-1, -1, 0)
    else:
        raise CheckpointError(
            tensor.name,
            given=f"dtype {tensor.dtype}",
            expected=f"bfloat16, {', '.join(_CODES)}",
            advice="NumPy and MegEngine have no such numbers: convert the tensor first.",
        )
    order = "|" if ITEM_SIZES[tensor.dtype] == 1 else "<"
    made = [emitting.name("numpy", "dtype"), emitting.MARK, code, emitting.value(False), emitting.value(True)]
    state = emitting.value((3, order, None, None, None, *sizes))
    return b"".join([*made, emitting.TUPLE, emitting.CALL, state, emitting.BUILD])
