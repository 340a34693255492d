"""A checkpoint in several files, and the ``*.index.json`` that says which tensor is in which: read as one, or written.

The form is Hugging Face's: ``{"metadata": {"total_size": ...}, "weight_map": {tensor: file}}``.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mhabridge.checkpoint.formats import safetensors_file
from mhabridge.checkpoint.formats.safetensors_header import unique
from mhabridge.checkpoint.storage import atomic, checking
from mhabridge.checkpoint.storage.checksums import Checksum
from mhabridge.checkpoint.storage.parallel import Workers, usual_count
from mhabridge.checkpoint.storage.stored import Extent, StoredFile, StoredObject, StoredTensor
from mhabridge.checkpoint.storage.writing import Outgoing, Sink
from mhabridge.errors import CheckpointError

NAME = "sharded"
ENDING = ".index.json"
_LONGEST_INDEX = 32_000_000  # bytes
_MOST_SHARDS = 10_000


def sniff(head: bytes) -> bool:
    """Whether a file that begins so may be an index.

    Example:
        >>> sniff(b'{"metadata": {}'), sniff(b"PK")
        (True, False)
    """
    return head.lstrip()[:1] == b"{"


def read(
    path: str | os.PathLike[str],
    open_shard: Callable[[Path], StoredFile],
) -> StoredFile:
    """Open all files of an index as one checkpoint.

    Args:
        path: the index.
        open_shard: opens one of the files.

    Raises:
        CheckpointError: the index is damaged, names a file outside its folder, or says something else of the tensors
            than the files do; or one of these cannot be read.
    """
    path = Path(path)
    content = _content(path)
    merged = _Merged(path)
    for shard, names in _by_shard(path, content["weight_map"]).items():
        file = _inside(path, shard)
        with open_shard(file) as opened:
            _require_same(path, shard, names, opened)
            merged.add(opened)
    merged.note_size(content.get("metadata"))
    return merged.opened()


def write(
    path: str | os.PathLike[str],
    shards: Sequence[Sequence[Outgoing]],
    objects: Sequence[StoredObject] = (),
    metadata: Mapping[str, str] | None = None,
    force: bool = False,
    sync: bool = True,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
    check: Callable[[Sequence[int], Workers], None] | None = None,
) -> list[str]:
    """Write safetensors files and their index; none has its name before all are whole.

    What the index that is replaced named, and the new one does not, is removed afterwards: files of the names that are
    given here, and no others.

    Args:
        path: the index, named ``<stem>.index.json``; the files are ``<stem>-00001-of-00002.safetensors`` beside it.
        shards: the tensors of each file; ``by_size`` makes such groups.
        objects: entries that are no tensors; they are kept in the first file.
        metadata: of each file.
        force: whether existing files may be replaced.
        sync: whether to wait until the bytes are on the disk.
        workers: threads that write; None for as many as there are processors, two at most.
        progress: called with the number of bytes that were just written, from any of the threads.
        check: called with the descriptors of the files, and of the index, before they get their names, and with the
            threads; when it raises, nothing is written.

    Returns:
        The names of the files that were removed.

    Raises:
        CheckpointError: as ``safetensors_file.write`` and ``atomic.replacing_all``; or a tensor is in two shards, or
            the index gets too long.
    """
    index = Path(path)
    text = _planned(index, shards)
    targets = written(index, len(shards))
    old = given_up(index, len(shards)) if force else []
    with atomic.replacing_all(targets, force, sync) as descriptors:
        count = usual_count() if workers is None else workers
        # The kernel lets one thread at a time write to a file: where there are enough, each has files of its own.
        apart = 1 < count <= len(shards) // 2
        with Workers(count) as threads:

            def write_shard(number: int) -> None:
                sink = Sink(descriptors[number], progress, threads, divided=not apart)
                sink.scratch = threads.scratch
                safetensors_file.write(sink, shards[number], objects if number == 0 else (), metadata)

            jobs = [functools.partial(write_shard, number) for number in range(len(shards))]
            if apart:
                threads.give_all(jobs)
            else:
                for job in jobs:
                    job()
            threads.wait()
            Sink(descriptors[-1]).write(text)
            if check is not None:
                check(descriptors, threads)
    return _removed(old)


def require_room(
    path: str | os.PathLike[str],
    shards: Sequence[Sequence[Outgoing]],
    objects: Sequence[StoredObject] = (),
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Refuse what ``write`` refuses, before the first byte is written; the arguments are the same."""
    _planned(Path(path), shards)
    for number, shard in enumerate(shards):
        safetensors_file.require_room(shard, objects if number == 0 else (), metadata)


