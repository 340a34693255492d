"""What MindSpore writes into the metadata of a safetensors file, beside ``{"format": "ms"}`` (seen in 2.10).

``crc_num`` is a CRC-32 over each name and its tensor's bytes, by name; ``remove_redundancy`` says that this is one
rank's part of a distributed model; and a tensor's own name with the value ``Int4`` says that its bytes hold two numbers
each.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

from mhabridge.checkpoint.stored import StoredFile
from mhabridge.errors import CheckpointError

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


def require_checksum(file: StoredFile) -> None:
    """Compare ``crc_num`` with the file's content, where there is one.

    Raises:
        CheckpointError: they differ.
    """
    stated = file.metadata.get("crc_num")
    if stated is None:
        return
    crc = 0
    for name in sorted(file):
        crc = zlib.crc32(name.encode(), crc)
        for piece in file.chunks(file[name]):
            crc = zlib.crc32(piece, crc)
    if stated != str(crc):
        file.close()
        raise CheckpointError(
            str(file.path),
            given=f"content that cannot be read (its CRC-32 is {crc})",
            expected=f"crc_num {stated[:20]}",
            advice="The file is damaged: copy or download it again.",
        )
