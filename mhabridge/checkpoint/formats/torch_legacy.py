"""PyTorch's checkpoints before 1.6, which ``torch.save`` still writes when told to: pickles, then all storages.

Five pickles follow each other: a magic number, 1001, facts on the machine, the object, the list of the storages' keys;
then, for each of these keys, the number of elements (8 bytes) and the elements, little-endian whatever the machine.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mhabridge.checkpoint.pickled import nesting, pickles, torch_tensors
from mhabridge.checkpoint.pickled.inert import Node
from mhabridge.checkpoint.pickled.spill import Spill
from mhabridge.checkpoint.pickled.torch_tensors import Storage, StorageId
from mhabridge.checkpoint.pickled.values import Interpreter
from mhabridge.checkpoint.storage import checking
from mhabridge.checkpoint.storage.stored import ITEM_SIZES, Extent, StoredFile
from mhabridge.checkpoint.storage.streams import DAMAGED, ByteStream
from mhabridge.errors import CheckpointError

NAME = "torch-legacy"
MAGIC = 0x1950A86A20F9469CFC6C  # torch.serialization.MAGIC_NUMBER
PROTOCOL = 1001
_MAGIC_BYTES = MAGIC.to_bytes(10, "little")
_TAR = b"ustar"  # at byte 257 of a tar archive


def sniff(head: bytes) -> bool:
    """Whether a file is of this format (or of the one before it, which ``read`` refuses), from its first 512 bytes.

    Example:
        >>> import pickle
        >>> sniff(pickle.dumps(MAGIC, protocol=2)), sniff(pickle.dumps({}, protocol=2))
        (True, False)
    """
    return (head[:1] == b"\x80" and _MAGIC_BYTES in head[:32]) or head[257:262] == _TAR


def read(path: str | os.PathLike[str], nested: Sequence[str] | None = None, verify: bool = False) -> StoredFile:
    """Opens a checkpoint.

    Args:
        path: the file.
        nested: the keys under which the state dict lies, () for the top; None to find it.
        verify: accepted since every format's reader takes it; these files have no checksum.

    Raises:
        CheckpointError: it is damaged or not of this format, asks for something else than tensors and plain data, or it
            is not clear which part is the state dict.
    """
    path = Path(path)
    with checking.opened(path) as descriptor, Spill(descriptor, path) as spill:
        stream = ByteStream(descriptor, path)
        _require_magic(stream)
        loaded = pickles.load(stream)
        storages = _storages(stream, loaded)
        interpreter = Interpreter(path, descriptor, spill, lambda node: _find(storages, node))
        found = nesting.find(interpreter, loaded, nested)
        return found.opened(path, NAME, spill.files, found.metadata)


def _require_magic(stream: ByteStream) -> None:
    if stream.read_at(0, min(stream.end, 262))[257:] == _TAR:
        raise CheckpointError(
            str(stream.path),
            given="a tar archive, as PyTorch wrote them before 0.1.10",
            expected="a file of a newer PyTorch",
            advice="Load it with PyTorch 2, and save it again.",
        )
    for number in (MAGIC, PROTOCOL):
        if pickles.load(stream).root != number:
            raise _damaged(stream, "a file that does not start as PyTorch's do")
    pickles.load(
        stream
    )  # the byte order and the sizes of integers where it was written: the storages do not depend on it


def _storages(stream: ByteStream, loaded: pickles.Loaded) -> dict[str, Storage]:
    """The storages behind the pickles; the pickle's persistent ids say what they are made of."""
    named: dict[str, StorageId] = {}
    for node in loaded.ids:
        found = torch_tensors.storage_id(node)
        if isinstance(found, StorageId):
            named.setdefault(found.key, found)
    keys = pickles.load(stream).root
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in named for key in keys):
        raise _damaged(stream, "storages that no tensor has")
    storages = {key: _storage(stream, named[key]) for key in keys}
    if stream.left or len(storages) != len(keys):
        raise _damaged(stream, f"{stream.left} bytes after the last storage, and {len(keys)} storages")
    return storages


def _storage(stream: ByteStream, named: StorageId) -> Storage:
    count = int.from_bytes(stream.take(8), "little", signed=True)
    if count != named.numel:
        raise _damaged(stream, f"a storage of {count} elements that should have {named.numel}")
    length = count * (ITEM_SIZES[named.dtype] or 0)
    return Storage(named.key, named.dtype, count, Extent(0, stream.skip(length), length))


def _find(storages: dict[str, Storage], node: Node) -> Storage | str:
    named = torch_tensors.storage_id(node)
    if isinstance(named, str):
        return named
    found = storages.get(named.key)
    size = ITEM_SIZES[named.dtype] or 0
    if found is None or found.extent.length != named.numel * size:
        return "a tensor whose storage is not in the file"
    if named.view is None:
        return Storage(named.key, named.dtype, named.numel, found.extent)
    key, start, count = named.view
    if start + count > named.numel:
        return "a part of a storage that goes beyond it"
    return Storage(key, named.dtype, count, Extent(0, found.extent.offset + start * size, count * size))


def _damaged(stream: ByteStream, given: str) -> CheckpointError:
    return CheckpointError(str(stream.path), given=given, expected="a checkpoint of torch.save", advice=DAMAGED)
