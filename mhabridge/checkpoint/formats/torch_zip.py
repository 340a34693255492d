"""PyTorch's checkpoints, as ``torch.save`` writes them since 1.6: a zip archive of a pickle and the storages.

``archive/data.pkl`` is the pickle, ``archive/data/<key>`` a storage's bytes, ``archive/byteorder`` "little" or "big"
(absent in old files: little). The folder has any name. Members are never compressed, and start at multiples of 64.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mhabridge.checkpoint.formats.torch_writer import write as write
from mhabridge.checkpoint.formats.zips import LOCAL_MAGIC, STORED, Archive, Member
from mhabridge.checkpoint.pickled import nesting, pickles, torch_tensors
from mhabridge.checkpoint.pickled.emitting import holds as holds
from mhabridge.checkpoint.pickled.inert import Node
from mhabridge.checkpoint.pickled.spill import Spill
from mhabridge.checkpoint.pickled.torch_tensors import Storage
from mhabridge.checkpoint.pickled.values import Interpreter
from mhabridge.checkpoint.storage import checking
from mhabridge.checkpoint.storage.crc import crc32
from mhabridge.checkpoint.storage.stored import CHUNK, ITEM_SIZES, Extent, StoredFile
from mhabridge.checkpoint.storage.streams import ByteStream
from mhabridge.errors import CheckpointError

NAME = "torch"

# Archives of PyTorch that are programs, told by a member whose name ends so.
_PROGRAMS = {
    "/constants.pkl": "a TorchScript archive (a compiled program)",
    "/archive_format": "an archive of torch.export (a compiled program)",
    "serialized_exported_program.json": "an archive of torch.export (a compiled program)",
}


def sniff(head: bytes) -> bool:
    r"""Whether a file may be of this format, from its first bytes; ``is_ours`` then tells.

    Example:
        >>> sniff(b"PK\x03\x04"), sniff(b"\x80\x02")
        (True, False)
    """
    return head.startswith(LOCAL_MAGIC)


def is_ours(path: str | os.PathLike[str]) -> bool:
    """Whether a zip archive is one of PyTorch's, also of a kind that ``read`` refuses.

    Raises:
        CheckpointError: it is a damaged archive.
    """
    with checking.opened(Path(path)) as descriptor:
        names = Archive(descriptor, Path(path)).members
    return any(name.rsplit("/", 1)[-1] == "data.pkl" or _program(name) for name in names)


def read(path: str | os.PathLike[str], nested: Sequence[str] | None = None, verify: bool = False) -> StoredFile:
    """Opens a checkpoint.

    Args:
        path: the file.
        nested: the keys under which the state dict lies, () for the top; None to find it.
        verify: also compare each storage's checksum now, which reads the whole file.

    Raises:
        CheckpointError: it is damaged or not of this format, holds a program, has compressed or encrypted members, asks
            for something else than tensors and plain data, or it is not clear which part is the state dict.
    """
    path = Path(path)
    with checking.opened(path) as descriptor, Spill(descriptor, path) as spill:
        records = _Records(descriptor, path)
        if verify:
            records.verify()
        loaded = records.pickle()
        interpreter = Interpreter(path, descriptor, spill, records.storage)
        found = nesting.find(interpreter, loaded, nested)
        return found.opened(path, NAME, spill.files, found.metadata)


class _Records:
    """The members of an archive, as the pickle in it refers to them."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor, self._path = descriptor, path
        self._archive = Archive(descriptor, path)
        self._folder = self._find_folder()
        self._contents: dict[str, tuple[Extent, int]] = {}  # of storages by their keys: where they lie, and the CRC-32
        self._big_endian = self._small("byteorder", b"little") == b"big"

    def pickle(self) -> pickles.Loaded:
        member = self._member("data.pkl")
        start = self._archive.content(member)
        self._require_crc(member, start)
        stream = ByteStream(self._descriptor, self._path, start, start + member.size)
        loaded = pickles.load(stream)
        if stream.left:
            raise self._archive.damaged(f"{stream.left} bytes after the pickle's end")
        return loaded

    def verify(self) -> None:
        for name in self._archive.members:
            if name.startswith(self._folder):
                member = self._member(name[len(self._folder) :])
                self._require_crc(member, self._archive.content(member))

    def storage(self, node: Node) -> Storage | str:
        """The storage of a persistent id, or what is wrong with it."""
        named = torch_tensors.storage_id(node)
        if isinstance(named, str):
            return named
        if named.view is not None:
            return "a part of a storage, which archives do not have"
        if named.key not in self._contents:
            member = self._member(f"data/{named.key}")
            self._contents[named.key] = Extent(0, self._archive.content(member), member.size), member.crc
        extent, crc = self._contents[named.key]
        nbytes = named.numel * (ITEM_SIZES[named.dtype] or 0)
        if extent.length != nbytes:
            return f"a storage of {extent.length} bytes that should have {nbytes}"
        checksum = (0, crc) if crc else None
        return Storage(named.key, named.dtype, named.numel, extent, self._big_endian, checksum)

    def _find_folder(self) -> str:
        names = self._archive.members
        for name in names:
            if _program(name):
                raise CheckpointError(
                    str(self._path),
                    given=_program(name),
                    expected="a checkpoint with tensors",
                    advice="Load it with PyTorch, and save its state_dict() with torch.save.",
                )
        found = [name for name in names if name.rsplit("/", 1)[-1] == "data.pkl" and name.count("/") <= 1]
        if len(found) != 1:
            raise CheckpointError(
                str(self._path),
                given=f"a zip archive with {len(found)} members called data.pkl",
                expected="one, as torch.save writes it",
                advice="If the archive contains a checkpoint, unpack it and name that file.",
            )
        return found[0][: -len("data.pkl")]

    def _member(self, name: str) -> Member:
        member = self._archive.members.get(self._folder + name)
        if member is None:
            raise self._archive.damaged(f"no member {self._folder + name!r}")
        if member.method != STORED or member.encrypted:
            raise CheckpointError(
                f"{self._path}: {member.name}",
                given="an encrypted member" if member.encrypted else f"a compressed member (method {member.method})",
                expected="stored bytes, as torch.save writes them",
                advice="Unpack the archive and pack it again with `zip -0`, or load and save it with PyTorch.",
            )
        return member

    def _small(self, name: str, absent: bytes) -> bytes:
        if self._folder + name not in self._archive.members:
            return absent
        member = self._member(name)
        start = self._archive.content(member)
        return ByteStream(self._descriptor, self._path, start, start + member.size).take(min(member.size, 16)).strip()

    def _require_crc(self, member: Member, start: int) -> None:
        stream, crc = ByteStream(self._descriptor, self._path, start, start + member.size), 0
        while stream.left:
            crc = crc32(stream.take(min(stream.left, CHUNK)), crc)
        if member.crc and crc != member.crc:
            raise self._archive.damaged(f"{member.name!r} with CRC-32 {crc:08x} instead of {member.crc:08x}")


def _program(name: str) -> str:
    """What a member says that its archive is, if that is a program; else nothing."""
    return next((what for end, what in _PROGRAMS.items() if name.endswith(end)), "")
