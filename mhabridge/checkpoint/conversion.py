"""Converts a checkpoint: plan, write in one pass, read back, compare with the source bit for bit, then publish."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mhabridge.checkpoint.formats import known, sharded
from mhabridge.checkpoint.formats.known import Format, open_checkpoint
from mhabridge.checkpoint.planning import origins, renaming
from mhabridge.checkpoint.planning import plan as planning
from mhabridge.checkpoint.planning.plan import Entry, Options, Plan
from mhabridge.checkpoint.publishing import Job, Progress
from mhabridge.checkpoint.storage import checking
from mhabridge.checkpoint.storage.parallel import usual_count
from mhabridge.checkpoint.storage.stored import StoredFile, StoredObject
from mhabridge.errors import ArgumentError, ArgumentTypeError, CheckpointError

_VERSIONS = "The versions of module classes (PyTorch's _metadata) are not kept."
_SHARD = 5 << 30  # bytes: what Hugging Face's libraries write


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """What a conversion did, or would do.

    Args:
        source: the file that was read.
        target: the file that was written; None for a dry run.
        source_format: its format.
        target_format: its format.
        entries: what happened to each tensor.
        kept: entries that are no tensors and were kept.
        left_out: those that were not, with the reason.
        notes: what people should know.
        verified: the target was read back, mapped back and compared with the source bit for bit; None if it was not.
        bytes: of the tensors in the target.
    """

    source: str
    target: str | None
    source_format: str
    target_format: str
    entries: tuple[Entry, ...]
    kept: tuple[str, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    verified: bool | None
    bytes: int

    @property
    def ok(self) -> bool:
        """Whether nothing stands against the result."""
        return self.verified is not False

    @property
    def counts(self) -> dict[str, int]:
        """How many tensors each rule concerned."""
        return dict(Counter(entry.rule for entry in self.entries))

    def to_json(self) -> str:
        """The report as one JSON object."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["entries"] = [entry.to_dict() for entry in self.entries]
        return json.dumps({"ok": self.ok, **fields, "counts": self.counts})


