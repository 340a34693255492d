"""Whether a target, read back and mapped back, has the source's bits in every tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mhabridge.checkpoint.formats.scalars import as_tensor
from mhabridge.checkpoint.planning.drafts import Check
from mhabridge.checkpoint.storage.blocks import Scratch
from mhabridge.checkpoint.storage.comparing import all_zero, same_bits
from mhabridge.checkpoint.storage.stored import StoredFile, StoredObject
from mhabridge.checkpoint.storage.writing import Outgoing


def fault(
    source: StoredFile,
    written: Sequence[StoredFile],
    outgoing: Sequence[Outgoing],
    checks: Sequence[Check],
    objects: Sequence[StoredObject] = (),
) -> str | None:
    """What is wrong with a target; None when nothing is.

    Args:
        source: what was converted.
        written: the target, in one file or several.
        outgoing: the tensors that it must have, and no other.
        checks: what holds them against the source.
        objects: the entries that it must have, and that are no tensors.

    Raises:
        CheckpointError: a file cannot be read.
    """
    holders = {name: file for file in written for name in file}
    if sum(map(len, written)) != len(holders):
        return "a tensor is in two files"
    found = {name: (file[name].dtype, file[name].shape) for name, file in holders.items()}
    scalar = [
        one for one in map(as_tensor, objects) if one is not None and one.name in found
    ]  # formats of tensors only
    wanted = {one.name: (one.dtype, one.shape) for one in [*outgoing, *scalar]}
    different = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    if different:
        return f"{', '.join(different[:8])}: missing, unexpected, or of another dtype or shape"
    kept = {entry.name: repr(entry.value) for file in written for entry in file.objects}
    kept.update({one.name: repr(holders[one.name].read(one.name).item()) for one in scalar})
    lost = [entry.name for entry in objects if kept.get(entry.name) != repr(entry.value)]
    if lost:
        return f"{', '.join(lost[:8])}: missing, or another value"
    scratch = Scratch()
    wrong = (one.target for one in checks if not _holds(source, holders, one, scratch))
    return next((f"{name}: other numbers than the source's" for name in wrong), None)


def _holds(source: StoredFile, holders: Mapping[str, StoredFile], check: Check, scratch: Scratch) -> bool:
    file = holders[check.target]
    view = check.view_of(file[check.target])
    return all_zero(file, view) if check.source is None else same_bits(source, check.source, file, view, scratch)
