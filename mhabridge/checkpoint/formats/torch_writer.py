"""Writes PyTorch's zip form in one pass: what ``torch.save`` of a state dict would write, with our own pickle.

``torch.load(weights_only=True)`` takes it from PyTorch 1.13 on, plain ``torch.load`` from 1.6 on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from mhabridge.checkpoint.formats.zip_writer import ALIGNMENT, ZipWriter
from mhabridge.checkpoint.pickled import emitting, versions
from mhabridge.checkpoint.pickled.torch_tensors import STORAGES
from mhabridge.checkpoint.storage.stored import StoredObject
from mhabridge.checkpoint.storage.writing import Outgoing, Sink

FOLDER = "archive"
_CLASSES = {dtype: name for name, dtype in STORAGES.items() if "Untyped" not in name}

_V2 = emitting.name("torch._utils", "_rebuild_tensor_v2")
_V3 = emitting.name("torch._utils", "_rebuild_tensor_v3")
_NO_HOOKS = b"\x89" + emitting.ORDERED_DICT  # requires_grad=False, and the empty dict of hooks


def write(
    sink: Sink,
    tensors: Sequence[Outgoing],
    objects: Sequence[StoredObject] = (),
    metadata: Mapping[str, str] | None = None,
    nested: Sequence[str] = (),
) -> None:
    """Write a checkpoint that ``torch.load`` reads.

    Args:
        sink: where to.
        tensors: what; those that are tied share one storage.
        objects: entries that are no tensors.
        metadata: of it the versions of module classes are kept, as ``_metadata`` of the state dict.
        nested: the keys under which to put the state dict.

    Raises:
        CheckpointError: a name occurs twice, or an object is not plain data.
    """
    keys, owners = _storages(tensors)
    pickled = _pickled(tensors, keys, objects, metadata, nested)
    sink.reserve(sum(owner.nbytes for owner in owners))
    archive = ZipWriter(sink)
    archive.add(f"{FOLDER}/data.pkl", pickled)
    archive.add(f"{FOLDER}/.format_version", b"1")
    archive.add(f"{FOLDER}/.storage_alignment", str(ALIGNMENT).encode())
    archive.add(f"{FOLDER}/byteorder", b"little")
    for key, owner in enumerate(owners):
        archive.add_emitted(f"{FOLDER}/data/{key}", owner.nbytes, owner.write_to)
    archive.add(f"{FOLDER}/version", b"3\n")
    archive.finish()


def require_room(
    tensors: Sequence[Outgoing],
    objects: Sequence[StoredObject] = (),
    metadata: Mapping[str, str] | None = None,
    nested: Sequence[str] = (),
) -> None:
    """Refuse what ``write`` refuses, before the first byte is written; the arguments are the same."""
    _pickled(tensors, _storages(tensors)[0], objects, metadata, nested)


def _pickled(
    tensors: Sequence[Outgoing],
    keys: Sequence[int],
    objects: Sequence[StoredObject],
    metadata: Mapping[str, str] | None,
    nested: Sequence[str],
) -> bytes:
    """The pickle of a checkpoint whose tensors have these storages."""
    attribute = versions.attribute((metadata or {}).get(versions.KEY))
    before, after = emitting.wrapped(tensors, objects, nested, attribute)
    entries = [emitting.value(tensor.name) + _tensor(tensor, key) for tensor, key in zip(tensors, keys, strict=True)]
    return b"".join([emitting.start(2), before, *entries, after, emitting.STOP])


def _storages(tensors: Sequence[Outgoing]) -> tuple[list[int], list[Outgoing]]:
    """Each tensor's storage, and for each storage the tensor that writes it: the first of those that are tied."""
    numbers: dict[object, int] = {}
    keys: list[int] = []
    owners: list[Outgoing] = []
    for position, tensor in enumerate(tensors):
        same = (tensor.tied, tensor.dtype, tensor.nbytes) if tensor.tied is not None else position
        if same not in numbers:
            numbers[same] = len(owners)
            owners.append(tensor)
        keys.append(numbers[same])
    return keys, owners


def _tensor(tensor: Outgoing, key: int) -> bytes:
    """The call that makes a tensor, with its storage's persistent id."""
    known = tensor.dtype in _CLASSES
    storage = emitting.name(*(("torch", _CLASSES[tensor.dtype]) if known else ("torch.storage", "UntypedStorage")))
    numel = tensor.size if known else tensor.nbytes
    parts = [emitting.value("storage"), storage, *map(emitting.value, (str(key), "cpu", numel))]
    identity = b"".join([emitting.MARK, *parts, emitting.TUPLE, emitting.PERSISTENT])
    place = b"".join(map(emitting.value, (0, tensor.shape, _strides(tensor.shape))))
    dtype = b"" if known else emitting.name("torch", tensor.dtype)
    call = _V2 if known else _V3
    return b"".join([call, emitting.MARK, identity, place, _NO_HOOKS, dtype, emitting.TUPLE, emitting.CALL])


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements for C order; as PyTorch has them, an axis of length 0 counts as one of length 1."""
    lengths = [max(length, 1) for length in shape]
    return tuple(math.prod(lengths[axis + 1 :]) for axis in range(len(lengths)))
