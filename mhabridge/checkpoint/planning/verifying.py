"""Whether a target, read back and mapped back, has the source's bits in every tensor."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from mhabridge.checkpoint.formats.scalars import as_tensor
from mhabridge.checkpoint.planning.drafts import Check
from mhabridge.checkpoint.storage import checksums
from mhabridge.checkpoint.storage.checksums import Checksum, Running
from mhabridge.checkpoint.storage.comparing import all_zero, same_bits
from mhabridge.checkpoint.storage.parallel import WORTH_A_THREAD, Stopped, Workers
from mhabridge.checkpoint.storage.stored import Extent, StoredFile, StoredObject
from mhabridge.checkpoint.storage.writing import Outgoing


def fault(
    source: StoredFile,
    written: Sequence[StoredFile],
    outgoing: Sequence[Outgoing],
    checks: Sequence[Check],
    objects: Sequence[StoredObject],
    workers: Workers,
    progress: Callable[[int], None] | None = None,
) -> str | None:
    """What is wrong with a target; None when nothing is. The source's own checksums are looked at on the way.

    Args:
        source: what was converted.
        written: the target, in one file or several.
        outgoing: the tensors that it must have, and no other.
        checks: what holds them against the source.
        objects: the entries that it must have, and that are no tensors.
        workers: threads that compare, those that wrote: they have memory already. An error stops them.
        progress: called with the number of bytes that were just compared, from any of the threads.

    Raises:
        CheckpointError: a file cannot be read; ``checksums.SumError`` when it is the source that is damaged.
    """
    holders = {name: file for file in written for name in file}
    wrong = _other_tensors(written, holders, outgoing, objects) or _other_objects(written, holders, objects)
    if wrong is not None:
        return wrong
    comparison = _Comparison(source, holders, workers, progress or (lambda count: None))
    try:
        comparison.run(checks)
    except _Different as different:
        return f"{different}: other numbers than the source's"
    return None


def _other_tensors(
    written: Sequence[StoredFile],
    holders: Mapping[str, StoredFile],
    outgoing: Sequence[Outgoing],
    objects: Sequence[StoredObject],
) -> str | None:
    if sum(map(len, written)) != len(holders):
        return "a tensor is in two files"
    found = {name: (file[name].dtype, file[name].shape) for name, file in holders.items()}
    wanted = {one.name: (one.dtype, one.shape) for one in [*outgoing, *_scalars(holders, objects)]}
    different = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    return f"{', '.join(different[:8])}: missing, unexpected, or of another dtype or shape" if different else None


def _other_objects(
    written: Sequence[StoredFile], holders: Mapping[str, StoredFile], objects: Sequence[StoredObject]
) -> str | None:
    kept = {entry.name: repr(entry.value) for file in written for entry in file.objects}
    kept.update({one.name: repr(holders[one.name].read(one.name).item()) for one in _scalars(holders, objects)})
    lost = [entry.name for entry in objects if kept.get(entry.name) != repr(entry.value)]
    return f"{', '.join(lost[:8])}: missing, or another value" if lost else None


def _scalars(holders: Mapping[str, StoredFile], objects: Sequence[StoredObject]) -> list[Outgoing]:
    """The entries that formats of tensors only keep as tensors."""
    return [one for one in map(as_tensor, objects) if one is not None and one.name in holders]


class _Comparison:
    """Compares tensor after tensor, large ones on other threads."""

    def __init__(
        self, source: StoredFile, holders: Mapping[str, StoredFile], workers: Workers, progress: Callable[[int], None]
    ) -> None:
        self._source, self._holders, self._workers, self._progress = source, holders, workers, progress
        kept = checksums.kept_by(source)
        self._files_sums = [one for one in kept if one in source.checksums]
        self._sums = {one.parts: one for one in kept if one not in source.checksums}

    def run(self, checks: Sequence[Check]) -> None:
        try:
            for together, checksum in self._grouped(checks):
                if sum(check.source.nbytes for check in together if check.source) < WORTH_A_THREAD:
                    self._compare_all(together, checksum)
                else:
                    self._workers.give(functools.partial(self._compare_all, together, checksum))
            for left in [*self._sums.values(), *self._files_sums]:
                self._workers.give(functools.partial(self._sum_up, left))
            self._workers.wait()
        except BaseException:
            self._workers.stop()  # before the caller closes the files
            raise

    def _grouped(self, checks: Sequence[Check]) -> Iterator[tuple[Sequence[Check], Checksum | None]]:
        """Checks, each by itself but where several in a row read just what a checksum is of: nothing is read twice."""
        by_storage: dict[tuple[Extent, ...], dict[int, Check]] = {}
        for check in checks:
            tensor = check.source
            if tensor is not None and tensor.checksum and tensor.plain and tensor.extents in self._sums:
                by_storage.setdefault(tensor.extents, {}).setdefault(tensor.start, check)
        covered: set[int] = set()
        for extents, starts in by_storage.items():
            row = [starts[start] for start in sorted(starts)]
            parts = [extent for check in row if check.source for extent in check.source.plain_extents()]
            if _joined(parts) == _joined(extents):
                covered.update(map(id, row))
                yield row, self._sums.pop(extents)
        yield from (([check], None) for check in checks if id(check) not in covered)

    def _sum_up(self, checksum: Checksum) -> None:
        checksums.require(self._source, checksum, self._workers.scratch)

    def _compare_all(self, together: Sequence[Check], checksum: Checksum | None) -> None:
        running = Running(checksum) if checksum else None
        for check in together:
            self._compare(check, running)
        if running is not None:
            running.require(self._source)

    def _compare(self, check: Check, running: Running | None) -> None:
        file = self._holders[check.target]
        view = check.view_of(file[check.target])
        if check.source is None:
            if not all_zero(file, view):
                raise _Different(check.target)
            return

        def watch(piece: memoryview) -> None:
            if self._workers.stopped:
                raise Stopped
            if running is not None:
                running.add(piece)
            self._progress(len(piece))

        if not same_bits(self._source, check.source, file, view, self._workers.scratch, watch):
            raise _Different(check.target)


def _joined(extents: Iterable[Extent]) -> list[Extent]:
    """The same bytes in as few extents as possible."""
    found: list[Extent] = []
    for one in extents:
        last = found[-1] if found else None
        if last is not None and (last.file, last.offset + last.length) == (one.file, one.offset):
            found[-1] = dataclasses.replace(last, length=last.length + one.length)
        else:
            found.append(one)
    return found


class _Different(Exception):
    """A tensor that is not the source's."""