def convert_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    to: str | None = None,
    spec: Any = None,
    rename: Any = None,
    drop: Sequence[str] = (),
    allow_missing: Sequence[str] = (),
    force: bool = False,
    dry_run: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
    *,
    num_heads: int | None = None,
    layout: str | None = None,
    source: str | None = None,
    kinds: Mapping[str, str] | None = None,
    names_of: Mapping[str, tuple[int, ...]] | str | os.PathLike[str] | None = None,
    nested: Sequence[str] | None = None,
    ignore_objects: bool = False,
    shard_size: int = _SHARD,
    sync: bool = False,
    workers: int | None = None,
) -> ConversionReport:
    """Convert a checkpoint to another format, another framework's names and layouts, or both.

    The framework is not needed, and nothing in a file is executed. Formats are found by content (the source's) and by
    ending (the target's): ``.safetensors``, ``.safetensors.index.json`` (sharded), ``.pt``, ``.pth`` or ``.bin``,
    ``.ckpt``, ``.pkl``, ``.npz``. Memory stays small whatever the size of the file.

    Args:
        src: the checkpoint.
        dst: what to write. It appears whole or not at all.
        to: "torch", "mindspore", "mindspore.mint" or "megengine", with a version or without; None to keep all names
            and layouts and change the format only.
        spec: an ``MHASpec`` for all attention layers, or a mapping from their prefixes to them, where file and
            config.json do not tell enough.
        rename: a function, a mapping, or rules such as "module.*=*"; applied first. No name for a rule is an error.
        drop: patterns of what to leave out: tensors, and entries that are none.
        allow_missing: patterns of names in ``names_of``, which must be given, that may stay without a value.
        force: replace an existing target.
        dry_run: make the plan and write nothing. What would be refused is refused, so that a plan can be carried out.
        verify: read the result back and compare it with the source bit for bit before it takes its name; the source's
            own checksums are looked at too.
        progress: called with the bytes done and the bytes in all (each counts twice when it is also verified), from any
            thread, one at a time.
        num_heads: of all attention layers.
        layout: of the target's attention layers, such as "hf-bert"; None for the framework's own.
        source: the framework that the file is from; None to find out.
        kinds: what a layer is, by a pattern of paths, where names and shapes leave two readings.
        names_of: the target's real names and shapes (or a checkpoint that has them), which must be filled exactly.
        nested: the keys under which the state dict lies; None to find it.
        ignore_objects: leave out entries that would take code to make.
        shard_size: bytes of one file, when the target is sharded.
        sync: wait until the bytes are on the disk, so that they also survive a power failure; as with ``cp``, the
            system otherwise writes them out in its own time.
        workers: threads that write and compare; None for as many as there are processors, two at most.

    Returns:
        The report; its ``verified`` is False when the result is not what it should be: then nothing was published.

    Raises:
        ArgumentError: an option that cannot be, or something about the file that has to be said.
        CheckpointError: a file that cannot be read, or a target that cannot be written, or is the source itself and
            would lose something.
        UnsupportedError: attention that is no plain multi-head attention, or that the target cannot hold.
        WeightsError: a tensor that would be lost, or a name that would be filled twice or not at all.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from mhabridge import MHASpec, MHAWeights
        >>> folder, spec = Path(tempfile.mkdtemp()), MHASpec(4, 2)
        >>> np.savez(folder / "a.npz", **MHAWeights.random(spec).to_layout("torch", spec, prefix="attn"))
        >>> report = convert_checkpoint(folder / "a.npz", folder / "a.pkl", to="megengine", spec=spec)
        >>> report.ok, [(entry.target, entry.after) for entry in report.entries]
        (True, [('attn.io_weight_bias', (1, 80))])
    """
    if not isinstance(dst, (str, os.PathLike)):
        raise ArgumentTypeError("dst", given=f"{dst!r:.80}", expected="a path: a string or a pathlib.Path")
    _require_count("shard_size", shard_size)
    _require_count("workers", 1 if workers is None else workers)
    if progress is not None and not callable(progress):
        raise ArgumentTypeError("progress", given=f"{progress!r:.80}", expected="a function, or None")
    target, workers = Path(dst), usual_count() if workers is None else workers
    format = _format_of(target)
    options = Options(to, layout, source, spec, num_heads, rename, drop, allow_missing, kinds or {}, _names(names_of))
    with open_checkpoint(src, nested) as file:
        notes = planning.require_inert_allowed(file, ignore_objects, options.drop)
        plan = planning.make(file, options)
        kept, left_out = _sorted_objects(file, format, options.drop)
        report = _report(file, format, plan, kept, [*left_out, *notes], origins.notes_on_format(to, format.name))
        job = Job(file, target, format, plan, kept, to, force, verify, progress, shard_size, sync, workers)
        if job.loses_versions:
            report = dataclasses.replace(report, notes=(*report.notes, _VERSIONS))
        _require_nothing_lost(report, job)
        _require_no_part(job)
        if dry_run:
            job.require_possible()
            return report
        wrong = job.run()
    if wrong is not None:
        return dataclasses.replace(report, verified=False, notes=(*report.notes, f"Not written: {wrong}."))
    report = dataclasses.replace(report, target=str(target), verified=True if verify else None)
    if job.removed:
        gone = f"{_few(job.removed)}: removed; the old index named it, the new one does not."
        report = dataclasses.replace(report, notes=(*report.notes, gone))
    return report


def _report(
    file: StoredFile,
    format: Format,
    plan: Plan,
    kept: Sequence[StoredObject],
    left_out: Sequence[str],
    notes: Sequence[str],
) -> ConversionReport:
    """What a plan would do."""
    return ConversionReport(
        str(file.path),
        None,
        file.format,
        format.name,
        plan.entries,
        tuple(entry.name for entry in kept),
        tuple(left_out),
        (*file.notes, *plan.notes, *notes, *_torn(plan, format)),
        None,
        sum(one.nbytes for one in plan.outgoing),
    )


