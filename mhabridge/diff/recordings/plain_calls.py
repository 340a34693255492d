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
from mhabridge.diff.recordings.arrays import coarsest_of
from mhabridge.diff.recordings.attention_calls import Compared, add_trained, compare_weights, unit_of
from mhabridge.diff.recordings.drift import Drift, apart
from mhabridge.diff.recordings.matching import kind_of, weights_at
from mhabridge.errors import UnsupportedError
from mhabridge.recording.reading import Item, RecordedCall, RecordedLayer, Recording

_BLOCKED = -9984.0  # what -1e4 is in bfloat16: less is meant as -inf in a mask

Side = tuple[Recording, RecordedLayer, RecordedCall]


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
    inputs = [[array for _, array in side] for side in given]
    outputs = [dict(_tensors(side[0], _outputs(side))) for side in (first, second)]
    _compare_inputs(given, drift, turned, compared)
    if outputs[0].keys() == outputs[1].keys() == {"output"}:
        judged = [
            _sure(side, other_layers.distance(*side, own, made["output"]))
            for side, own, made in zip((first, second), inputs, outputs, strict=True)
        ]
        if all(each is not None for each in judged):
            a, b = outputs[0]["output"], _turn(outputs[1]["output"], turned)
            comparison = compare(a, b, distances=(judged[0], judged[1]))
            compared.add("output", comparison, "computed")
            if comparison.ok:
                compared.drift.append(apart(a, b))
            return compared
    for name in _not_asked(first, second, compared):
        for side in outputs:
            side.pop(name, None)
    _compare_outputs(outputs, drift, turned, compared)
    return compared


def _compare_epsilon(first: RecordedLayer, second: RecordedLayer, compared: Compared) -> None:
    a, b = other_layers.epsilon_of(first), other_layers.epsilon_of(second)
    if a is not None and b is not None and a != b:
        compared.add("settings", Comparison("off", reason=f"epsilon {a:g} and {b:g}"), "settings")


def _compare_parameters(first: Side, second: Side, drift: Drift, compared: Compared) -> None:
    how = weights_at(first[2], second[2])
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


def _outputs(side: Side) -> list[tuple[str, Item]]:
    """The outputs by the names that they have in the report."""
    names = ["output", "attn_weights"] if side[1].attention else []
    items = side[2].outputs
    names = names or (["output"] if len(items) == 1 else [])
    return [(names[n] if n < len(names) else f"output.{n}", item) for n, item in enumerate(items)]


def _not_asked(first: Side, second: Side, compared: Compared) -> list[str]:
    """The outputs that are not compared since a side left them out, or was not asked for attention weights."""
    found = []
    for which, side in (("first", first), ("second", second)):
        for name, item in _outputs(side):
            if item.left_out or (name == "attn_weights" and not item.tensor):
                compared.notes.append(f"{name} was left out on the {which} side ({item.left_out or 'not returned'})")
                found.append(name)
    return found


def _tensors(recording: Recording, items: Iterable[tuple[str, Item]]) -> Iterator[tuple[str, np.ndarray]]:
    """Those that were kept, also inside of tuples."""
    for name, item in items:
        if item.items is not None:
            yield from _tensors(recording, [(f"{name}.{number}", each) for number, each in enumerate(item.items)])
        elif item.tensor:
            yield name, recording.file.read(item.tensor)


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
    blocked = np.asarray(values <= _BLOCKED)
    return blocked if ((values == 0.0) | blocked).all() else array


def _compare_outputs(outputs: list[dict[str, np.ndarray]], drift: Drift, turned: bool, compared: Compared) -> None:
    after = drift.after(compared.drift)
    for name in dict.fromkeys((*outputs[0], *outputs[1])):
        a, b = (side.get(name) for side in outputs)
        b = None if b is None else _turn(b, turned and name != "attn_weights")
        comparison, _ = after.compare(a, b, unit_of(coarsest_of([a]), coarsest_of([b])))
        compared.add(name, comparison, "computed")
