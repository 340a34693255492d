"""One call of any other layer on both sides: tensor arguments and outputs in their order, parameters by name.

Also of attention layers that cannot be read as plain multi-head attention.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from mhabridge import dtypes
from mhabridge.diff.comparing import Comparison, compare
from mhabridge.diff.judge import Distance
from mhabridge.diff.recordings import other_layers
from mhabridge.diff.recordings.answers import Apart, Side, compare_answers, leaves
from mhabridge.diff.recordings.arrays import BLOCKED, coarsest_of
from mhabridge.diff.recordings.attention_calls import Compared, add_trained, compare_weights, unit_of
from mhabridge.diff.recordings.drift import Drift, apart
from mhabridge.diff.recordings.matching import kind_of, weights_at
from mhabridge.errors import UnsupportedError
from mhabridge.recording.reading import Item, RecordedCall, RecordedLayer, Recording


def compare_plain(first: Side, second: Side, drift: Drift, turned: bool) -> Compared:
    """Compare one call on both sides.

    Args:
        first: a recording, the layer in it, and the call.
        second: likewise.
        drift: what the two runs have drifted apart so far.
        turned: whether one of the two models is batch first and the other is not: then the second one's tensors of
            three and more axes are turned.
    """
    compared = Compared()
    _compare_epsilon(first[1], second[1], compared)
    _compare_parameters(first, second, drift, compared)
    given = [list(_tensors(side[0], _arguments(side[2]))) for side in (first, second)]
    _compare_inputs(given, drift, turned, compared)
    floats = [array for side in given for _, array in side if dtypes.name_of(array) in dtypes.FLOATS]
    compared.unit = unit_of(coarsest_of(floats)) if floats else 0.0
    if not _compare_known(first, second, given, turned, compared):
        far = Apart(drift.after(compared.drift), turned, given=compared.unit)
        compare_answers(first, second, far, compared)
    return compared


def _compare_known(
    first: Side, second: Side, given: list[list[tuple[str, np.ndarray]]], turned: bool, compared: Compared
) -> bool:
    """Hold a layer whose formula is known against the reference; whether it is one, on both sides."""
    outputs = [_only_output(side) for side in (first, second)]
    a, b = outputs
    if a is None or b is None:
        return False
    judged = [
        _sure(side, other_layers.distance(*side, [array for _, array in own], made))
        for side, own, made in zip((first, second), given, (a, b), strict=True)
    ]
    if any(each is None for each in judged):
        return False
    b = _turn(b, turned)
    comparison = compare(a, b, distances=(judged[0], judged[1]))
    compared.add("output", comparison, "computed")
    if comparison.ok:
        compared.drift.append(apart(a, b))
    return True


def _only_output(side: Side) -> np.ndarray | None:
    if side[1].attention or len(side[2].outputs) != 1:
        return None
    return side[0].read(side[2].outputs[0])


def _compare_epsilon(first: RecordedLayer, second: RecordedLayer, compared: Compared) -> None:
    a, b = other_layers.epsilon_of(first), other_layers.epsilon_of(second)
    if a is not None and b is not None and a != b:
        compared.add("settings", Comparison("off", reason=f"epsilon {a:g} and {b:g}"), "settings")


def _compare_parameters(first: Side, second: Side, drift: Drift, compared: Compared) -> None:
    how = weights_at((first[0], first[2]), (second[0], second[2]))
    if not how:
        return
    try:
        found = [other_layers.parameters_of(*side) for side in (first, second)]
    except UnsupportedError as error:
        compared.notes.append(f"the parameters are not compared: {error}")
        return
    if found[0].keys() == found[1].keys() or (found[0] and found[1] and _same_names(first[1], second[1])):
        if how == "recorded":
            compare_weights(found[0], found[1], compared)
        else:
            unit = unit_of(*(coarsest_of(side.values()) for side in found))
            add_trained(found[0], found[1], drift, unit, compared)
    elif found[0] or found[1]:
        compared.notes.append("the two sides name the parameters differently: they are not compared")


def _sure(side: Side, distance: Distance | None) -> Distance | None:
    """A distance, unless it is large and the parameters may have been others than those that are known."""
    return distance if distance is None or distance.ok or side[0].tells(side[2]) else None


def _same_names(first: RecordedLayer, second: RecordedLayer) -> bool:
    """Whether parameters of the same meaning have the same name: one class, or a kind whose names are translated."""
    kind = kind_of(first)
    return first.kind == second.kind or (kind == kind_of(second) and kind in other_layers.KNOWN)


def _arguments(call: RecordedCall) -> list[tuple[str, Item]]:
    """The arguments that are tensors of their own, in order."""
    return [(name, item) for name, item in call.arguments.items() if not item.same_as]


def _tensors(recording: Recording, items: Iterable[tuple[str, Item]]) -> Iterator[tuple[str, np.ndarray]]:
    """Those that were kept, also inside of tuples and mappings."""
    for name, item in items:
        for own, leaf in leaves(name, item):
            if leaf.tensor:
                yield own, recording.file.read(leaf.tensor)


def _turn(array: np.ndarray, turned: bool) -> np.ndarray:
    return array.swapaxes(0, 1) if turned and array.ndim >= 3 else array


def _compare_inputs(given: list[list[tuple[str, np.ndarray]]], drift: Drift, turned: bool, compared: Compared) -> None:
    """By name where both sides have the same names, else in their order."""
    first, second = given
    if len(first) != len(second):
        compared.notes.append(f"{len(first)} tensors come in on one side, {len(second)} on the other")
    theirs = dict(second)
    by_name = {name for name, _ in first} & theirs.keys()
    for (name, a), (_, other) in zip(first, second, strict=False):
        a, b = _as_masks(name, a, theirs[name] if name in by_name else other)
        comparison, far = drift.compare(a, _turn(b, turned), unit_of(coarsest_of([a]), coarsest_of([b])), True)
        compared.add(f"inputs.{name}", comparison, "inputs")
        if dtypes.name_of(a) in dtypes.FLOATS:
            compared.drift.append(far)


def _as_masks(name: str, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as bool where one is, or the argument is called a mask, and floats are 0 or as good as -inf."""
    if np.bool_ not in (first.dtype, second.dtype) and "mask" not in name:
        return first, second
    a, b = _as_bool(first), _as_bool(second)
    return (a, b) if a.dtype == b.dtype == np.bool_ else (first, second)


def _as_bool(array: np.ndarray) -> np.ndarray:
    if dtypes.name_of(array) not in dtypes.FLOATS:
        return array
    values = dtypes.to_float64(array)
    blocked = np.asarray(values <= BLOCKED)
    return blocked if ((values == 0.0) | blocked).all() else array
