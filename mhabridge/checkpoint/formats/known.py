"""Every checkpoint format in one table, and opening a file by what is in it, whatever its name says."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mhabridge.checkpoint.formats import (
    megengine,
    mindspore_ckpt,
    mindspore_writing,
    npz,
    npz_writing,
    safetensors_file,
    sharded,
    torch_legacy,
    torch_writer,
    torch_zip,
)
from mhabridge.checkpoint.pickled import emitting
from mhabridge.checkpoint.storage import checking
from mhabridge.checkpoint.storage.stored import StoredFile, StoredObject
from mhabridge.errors import ArgumentTypeError, CheckpointError

_LFS = b"version https://git-lfs"
_HEAD = 512  # bytes


@dataclasses.dataclass(frozen=True)
class Format:
    """One checkpoint format.

    Args:
        name: for people, and for ``find``.
        endings: of the names of such files; none for one that shares another format's.
        sniff: whether a file may be of this format, from its first 512 bytes.
        read: opens a file: ``read(path, nested, verify)``.
        write: writes one: ``write(sink, tensors, objects, metadata, nested)``; None when the format is only read, or
            is no single file.
        require_room: refuses what ``write`` refuses, and writes nothing; its arguments are those after the sink.
        holds: whether an entry that is no tensor can be written.
        ties: whether tensors that are one in the source are one in a file of this format.
        versions: whether the versions of PyTorch's module classes have a place in it.
        empty: whether there are files of this format without anything in them.
        bare: whether there are files of it with other entries, and no tensor.
    """

    name: str
    endings: tuple[str, ...]
    sniff: Callable[[bytes], bool]
    read: Callable[[Path, Sequence[str] | None, bool], StoredFile]
    write: Callable[..., None] | None
    require_room: Callable[..., None]
    holds: Callable[[StoredObject], bool]
    ties: bool = False
    versions: bool = False
    empty: bool = True
    bare: bool = True


def _read_shards(path: Path, nested: Sequence[str] | None, verify: bool) -> StoredFile:
    def open_shard(shard: Path) -> StoredFile:
        if any(found.name == sharded.NAME for found in (by_name(shard), *_by_content(shard)) if found):
            raise sharded.damaged(path, f"it is an index that names another one, {shard.name}")
        return open_checkpoint(shard, nested, verify)

    return sharded.read(path, open_shard)


# In this order content is looked at: a zip archive or a pickle may be of several formats, so the strictest comes first.
FORMATS = (
    Format(
        safetensors_file.NAME,
        (".safetensors",),
        safetensors_file.sniff,
        safetensors_file.read,
        safetensors_file.write,
        safetensors_file.require_room,
        safetensors_file.holds,
    ),
    Format(npz.NAME, (".npz",), npz.sniff, npz.read, npz_writing.write, npz_writing.require_room, npz_writing.holds),
    Format(
        "torch",
        (".pt", ".pth", ".bin", ".pth.tar"),
        torch_zip.sniff,
        torch_zip.read,
        torch_writer.write,
        torch_writer.require_room,
        emitting.holds,
        ties=True,
        versions=True,
        bare=False,
    ),
    Format("torch-legacy", (), torch_legacy.sniff, torch_legacy.read, None, torch_writer.require_room, emitting.holds),
    Format(
        mindspore_ckpt.NAME,
        (".ckpt",),
        mindspore_ckpt.sniff,
        mindspore_ckpt.read,
        mindspore_writing.write,
        mindspore_writing.require_room,
        mindspore_writing.holds,
        empty=False,
    ),
    Format(
        "megengine",
        (".pkl", ".mge"),
        megengine.sniff,
        megengine.read,
        megengine.write,
        megengine.require_room,
        emitting.holds,
        ties=True,
        bare=False,
    ),
    Format(
        sharded.NAME,
        (sharded.ENDING,),
        sharded.sniff,
        _read_shards,
        None,
        safetensors_file.require_room,
        safetensors_file.holds,
    ),
)


def by_name(path: str | os.PathLike[str]) -> Format | None:
    """The format that a file's name says.

    Example:
        >>> by_name("model.ckpt").name, by_name("model.safetensors.index.json").name, by_name("model.txt")
        ('mindspore-ckpt', 'sharded', None)
    """
    name = Path(path).name.lower()
    fitting = [(len(ending), found) for found in FORMATS for ending in found.endings if name.endswith(ending)]
    return max(fitting, key=lambda pair: pair[0])[1] if fitting else None


def open_checkpoint(
    path: str | os.PathLike[str], nested: Sequence[str] | None = None, verify: bool = False
) -> StoredFile:
    """Open a checkpoint of any format; when its content and its name disagree, a note says so.

    Args:
        path: the file, or the index of a sharded one.
        nested: the keys under which the state dict lies, () for the top; None to find it.
        verify: also compare the checksums that the file has, which reads all of it.

    Raises:
        ArgumentTypeError: that is no path, or these are no keys.
        CheckpointError: the file is missing, damaged, of an unknown format, or asks for something that we refuse to do.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ArgumentTypeError("path", given=f"{path!r:.80}", expected="a path: a string or a pathlib.Path")
    path, nested = Path(path), _keys(nested)
    named, found = by_name(path), _by_content(path)
    chosen = found[0] if found else named
    if chosen is None:
        raise CheckpointError(
            str(path),
            given=f"a file named {path.suffix or 'without an ending'}, whose content says nothing either",
            expected="one of " + ", ".join(ending for one in FORMATS for ending in one.endings),
            advice="Save the tensors with safetensors, from the framework that wrote the file.",
        )
    file = chosen.read(path, nested, verify)
    if named not in (None, chosen) and chosen.endings:
        file.notes = (*file.notes, f"{path.name} is a {chosen.name} file by its content, whatever its name says.")
    return file


def _keys(nested: Any) -> tuple[str, ...] | None:
    """The keys under which a state dict lies; a text is one of them."""
    if nested is None:
        return None
    keys = (nested,) if isinstance(nested, str) else tuple(nested) if isinstance(nested, Sequence) else (nested,)
    if not all(isinstance(key, str) for key in keys):
        raise ArgumentTypeError(
            "nested", given=f"{nested!r:.80}", expected="a key, or a tuple of keys; () is the top of the file"
        )
    return keys


def _by_content(path: Path) -> list[Format]:
    with checking.opened(path) as descriptor:
        head = os.pread(descriptor, _HEAD, 0)
    if head.startswith(_LFS):
        raise CheckpointError(
            str(path),
            given="a Git LFS pointer: the file itself was not fetched",
            expected="a checkpoint file",
            advice="Run `git lfs pull` in its folder, or download the file.",
        )
    return [found for found in FORMATS if found.sniff(head)]