def _require_nothing_lost(report: ConversionReport, job: Job) -> None:
    """Refuse to write over the source itself what is not all of it, and over a part of it, such as one of its shards.

    Raises:
        CheckpointError: something would be gone, or a checkpoint in several files would no longer be whole.
    """
    lost = [*(name for entry in report.entries if entry.target is None for name in entry.sources), *report.left_out]
    if job.loses_versions:
        lost.append("the versions of module classes (_metadata)")
    read = {_identity(file) for file in job.file.paths}
    hit = [file.name for file in job.touched() if _identity(file) in read - {None}]
    whole = _identity(job.target) == _identity(job.file.path)
    if hit and (lost or not whole):
        what = f"the source itself, without {_few(lost)}" if whole else f"{_few(hit)}, which the source is read from"
        raise CheckpointError(
            str(job.target),
            given=what,
            expected="another file",
            advice="What is left out would be lost: write to another name." if lost else "Write to another name.",
        )


def _require_no_part(job: Job) -> None:
    """Refuse to write over one file of a checkpoint in several, whose index stays.

    Raises:
        CheckpointError: that checkpoint would no longer be whole.
    """
    touched = job.touched()
    own = {_identity(file) for file in touched} - {None}
    for file in touched:
        index = sharded.index_of(file) if _identity(file) else None
        if index is not None and _identity(index) not in own:
            raise CheckpointError(
                str(file),
                given=f"a file that {index.name} lists",
                expected="another file",
                advice="That checkpoint would no longer be whole: write to another name, or convert the index.",
            )


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a file from all others, whatever it is called; None when there is none."""
    try:
        found = path.stat()
    except (OSError, ValueError):  # ValueError: NUL in the name
        return None
    return found.st_dev, found.st_ino


def _format_of(target: Path) -> Format:
    format = known.by_name(target)
    if format is None or (format.write is None and format.name != sharded.NAME):
        endings = [ending for one in known.FORMATS for ending in one.endings]
        raise CheckpointError(
            str(target),
            given=f"a target named {target.suffix or 'without an ending'}",
            expected="one of " + ", ".join(endings),
            advice="The target's ending says its format.",
        )
    return format


def _sorted_objects(file: StoredFile, format: Format, drop: Sequence[str]) -> tuple[list[StoredObject], list[str]]:
    kept, left_out = [], []
    for entry in file.objects:
        if entry.inert:
            continue
        pattern = renaming.matches_entry(entry.name, drop)
        if pattern is not None:
            left_out.append(f"{entry.name}: left out ({entry.text}); dropped by --drop {pattern}")
        elif format.holds(entry):
            kept.append(entry)
        else:
            left_out.append(f"{entry.name}: left out ({entry.text}); {format.name} has no place for it")
    return kept, left_out


def _torn(plan: Plan, format: Format) -> list[str]:
    """Notes on tensors that are one in the source, in a format that cannot say so."""
    if format.ties:
        return []
    tied: dict[tuple[str, str, int], list[str]] = {}
    for one in plan.outgoing:
        if one.tied is not None and one.nbytes:
            tied.setdefault((one.tied, one.dtype, one.nbytes), []).append(one.name)
    return [
        f"{_few(names)}: one tensor in the source; {format.name} keeps each by itself"
        for names in tied.values()
        if len(names) > 1
    ]


def _few(names: Sequence[str]) -> str:
    return ", ".join([*names[:8], *["..."][: len(names) > 8]])


def _require_count(name: str, given: Any) -> None:
    if not isinstance(given, int) or isinstance(given, bool):
        raise ArgumentTypeError(name, given=f"{given!r:.80}", expected="a whole number from 1 on")
    if given < 1:
        raise ArgumentError(name, given=str(given), expected="a whole number from 1 on")


def _names(given: Any) -> Mapping[str, tuple[int, ...]] | None:
    if given is None:
        return None
    if isinstance(given, Mapping):
        for name, shape in given.items():
            if not isinstance(name, str) or not isinstance(shape, (tuple, list)) or not checking.is_shape(shape):
                raise ArgumentTypeError(
                    "names_of", given=f"{name!r:.80} with {shape!r:.80}", expected="shapes (tuples of lengths) by name"
                )
        return {name: tuple(shape) for name, shape in given.items()}
    with open_checkpoint(given) as file:
        return {name: tensor.shape for name, tensor in file.items()}