def written(index: Path, count: int) -> list[Path]:
    """The files that are written for so many shards, the index last.

    Example:
        >>> [path.name for path in written(Path("a.safetensors.index.json"), 1)]
        ['a-00001-of-00001.safetensors', 'a.safetensors.index.json']
    """
    return [*(index.with_name(name) for name in _file_names(index, count)), index]


def given_up(index: Path, count: int) -> list[Path]:
    """The files of the index that is there now, which one of so many shards does not name: they are removed with it."""
    names = _file_names(index, count)
    files = [index.with_name(name) for name in _old_files(index) if name not in names]
    return [file for file in files if file.is_file() and not file.is_symlink()]


def _planned(index: Path, shards: Sequence[Sequence[Outgoing]]) -> bytes:
    """The text of the index.

    Raises:
        CheckpointError: it is called otherwise, a tensor is in two shards, or the text gets too long.
    """
    if not index.name.endswith(ENDING):
        raise CheckpointError(str(index), given="the name of an index", expected=f"one that ends in {ENDING}")
    checking.require_names([tensor.name for shard in shards for tensor in shard])
    return _index_text(_file_names(index, len(shards)), shards)


def by_size(tensors: Sequence[Outgoing], limit: int) -> list[list[Outgoing]]:
    """Groups of tensors in order, each of at most so many bytes; a tensor that is larger has a group of its own.

    Example:
        >>> tensors = [Outgoing(str(size), "uint8", (size,), lambda sink: None) for size in (3, 2, 9)]
        >>> [[tensor.name for tensor in group] for group in by_size(tensors, 6)]
        [['3', '2'], ['9']]
    """
    groups: list[list[Outgoing]] = [[]]
    room = limit
    for tensor in tensors:
        if tensor.nbytes > room and groups[-1]:
            groups.append([])
            room = limit
        groups[-1].append(tensor)
        room -= tensor.nbytes
    return groups


