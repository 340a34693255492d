"""``diff_checkpoints``: two files laid side by side, compared in one pass, and what explains the differences."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from mhabridge import packing
from mhabridge.checkpoint.formats.known import open_checkpoint
from mhabridge.diff.checkpoints import explaining
from mhabridge.diff.checkpoints.drawing import draw
from mhabridge.diff.checkpoints.entries import Item, lay_out, note_objects
from mhabridge.diff.checkpoints.matching import settle_blocks
from mhabridge.diff.checkpoints.sides import Checkpoint
from mhabridge.diff.checkpoints.working import Progress, compare_all
from mhabridge.diff.report import DiffReport, Entry, Run
from mhabridge.errors import ArgumentError


def diff_checkpoints(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    num_heads: int | None = None,
    spec: Any = None,
    rename: Any = (),
    nested: Sequence[str] | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    pictures: bool = False,
) -> DiffReport:
    """Compare the weights of two checkpoints of any framework, format and layout, in canonical form.

    Neither framework is needed, and nothing in a file is executed. Memory stays small whatever the size of the files.
    Attention layers are compared parameter by parameter, other layers under the names that PyTorch has for their
    parameters, and everything else by name.

    Args:
        a: the first checkpoint, against which the second is held.
        b: the second.
        num_heads: of all attention layers; weights can be compared without it.
        spec: an ``MHASpec`` for all attention layers, or a mapping from prefixes to them, where the files do not tell
            enough. What only one of the files tells counts for both.
        rename: rules that give the first file's names those of the second, such as "encoder.*=bert.encoder.*".
        nested: the keys under which the state dicts lie; None to find them.
        workers: threads; None for as many as there are processors, at most four.
        progress: called with the bytes done and the bytes in all.
        pictures: draw what differs.

    Returns:
        The report; a tensor is "equal" (bits), "rounding" (the same numbers, as far as two dtypes can hold them, or
        zeros of other signs), "off", or "broken" (missing, another shape or dtype, NaN or infinity).

    Raises:
        ArgumentError: an option that cannot be.
        CheckpointError: a file that cannot be read.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import numpy as np
        >>> from mhabridge import MHASpec, MHAWeights
        >>> folder, spec = Path(tempfile.mkdtemp()), MHASpec(4, 2)
        >>> weights = MHAWeights.random(spec)
        >>> for layout in ("torch", "gpt2"):
        ...     np.savez(folder / f"{layout}.npz", **weights.to_layout(layout, spec, prefix="attn"))
        >>> report = diff_checkpoints(folder / "torch.npz", folder / "gpt2.npz")
        >>> report.verdict, [entry.tensor for entry in report.entries][:2]
        ('equal', ['q_weight', 'k_weight'])
    """
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open_checkpoint(path, nested)) for path in (a, b)]
        _require_prefixes(spec, files)
        first, second = (
            Checkpoint(file, rules, spec, num_heads) for file, rules in zip(files, (rename, None), strict=True)
        )
        noted, scalars = note_objects(first, second)
        notes = [*settle_blocks(first, second), *noted]
        laid = lay_out(first, second)
        _compare(laid.items, workers, progress)
        names = (str(a), str(b))
        entries = tuple(_entry(item, names) for item in (*laid.items, *scalars))
        wrong = next((entry.layer for entry in entries if not entry.ok), None)
        diagnoses, searched = explaining.explain(laid.matched, names[1])
        return DiffReport(
            (_run(names[0], first), _run(names[1], second)),
            entries,
            "checkpoints",
            layers=laid.layers,
            diagnoses=diagnoses,
            pictures=draw(laid.items, names) if pictures else (),
            first_divergence=wrong,
            notes=(*notes, *laid.notes, *searched),
        )


def _require_prefixes(spec: Any, files: Sequence[Any]) -> None:
    if isinstance(spec, Mapping):
        for prefix in spec:
            if not any(packing.below(prefix, file) for file in files):
                raise ArgumentError(
                    "spec", given=f"one for {prefix!r}", expected="a prefix of tensors in one of the files"
                )


def _compare(items: Sequence[Item], workers: int | None, progress: Progress | None) -> None:
    """Fill in the comparisons that need the numbers."""
    left = [item for item in items if item.comparison is None]
    for item, found in zip(left, compare_all([item.pair for item in left], workers, progress), strict=True):
        item.comparison = found


def _entry(item: Item, names: tuple[str, str]) -> Entry:
    assert item.comparison is not None
    return Entry(item.layer, item.tensor, *names, item.comparison)


def _run(name: str, side: Checkpoint) -> Run:
    environment = {"format": side.file.format, "tensors": str(len(side.file))}
    return Run(name, side.framework, "", "", "answered", "", side.file.notes, environment)
