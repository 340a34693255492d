"""What MindSpore writes into the metadata of a safetensors file, beside ``{"format": "ms"}`` (seen in 2.10).

``crc_num`` is a CRC-32 over each name and its tensor's bytes, by name; ``remove_redundancy`` says that this is one
rank's part of a distributed model; and a tensor's own name with the value ``Int4`` says that its bytes hold two numbers
each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mhabridge.checkpoint.storage.checksums import Checksum
from mhabridge.checkpoint.storage.stored import Extent, StoredTensor

OF_THE_BYTES = ("crc_num", "remove_redundancy")  # what describes that one file, not the model in it


def is_packed(name: str, metadata: Mapping[str, str]) -> bool:
    """Whether the metadata says that a tensor of int8 really holds 4-bit integers.

    Example:
        >>> is_packed("q.weight", {"format": "ms", "q.weight": "Int4"})
        True
    """
    return metadata.get(name) == "Int4"


def notes(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """What people should know.

    Example:
        >>> notes({"remove_redundancy": "True"})
        ('remove_redundancy is True: tensors that another rank of the distributed model keeps are not in this file.',)
    """
    if metadata.get("remove_redundancy") != "True":
        return ()
    return (
        "remove_redundancy is True: tensors that another rank of the distributed model keeps are not in this file.",
    )


def checksums(tensors: Iterable[StoredTensor], metadata: Mapping[str, str]) -> tuple[Checksum, ...]:
    """What ``crc_num`` says of a file's tensors, where there is one."""
    stated = metadata.get("crc_num")
    if stated is None:
        return ()
    parts: list[Extent | bytes] = []
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        parts += [tensor.name.encode(), *tensor.extents]
    return (
        Checksum("", tuple(parts), int(stated) if stated.isdecimal() and len(stated) <= 10 else -1),
    )  # no content has -1