class _Merged:
    """One checkpoint in the making, from those of the shards."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: list[StoredTensor] = []
        self.objects: list[StoredObject] = []
        self.metadata: dict[str, str] = {}
        self.files: list[Any] = []
        self.notes: list[str] = []
        self.checksums: list[Checksum] = []

    def add(self, shard: StoredFile) -> None:
        if len(self.tensors) + len(shard) > checking.MOST_TENSORS:
            raise damaged(self.path, f"more than {checking.MOST_TENSORS} tensors")
        self.tensors += (self._moved(tensor) for tensor in shard.values())
        for kept in shard.checksums:
            parts = tuple(part if isinstance(part, bytes) else self._moved_extent(part) for part in kept.parts)
            self.checksums.append(dataclasses.replace(kept, of=shard.path.name, parts=parts))
        self.files += shard.files
        self.objects += shard.objects
        self.notes += (f"{shard.path.name}: {note}" for note in shard.notes)
        for key, text in shard.metadata.items():
            if self.metadata.setdefault(key, text) != text:
                self.notes.append(f"{shard.path.name}: its metadata has another {key} than a file before it.")

    def note_size(self, stated: Any) -> None:
        total = stated.get("total_size") if isinstance(stated, dict) else None
        found = sum(tensor.nbytes for tensor in self.tensors)
        if total is not None and total != found:
            self.notes.append(f"The index speaks of {total!r:.40} bytes, and the tensors have {found}.")

    def opened(self) -> StoredFile:
        return StoredFile(
            self.path,
            NAME,
            self.tensors,
            tuple(self.objects),
            self.metadata,
            files=tuple(self.files),
            notes=tuple(self.notes),
            checksums=tuple(self.checksums),
        )

    def _moved_extent(self, extent: Extent) -> Extent:
        return dataclasses.replace(extent, file=extent.file + len(self.files))

    def _moved(self, tensor: StoredTensor) -> StoredTensor:
        extents = tuple(map(self._moved_extent, tensor.extents))
        return dataclasses.replace(tensor, extents=extents, storage=f"{len(self.files)} {tensor.storage}")


def _content(path: Path) -> dict[str, Any]:
    with checking.opened(path) as descriptor:
        size = os.fstat(descriptor).st_size
        text = os.pread(descriptor, min(size, _LONGEST_INDEX), 0)
    try:
        content = checking.json_of(text, object_pairs_hook=unique)
    except ValueError as error:
        raise damaged(path, f"it is no JSON: {error}") from None
    found = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not all(isinstance(shard, str) for shard in found.values()):
        raise damaged(path, "it has no weight_map from names to files")
    return dict(content)


def _by_shard(path: Path, weight_map: Mapping[str, str]) -> dict[str, set[str]]:
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        shards.setdefault(shard, set()).add(name)
    if len(shards) > _MOST_SHARDS:
        raise damaged(path, f"it names {len(shards)} files")
    return shards


def _inside(index: Path, shard: str) -> Path:
    """Where a shard lies: in the index's folder or below it.

    A link may lead out of it only to the folder into which the index itself is a link: Hugging Face's cache keeps all
    files of a model there.
    """
    given = Path(shard)
    file = index.parent / given
    try:
        allowed = (index.parent.resolve(), index.resolve().parent)
        real = file.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a name with NUL, or links in a circle
        raise damaged(index, f"the file name {shard!r:.80}: {error}") from None
    if given.is_absolute() or ".." in given.parts or not any(folder in real.parents for folder in allowed):
        raise CheckpointError(
            str(index),
            given=f"the file {shard!r:.80}, which is not in its folder",
            expected="files beside the index",
            advice="Move them there if you trust where they come from.",
        )
    if real == index.resolve():
        raise damaged(index, "it names itself as a file with tensors")
    return file


def _require_same(index: Path, shard: str, names: set[str], found: StoredFile) -> None:
    for missing, what in ((names - set(found), "is not in"), (set(found) - names, "is, against the index, in")):
        if missing:
            first = ", ".join(sorted(missing)[:8])
            raise damaged(index, f"{first} {what} {shard}")


def damaged(path: Path, why: str) -> CheckpointError:
    """The error for a file that is no index, or a wrong one."""
    return checking.damaged(path, why, "the index of a checkpoint in several files")


def _stem(index: Path) -> str:
    return index.name[: -len(ENDING)].removesuffix(".safetensors")


def _file_names(index: Path, count: int) -> list[str]:
    stem = _stem(index)
    return [f"{stem}-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def _old_files(index: Path) -> list[str]:
    """The files of an index that is to be replaced, as far as they are named as those that are written here."""
    try:
        listed = set(_content(index)["weight_map"].values())
    except CheckpointError:  # none, or a broken one: whose files those beside it are, nobody knows
        return []
    ours = re.compile(re.escape(_stem(index)) + r"-\d{5}-of-\d{5}\.safetensors")
    return sorted(name for name in listed if ours.fullmatch(name))


def index_of(file: Path) -> Path | None:
    """The index beside a file that lists it; None if there is none."""
    for index in sorted(file.parent.glob(f"*{ENDING}")):
        try:
            if file.name in _content(index)["weight_map"].values():
                return index
        except CheckpointError:  # no index, or a broken one: it loses nothing
            continue
    return None


def _removed(files: Sequence[Path]) -> list[str]:
    """Remove files; their names."""
    for file in files:
        file.unlink(missing_ok=True)
    return [file.name for file in files]


def _index_text(names: Sequence[str], shards: Sequence[Sequence[Outgoing]]) -> bytes:
    weight_map = {tensor.name: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
    total = sum(tensor.nbytes for tensors in shards for tensor in tensors)
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    text = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
    if len(text) > _LONGEST_INDEX:
        raise CheckpointError("the index", given=f"{len(text)} bytes", expected=f"at most {_LONGEST_INDEX}")
    return text
