"""What a layer without a reference answered, on both sides: tensors, numbers and texts, whatever holds them.

An answer that one side lacks is broken, unless that side's recording says that it left it out, or was not asked for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from mhabridge import arguments, mapping
from mhabridge.diff.comparing import Comparison
from mhabridge.diff.recordings.arrays import coarsest_of
from mhabridge.diff.recordings.attention_calls import Compared, unit_of
from mhabridge.diff.recordings.drift import Drift
from mhabridge.recording.reading import Item, RecordedCall, RecordedLayer, Recording

Side = tuple[Recording, RecordedLayer, RecordedCall]
_SIDES = ("first", "second")


@dataclasses.dataclass(frozen=True)
class Apart:
    """How far answers may be apart.

    Args:
        drift: what the two runs have drifted apart so far, the inputs of this call among it.
        turned: whether one model is batch first and the other is not.
        unit: the larger unit roundoff of what came before; 0 where that is not known.
        last: whether this is the model's own answer, which may be a few numbers.
    """

    drift: Drift
    turned: bool = False
    unit: float = 0.0
    last: bool = False

    def compare(self, first: np.ndarray, second: np.ndarray) -> Comparison:
        """Compare two arrays; where the models have another order of axes, in the one in which they fit."""
        unit = max(self.unit, unit_of(coarsest_of([first]), coarsest_of([second])))
        few = self.last or first.size == 1
        found = self.drift.compare(first, second, unit, few=few)[0]
        if found.ok or not self.turned or second.ndim < 3:
            return found
        other = self.drift.compare(first, second.swapaxes(0, 1), unit, few=few)[0]
        return other if other.ok or found.verdict == "broken" else found


def named_outputs(first: Side, second: Side) -> tuple[dict[str, Item], dict[str, Item]]:
    """The outputs of a call on both sides, each by the name that it has in the report."""
    named = bool(first[2].output_names and second[2].output_names)
    return _named(first, named), _named(second, named)


def _named(side: Side, named: bool) -> dict[str, Item]:
    items = side[2].outputs
    names = ["output", "attn_weights"] if side[1].attention else (["output"] if len(items) == 1 else [])
    if named:
        names = [f"output.{name}" for name in side[2].output_names]
    pairs = [(names[n] if n < len(names) else f"output.{n}", item) for n, item in enumerate(items)]
    return {name: leaf for each, item in pairs for name, leaf in leaves(each, item)}


def leaves(name: str, item: Item) -> Iterator[tuple[str, Item]]:
    """What lies in a tuple, a list or a mapping; anything else is that itself."""
    if item.items is None:
        yield name, item
        return
    for number, each in enumerate(item.items):
        yield from leaves(f"{name}.{item.names[number] if item.names else number}", each)


def compare_answers(first: Side, second: Side, far: Apart, compared: Compared) -> None:
    """Compare all outputs of one call."""
    items = named_outputs(first, second)
    for name in dict.fromkeys((*items[0], *items[1])):
        pair = items[0].get(name, Item()), items[1].get(name, Item())
        if not _is_missing(name, pair, (first, second), compared):
            compared.add(name, _compared(pair, (first[0], second[0]), far), "computed")


def _is_missing(name: str, pair: tuple[Item, Item], sides: tuple[Side, Side], compared: Compared) -> bool:
    """Whether there is nothing to compare: a side left it out, was not asked for it, or neither has it."""
    if all(_is_none(item) for item in pair):
        return True
    for which, item, side in zip(_SIDES, pair, sides, strict=True):
        if item.left_out:
            compared.notes.append(f"{name} was left out on the {which} side ({item.left_out})")
            return True
        if name == "attn_weights" and _is_none(item) and not _asked(side):
            compared.notes.append(f"{name} was left out on the {which} side (not asked for)")
            return True
    return False


def _is_none(item: Item) -> bool:
    return not (item.tensor or item.left_out or item.same_as) and item.items is None and item.value is None


def _asked(side: Side) -> bool:
    """Whether an attention layer was asked for its weights: by the call, else by the framework's default."""
    given = side[2].arguments.get("need_weights")
    if given is not None and isinstance(given.value, bool):
        return given.value
    if side[0].framework not in mapping.FRAMEWORKS:
        return True
    known = arguments.dialect(side[0].framework).call_arguments()
    return next((each.default != "False" for each in known if each.field == "need_weights"), True)


def _compared(pair: tuple[Item, Item], recordings: tuple[Recording, Recording], far: Apart) -> Comparison:
    missing = [which for which, item in zip(_SIDES, pair, strict=True) if _is_none(item)]
    if missing:
        return Comparison("broken", missing[0], f"missing on the {missing[0]} side")
    values = [_value(item, recording) for item, recording in zip(pair, recordings, strict=True)]
    a, b = (_as_array(value, other) for value, other in (values, values[::-1]))
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return far.compare(a, b)
    if type(a) is type(b):
        return Comparison("equal" if a == b else "off", reason="" if a == b else f"{a!r:.60} and {b!r:.60}")
    return Comparison("broken", reason=f"{_kind(a)} and {_kind(b)}")


def _value(item: Item, recording: Recording) -> Any:
    return recording.read(item) if item.tensor else item.value


def _as_array(value: Any, other: Any) -> Any:
    """A float as an array, and an integer beside a float or an array."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    exact = isinstance(value, int) and not isinstance(other, (float, np.ndarray))
    if not number or exact:
        return value
    like = other.dtype if isinstance(other, np.ndarray) and not other.ndim else np.dtype(np.float32)
    return np.asarray(value, np.float64 if like.kind in "iub" and isinstance(value, float) else like)


def _kind(value: Any) -> str:
    return "a tensor" if isinstance(value, np.ndarray) else f"{value!r:.60}"
