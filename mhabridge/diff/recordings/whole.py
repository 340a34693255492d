"""The model's own answer: what shows a fault that comes after the last layer that was recorded.

It has no reference. What lies between that layer and the end is like what lies between two layers, so the same is
allowed there (``drift``), and more where the answer is but a few numbers (``drift.luck``). Without it nothing is known
of what comes after the last layer, and that is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mhabridge.diff.recordings.answers import Apart, Side, compare_answers
from mhabridge.diff.recordings.attention_calls import Compared
from mhabridge.diff.recordings.matching import Pair
from mhabridge.recording.reading import Recording

if TYPE_CHECKING:
    from mhabridge.diff.recordings.walking import Step

STEPPED = "its layers were given another run's inputs: the model's output is not compared"


def is_whole(first: Side, second: Side) -> bool:
    """Whether a call is one of the model itself, of which a side has nothing but the answer."""
    return first[1].whole or second[1].whole


def compare_whole(first: Side, second: Side, far: Apart) -> Compared:
    """Compare the answers of the model.

    Args:
        first: a recording, the model as a layer, and the call.
        second: likewise.
        far: how far they may be apart.
    """
    compared = Compared()
    if first[0].stepped or second[0].stepped:
        compared.notes.append(STEPPED)
    else:
        compare_answers(first, second, far, compared)
    return compared


def cause(before: str, divergence: str | None, untold: Sequence[str] = ()) -> str:
    """What it means that the answers differ.

    Args:
        before: the last layer whose answer was compared; "" if none was.
        divergence: the first layer that diverges, if one does.
        untold: layers after that one, whose answers were not compared.
    """
    if divergence is not None:
        return f"the model's output differs: what comes after {divergence} does"
    said = f"the fault lies between {before or 'the inputs'} and the model's output"
    if not untold:
        return said
    more = f" (and {len(untold) - 1} more)" if len(untold) > 1 else ""
    return f"{said}; {untold[0]}{more} lies there too: what it answered was not compared"


def not_compared(sides: tuple[Recording, Recording], pairs: Sequence[Pair], steps: Sequence[Step]) -> str:
    """That what comes after the last layer was not compared, or not all of it; "" where it was.

    Args:
        sides: the recordings.
        pairs: all calls.
        steps: what was found of each.
    """
    layers = [step.layer.name for pair, step in zip(pairs, steps, strict=True) if not _is_model(pair)]
    models = [step for pair, step in zip(pairs, steps, strict=True) if _is_model(pair)]
    untold = [note for step in models for note in step.layer.notes]
    if not layers:
        return ""
    if models and all(step.entries for step in models):
        cut = [note for note in untold if " was left out " in note]
        return f"what comes after {layers[-1]} was compared in part: {cut[0]}" if cut else ""
    why = "the model's own output is not in both recordings"
    if models and all(pair.first and pair.second for pair in pairs if _is_model(pair)):
        why = untold[0] if untold else "the model answered nothing"
    if any(side.stepped for side in sides):
        why = STEPPED
    return f"what comes after {layers[-1]}, the last layer that was recorded, was not compared: {why}"


def _is_model(pair: Pair) -> bool:
    call = pair.first or pair.second
    return call is not None and not call.layer
