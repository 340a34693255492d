"""``mb.diff_recordings``: two recorded runs of a model, layer by layer in the order in which they ran.

No framework is needed. Layers are matched by name, order and shape (``matching``); each call is brought into canonical
form (``canonical``); what came in, what the layer is and what it computed are compared apart (``attention_calls``,
``plain_calls``), each side against the float64 reference on its own inputs and weights (``judging``), and what came in
by how far rounding lets two runs drift apart (``drift``).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

from mhabridge.checkpoint.planning.renaming import require_met
from mhabridge.diff.recordings.answers import leaves
from mhabridge.diff.recordings.matching import Pair, match_layers, pairs
from mhabridge.diff.recordings.single_step import SingleStep
from mhabridge.diff.recordings.walking import Step, Walk, is_turned
from mhabridge.diff.recordings.whole import not_compared
from mhabridge.diff.report import DiffReport, Entry, Run
from mhabridge.errors import ArgumentTypeError
from mhabridge.recording.ledger import NOT_WANTED
from mhabridge.recording.reading import Item, RecordedCall, Recording, open_recording

_MOST_NOTES = 20


def diff_recordings(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    rules: Any = (),
    order: bool = True,
    single_step: bool | str | None = None,
    pictures: bool = False,
) -> DiffReport:
    """Compare two recorded runs of a model.

    Args:
        a: a recording, or the journal of one that broke off.
        b: the other.
        rules: that turn the first one's paths of layers into the second one's, such as ["encoder.*=model.encoder.*"].
        order: match what no name matches by order, kind and shape.
        single_step: also run the second side's layers on the inputs that the first one recorded: True (or "first") on
            the backend of the second side's framework, or the name of another backend.
        pictures: make what ``to_html`` and ``to_png`` draw.

    Returns:
        A report with one layer for each call, in the order in which they ran; ``first_divergence`` is the first one
        whose inputs, weights, masks or own computation differ by more than rounding, and its notes say which of these.

    Raises:
        ArgumentError: a rule that is none, or fits no layer.
        ArgumentTypeError: that is no path, or single_step is neither a name nor a flag.
        CheckpointError: a file is missing, damaged, or no recording.
    """
    if single_step is not None and not isinstance(single_step, (bool, str)):
        raise ArgumentTypeError("single_step", given=repr(single_step), expected="True, or the name of a backend")
    names = str(os.fspath(a)), str(os.fspath(b))
    names = names if names[0] != names[1] else (names[0], f"{names[1]} (second)")
    with open_recording(a) as first, open_recording(b) as second:
        require_met(rules or None, first.layers)
        layers = match_layers(first, second, rules, order)
        backend = _single_step(single_step, second)
        walk = Walk(first, second, names, is_turned(first, second, layers), backend, pictures)
        paired = pairs(first, second, layers)
        steps = [walk.step(pair) for pair in paired]
        gradients, backward = _gradients(steps, paired, walk)
        entries = [entry for step in steps for entry in (*step.entries, *gradients.get(step.layer.name, ()))]
        return DiffReport(
            tuple(_run(*side) for side in zip(names, (first, second), walk.not_whole, strict=True)),
            tuple(entries),
            kind="recordings",
            layers=tuple(step.layer for step in steps),
            diagnoses=tuple(walk.diagnoses),
            pictures=tuple(walk.pictures),
            first_divergence=walk.divergence if walk.divergence is not None else backward,
            notes=(*(() if backend is None else backend.notes), *_after_the_last(first, second, paired, steps)),
        )


def _single_step(asked: bool | str | None, second: Recording) -> SingleStep | None:
    if not asked:
        return None
    return SingleStep(second.framework if asked in (True, "first") else str(asked))


def _after_the_last(first: Recording, second: Recording, paired: list[Pair], steps: list[Step]) -> list[str]:
    """That what comes after the last layer was not compared, where it was not."""
    note = not_compared((first, second), paired, steps)
    return [note] if note else []


def _gradients(steps: list[Step], paired: list[Pair], walk: Walk) -> tuple[dict[str, tuple[Entry, ...]], str | None]:
    """The entries of gradients by layer, and where they diverge first: backwards, so from the last layer on."""
    drift, found, divergence = walk.drift.backward(), {}, None
    for step, pair in zip(reversed(steps), reversed(paired), strict=True):
        if step.backward is None:
            continue
        name = step.layer.name
        compared = step.backward.settle(drift)
        found[name] = tuple(Entry(name, tensor, *walk.names, each) for tensor, each in compared.items())
        if divergence is None and not all(each.ok for each in compared.values()):
            divergence = name
            if walk.divergence is None:
                walk.explain_backward(name, pair, compared)
    return found, divergence


def _run(name: str, recording: Recording, not_whole: list[str]) -> Run:
    notes = list(recording.left_out)
    if len(notes) > _MOST_NOTES:
        notes = [*notes[:_MOST_NOTES], f"... and {len(notes) - _MOST_NOTES} more left out"]
    reason = _why_not_whole(recording)
    if not_whole and not reason:
        more = f" (and {len(not_whole) - 1} more)" if len(not_whole) > 1 else ""
        reason = f"not all of it can be compared: {not_whole[0]}{more}"
    status = "failed" if reason else "answered"
    return Run(
        name, recording.framework, recording.version, "", status, reason, tuple(notes), dict(recording.environment)
    )


def _why_not_whole(recording: Recording) -> str:
    """Why not all that ran can be compared; "" when it can."""
    if not recording.complete:
        return "the recording broke off, or its run ended with an error"
    calls = [call for call in recording.calls if not recording.layers[call.layer].whole]
    if not calls:
        return "nothing was recorded"
    cut = [call for call in calls if any(map(_is_cut, _needed(call)))]
    if cut:
        return f"{len(cut)} of {len(calls)} calls are not whole: tensors were left out"
    answers = [call for call in recording.calls if recording.layers[call.layer].whole and not recording.stepped]
    lost = next((leaf.left_out for call in answers for leaf in _all_of(call.outputs) if leaf.left_out), "")
    return f"the model's output is not whole: {lost}" if lost else ""


def _needed(call: RecordedCall) -> list[Item]:
    """What a call cannot be compared without: its arguments and its outputs, but for what nobody asked to be kept."""
    unasked = [item for item in call.outputs[1:] if item.left_out == NOT_WANTED]
    return [*call.arguments.values(), *(item for item in call.outputs if item not in unasked)]


def _is_cut(item: Item) -> bool:
    """Whether something was left out of an argument or an output, wherever in it."""
    return any(leaf.left_out for leaf in _all_of([item]))


def _all_of(items: Iterable[Item]) -> Iterator[Item]:
    return (leaf for item in items for _, leaf in leaves("", item))
