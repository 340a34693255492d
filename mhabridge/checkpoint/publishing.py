"""Writes a planned target, reads it back, and gives it its name only if it is what it should be."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from mhabridge.checkpoint.formats import sharded
from mhabridge.checkpoint.formats.known import Format, open_checkpoint
from mhabridge.checkpoint.pickled import versions
from mhabridge.checkpoint.planning import origins, sidecar, verifying
from mhabridge.checkpoint.planning.plan import Plan
from mhabridge.checkpoint.storage import atomic
from mhabridge.checkpoint.storage.checksums import SumError
from mhabridge.checkpoint.storage.parallel import Workers
from mhabridge.checkpoint.storage.stored import StoredFile, StoredObject
from mhabridge.checkpoint.storage.writing import Outgoing, Sink
from mhabridge.errors import CheckpointError

Progress = Callable[[int, int], None]


@dataclasses.dataclass
class Job:
    """Writing one target.

    Args:
        file: the open source.
        target: the path.
        format: its format.
        plan: what is to be written.
        objects: the entries that are no tensors.
        framework: the target's; None for the source's.
        force: whether an existing target may be replaced.
        verify: whether the result is read back before it gets its name.
        progress: called with the bytes done and the bytes in all, each of which counts twice when it is also verified.
        shard_size: bytes of one file, when the target is sharded.
        sync: whether to wait until the bytes are on the disk.
        workers: threads that write and compare.

    Attributes:
        removed: names of files that the old target had and the new one has not, and that are gone.
    """

    file: StoredFile
    target: Path
    format: Format
    plan: Plan
    objects: Sequence[StoredObject]
    framework: str | None
    force: bool
    verify: bool
    progress: Progress | None
    shard_size: int
    sync: bool
    workers: int
    removed: Sequence[str] = ()

    def run(self) -> str | None:
        """Write, verify and publish.

        Returns:
            What is wrong with the result, which then was not published; None when nothing is.

        Raises:
            CheckpointError: the target cannot be written, or a checksum that the source keeps is wrong.
        """
        self._done, self._total = 0, sum(one.nbytes for one in self.plan.outgoing) * (2 if self.verify else 1)
        self._counting = threading.Lock()
        self._require_any()
        try:
            if self.format.name == sharded.NAME:
                self._run_sharded()
            else:
                self._run_single()
        except _Wrong as wrong:
            return str(wrong)
        return None

    def require_possible(self) -> None:
        """Refuse what ``run`` refuses before it writes: it writes nothing, so it is all that a dry run can tell.

        Raises:
            CheckpointError: the format has no place for something, or the target may not be written.
        """
        self._require_any()
        atomic.require_replaceable(self._written, self.force)
        if self.format.name == sharded.NAME:
            sharded.require_room(self.target, self._groups, self.objects, self._metadata())
        else:
            self.format.require_room(self.plan.outgoing, self.objects, self._metadata(), self.file.nested)

    def touched(self) -> list[Path]:
        """The files that ``run`` makes, replaces or removes; the target is among them."""
        gone = sharded.given_up(self.target, len(self._groups)) if self.format.name == sharded.NAME else []
        return [*self._written, *gone]

    @property
    def _written(self) -> list[Path]:
        if self.format.name == sharded.NAME:
            return sharded.written(self.target, len(self._groups))
        return [*self._beside()[0], self.target]

    @functools.cached_property
    def _groups(self) -> list[list[Outgoing]]:
        return sharded.by_size(self.plan.outgoing, self.shard_size)

    def _run_single(self) -> None:
        assert self.format.write is not None
        _, specs = self._beside()
        with (
            atomic.replacing_all(self._written, self.force, self.sync) as descriptors,
            Workers(self.workers) as workers,
        ):
            sink = Sink(descriptors[-1], self._progressed, workers)
            self.format.write(sink, self.plan.outgoing, self.objects, self._metadata(), self.file.nested)
            if len(descriptors) > 1:
                Sink(descriptors[0]).write(specs.encode())
            workers.wait()
            self._require_right(descriptors[-1:], workers)

    def _beside(self) -> tuple[list[Path], str]:
        """The path of what travels beside the target, if anything does, and its text.

        One that is there already speaks of the old target: it must not stay.
        """
        path = sidecar.path_beside(self.target)
        needed = not self._has_metadata and (self.plan.specs is not None or os.path.lexists(path))
        return [path] if needed else [], self.plan.specs or sidecar.Specs(framework=self.framework).dumped()

    def _run_sharded(self) -> None:
        self.removed = sharded.write(
            self.target,
            self._groups,
            self.objects,
            self._metadata(),
            self.force,
            self.sync,
            self.workers,
            progress=self._progressed,
            check=lambda descriptors, workers: self._require_right(descriptors[:-1], workers),
        )

    def _require_right(self, descriptors: Sequence[int], workers: Workers) -> None:
        """Read back what has no name yet, and see what the source's own checksums say."""
        if not self.verify:
            return
        with contextlib.ExitStack() as stack:
            paths = [f"/proc/self/fd/{descriptor}" for descriptor in descriptors]
            try:
                written = [stack.enter_context(open_checkpoint(path, self.file.nested)) for path in paths]
                wrong = verifying.fault(
                    self.file,
                    written,
                    self.plan.outgoing,
                    self.plan.checks,
                    self.objects,
                    workers,
                    self._progressed,
                )
            except SumError:
                raise
            except CheckpointError as error:
                said = re.sub(r"/proc/self/fd/\d+", lambda found: str(self.target), str(error))
                raise _Wrong(f"it cannot be read back: {said}") from error
            if self.keeps_versions and written[0].metadata != self._metadata():
                wrong = wrong or "other versions of module classes"
        if wrong is not None:
            raise _Wrong(wrong)

    def _require_any(self) -> None:
        """Not every format has a file without anything in it, or without any tensor."""
        beside = self.objects or (self.file.nested and not self.format.bare)  # keys under which nothing lies
        if self.plan.outgoing or (self.format.bare if beside else self.format.empty):
            return
        raise CheckpointError(
            str(self.target),
            given="no tensor to write" if beside else "nothing to write",
            expected=f"at least one tensor: a {self.format.name} file without any is none",
            advice="See what --drop leaves out, or write .safetensors.",
        )

    @property
    def loses_versions(self) -> bool:
        """Whether the source has versions of module classes, which the target does not get."""
        return versions.KEY in self.file.metadata and not self.keeps_versions

    @property
    def keeps_versions(self) -> bool:
        """Whether the target gets them: they speak of PyTorch's modules, by their paths in the source."""
        same = all(entry.unchanged for entry in self.plan.entries if entry.target is not None)
        return versions.KEY in self.file.metadata and self.format.versions and same

    @property
    def _has_metadata(self) -> bool:
        return self.format.name in ("safetensors", sharded.NAME)

    def _metadata(self) -> dict[str, str]:
        if not self._has_metadata:
            return {versions.KEY: self.file.metadata[versions.KEY]} if self.keeps_versions else {}
        metadata = {name: text for name, text in self.file.metadata.items() if name not in (sidecar.KEY, versions.KEY)}
        if self.framework is not None:
            metadata.pop("format", None)
            mark = origins.mark_of(origins.dialect(self.framework).framework)
            metadata.update({"format": mark} if mark else {})
        if self.plan.specs is not None:
            metadata[sidecar.KEY] = self.plan.specs
        return metadata

    @property
    def _progressed(self) -> Callable[[int], None] | None:
        """What is called with the bytes that were just written or compared, if somebody wants to know."""
        if self.progress is None:
            return None
        return functools.partial(self._advance, self.progress)

    def _advance(self, progress: Progress, count: int) -> None:
        with self._counting:
            self._done += count
            progress(min(self._done, self._total), self._total)


class _Wrong(Exception):
    """The result is not what it should be: nothing is published."""
