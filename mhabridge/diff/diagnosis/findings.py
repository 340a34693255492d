"""What a diagnosis says: the faults that explain an observed output, or that none of the known ones does."""

from __future__ import annotations

import dataclasses
from typing import Any

from mhabridge.diff.judge import plain_number


@dataclasses.dataclass(frozen=True)
class Fault:
    """One thing that went wrong.

    Args:
        name: of the kind of fault, such as "projection transposed".
        where: the parameter, mask or step that it happened to, such as "out_weight".
        words: in a sentence: what was done, and what should have been done.
        mend: the line that mends it, such as "out_proj.weight: transpose".
    """

    name: str
    where: str
    words: str
    mend: str


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What explains one side's difference from the float64 reference.

    Args:
        layer: the path of the layer; "" for the one layer of ``mb.diff``.
        side: the name of the side that is off.
        faults: those that together explain the observed tensors to rounding; empty when no known fault does.
        sure: "certain" (no other hypothesis comes near), "likely" (others explain it nearly as well) or "" for
            none.
        others: further single or paired faults that explain it as well; what was observed cannot tell them apart.
        explains: the observed difference after the faults are taken into account, as a multiple of the rounding
            bound; at most 1 when explained.
        tried: how many hypotheses were tried.
        words: the whole in a few sentences.
    """

    layer: str
    side: str
    faults: tuple[Fault, ...] = ()
    sure: str = ""
    others: tuple[tuple[Fault, ...], ...] = ()
    explains: float = float("nan")
    tried: int = 0
    words: str = ""

    @property
    def explained(self) -> bool:
        """Whether a known fault explains it."""
        return bool(self.faults)

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, as JSON can hold them."""
        fields = dataclasses.asdict(self)
        fields["explains"] = plain_number(self.explains)
        return fields
