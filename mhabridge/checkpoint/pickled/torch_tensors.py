"""PyTorch's pickled tensors and storages, interpreted from inert records.

A tensor is ``torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks[, metadata])``; the
older form without a number ends after ``stride``, and ``_v3``, for dtypes without a storage class of their own, has the
dtype before the metadata. A storage is a persistent id ``("storage", class, key, location, numel)``, with a sixth entry
in files that are no zip.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from mhabridge.checkpoint.pickled.inert import Made, Name, Node, Persistent, Table
from mhabridge.checkpoint.storage import checking
from mhabridge.checkpoint.storage.stored import ITEM_SIZES, Extent, StoredTensor

STORAGES = {
    **{"FloatStorage": "float32", "DoubleStorage": "float64", "HalfStorage": "float16", "BFloat16Storage": "bfloat16"},
    **{"CharStorage": "int8", "ShortStorage": "int16", "IntStorage": "int32", "LongStorage": "int64"},
    **{"ByteStorage": "uint8", "BoolStorage": "bool"},
    **{"ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128"},
    "UntypedStorage": "uint8",  # counted in bytes
    "_UntypedStorage": "uint8",
}
_MODULES = ("torch", "torch.cuda", "torch.storage")

# How many arguments a call has at least, and where its dtype is; after those comes one more at most, the metadata.
REBUILD: dict[str, tuple[int, int | None]] = {
    "torch._utils._rebuild_tensor": (4, None),
    "torch._utils._rebuild_tensor_v2": (6, None),
    "torch._utils._rebuild_tensor_v3": (7, 6),
}
PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
FROM_TYPE = "torch._tensor._rebuild_from_type_v2"
TENSOR_CLASSES = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer", "torch._tensor.Tensor")

# Tensors that are no plain array of numbers, by the call that makes them.
REFUSED = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_sparse_csr_tensor": "a sparse tensor",
    "torch._utils._rebuild_qtensor": "a quantised tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor on the meta device, which has no numbers",
    "torch._utils._rebuild_wrapper_subclass": "a tensor of a subclass",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor of another device's own form",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "a tensor of another device's own form",
    "torch._utils._rebuild_xla_tensor": "a tensor of another device's own form",
    "torch.storage._load_from_bytes": "a tensor that was pickled without torch.save",
}


# PyTorch writes {"conj": True} or {"neg": True} behind the tensor's other arguments.
_UNRESOLVED = (
    "a view whose numbers PyTorch conjugates or negates when it reads them, such as tensor.conj()",
    "Save tensor.resolve_conj().resolve_neg() instead, or leave it out (--drop).",
)


class Storage(NamedTuple):
    """Where a storage lies.

    Args:
        key: what it is called in the file.
        dtype: a key of ``ITEM_SIZES``; uint8 for untyped ones.
        numel: how many elements of that dtype the pickle says that it has.
        extent: its bytes.
        big_endian: their order.
        checksum: of them, as ``StoredTensor`` has it.
    """

    key: str
    dtype: str
    numel: int
    extent: Extent
    big_endian: bool = False
    checksum: tuple[int, int] | None = None


class StorageId(NamedTuple):
    """A persistent id of a storage, taken apart; ``view`` is (key, start, numel) of a part of it, or None."""

    key: str
    dtype: str
    numel: int
    view: tuple[str, int, int] | None


def storage_id(node: Node) -> StorageId | str:
    """The storage that a persistent id means, or what is wrong with it."""
    parts = node.id if isinstance(node, Persistent) else None
    if not isinstance(parts, tuple) or len(parts) not in (5, 6) or parts[0] != "storage":
        return "a tensor whose storage is not one of torch.save's"
    kind, key, numel = parts[1], parts[2], parts[4]
    view = parts[5] if len(parts) == 6 else None
    if not (
        isinstance(kind, Name) and isinstance(key, str) and _are_counts((numel,)) and (view is None or _is_view(view))
    ):
        return "a storage without a class, a key and a length"
    if kind.module not in _MODULES or kind.name not in STORAGES:
        return f"a storage of {kind}"
    return StorageId(key, STORAGES[kind.name], numel, view)


def tensor(node: Made, name: str, storage_of: Callable[[Node], Storage | str]) -> StoredTensor | str:
    """The tensor that a record of ``REBUILD`` stands for, or what is wrong with it.

    Args:
        node: the record.
        name: the tensor's.
        storage_of: finds the storage of a persistent id, or says what is wrong.
    """
    least, dtype_at = REBUILD[node.known_as]
    args, metadata = node.args[:least], node.args[least:]
    if len(args) < least or len(metadata) > 1:
        return f"{len(node.args)} arguments for a tensor"
    unreadable = _UNRESOLVED if any(part is not None and not _is_empty(part) for part in metadata) else None
    storage = storage_of(args[0])
    if isinstance(storage, str):
        return storage
    dtype = storage.dtype if dtype_at is None else _dtype(args[dtype_at])
    if not dtype:
        return "a tensor of a dtype that no format here has"
    start, shape, strides = args[1], _size(args[2]), _size(args[3])
    whole = isinstance(shape, tuple) and isinstance(strides, tuple) and _are_counts((start, *strides))
    if not whole or not checking.is_shape(shape):
        return "a tensor whose offset, shape or strides are not whole numbers"
    if len(shape) != len(strides):
        return f"{len(strides)} strides for {len(shape)} axes"
    steps = None if in_order(shape, strides) else strides
    rest = (storage.big_endian, storage.checksum, unreadable)
    return StoredTensor(name, dtype, shape, (storage.extent,), f"storage {storage.key}", start, steps, *rest)


def in_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether strides (in elements) are those of C order; axes of length 1 may have any.

    Example:
        >>> in_order((2, 1, 3), (3, 99, 1)), in_order((2, 3), (1, 2))
        (True, False)
    """
    step = 1
    for length, stride in zip(shape[::-1], strides[::-1], strict=True):
        if stride != step and length != 1:
            return 0 in shape
        step *= length
    return True


def _size(node: Node) -> Node:
    """A shape, which old files hold as a ``torch.Size``."""
    return node.args[0] if isinstance(node, Made) and node.known_as == "torch.Size" and len(node.args) == 1 else node


def _dtype(node: Node) -> str:
    found = node.name if isinstance(node, Name) and node.module == "torch" else ""
    return found if found in ITEM_SIZES else ""


def _are_counts(nodes: Node) -> bool:
    return isinstance(nodes, tuple) and all(map(_is_count, nodes))


def _is_count(node: Node) -> bool:
    return type(node) is int and 0 <= node < 2**62


def _is_view(node: Node) -> bool:
    return isinstance(node, tuple) and len(node) == 3 and isinstance(node[0], str) and _are_counts(node[1:])


def _is_empty(node: Node) -> bool:
    return isinstance(node, Table) and not node.pairs
