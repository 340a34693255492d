"""What a hypothesis is, and the table of all kinds that are tried.

A kind is a function from a ``Case`` to hypotheses; a new kind of fault is one more function in ``KINDS``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from mhabridge.diff.diagnosis.evidence import Case
from mhabridge.diff.diagnosis.findings import Fault
from mhabridge.diff.diagnosis.state import State

Change = Callable[[State], "State | None"]
Kind = Callable[[Case], "Iterator[Hypothesis]"]


@dataclasses.dataclass(frozen=True, eq=False)
class Hypothesis:
    """One thing that may have gone wrong.

    Args:
        fault: what it is called, and how it is mended.
        change: makes of a computation the one that went wrong in this way; None where that cannot be.
        rare: tried in pairs only after all others.
        alone: not tried in pairs.
        latent: tried in pairs even where it changes nothing by itself, since what it is about (fully masked rows) may
            come from another fault.
    """

    fault: Fault
    change: Change
    rare: bool = False
    alone: bool = False
    latent: bool = False


def hypotheses(case: Case) -> list[Hypothesis]:
    """All that can be said of this case, the usual ones first."""
    from mhabridge.diff.diagnosis import biases, heads, masking, packed, projections, steps

    kinds: tuple[Kind, ...] = (
        projections.transposed,
        packed.reordered,
        packed.flat_blocks,
        packed.wrong_slice,
        packed.repacked,
        packed.flat_by_turns,
        packed.shifted_slice,
        heads.interleaved,
        heads.not_moved,
        heads.wrong_number,
        biases.missing,
        biases.doubled,
        biases.misplaced,
        biases.appended_rows,
        masking.fully_masked,
        masking.inverted,
        masking.ignored,
        masking.added,
        masking.multiplied,
        masking.causal,
        masking.float_masks,
        masking.turned,
        steps.scale,
        steps.softmax_axis,
        steps.residual,
        steps.output_projection,
        steps.inputs,
        steps.returned,
    )
    found = [each for kind in kinds for each in kind(case)]
    return sorted(found, key=lambda each: each.rare)
