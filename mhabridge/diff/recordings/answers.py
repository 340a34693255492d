"""What a layer without a reference answered, on both sides: tensors, numbers and texts, whatever holds them.

An answer that one side lacks is broken, unless that side's recording says that it left it out, or was not asked for it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from mhabridge import arguments, dtypes, mapping
from mhabridge.diff.comparing import Comparison
from mhabridge.diff.recordings.arrays import BLOCKED, coarsest_of, float64
from mhabridge.diff.recordings.attention_calls import Compared, unit_of
from mhabridge.diff.recordings.drift import Drift
from mhabridge.recording.reading import Item, RecordedCall, RecordedLayer, Recording

Side = tuple[Recording, RecordedLayer, RecordedCall]
_SIDES = ("first", "second")
_HALF = dtypes.UNIT_ROUNDOFF["float16"]
_DISCRETE = "what picks the largest of numbers, or asks on which side of another they lie, depends on their rounding"


@dataclasses.dataclass(frozen=True)
class Apart:
    """How far answers may be apart.

    Args:
        drift: what the two runs have drifted apart so far, the inputs of this call among it.
        turned: whether one model is batch first and the other is not.
        unit: the larger unit roundoff of what came before; 0 where that is not known.
        last: whether this is the model's own answer, which may be a few numbers.
        given: the larger unit roundoff of what came in; 0 where that is not known.
    """

    drift: Drift
    turned: bool = False
    unit: float = 0.0
    last: bool = False
    given: float = 0.0

    def compare(self, first: np.ndarray, second: np.ndarray) -> tuple[Comparison, str]:
        """Compare two arrays; where the models have another order of axes, in the one in which they fit.

        Returns:
            The comparison, and why it says nothing although it is "off": empty where it does say something.
        """
        found, doubt = self._compare(first, second)
        if found.ok or not self.turned or second.ndim < 3:
            return found, doubt
        other, of_other = self._compare(first, second.swapaxes(0, 1))
        return (other, of_other) if other.ok or found.verdict == "broken" else (found, doubt)

    def of_discrete(self) -> str:
        """Why integers and flags that differ say nothing; empty where they do."""
        return _DISCRETE if max(self.unit, self.given) >= _HALF else ""

    def _compare(self, first: np.ndarray, second: np.ndarray) -> tuple[Comparison, str]:
        unit = max(self.unit, unit_of(coarsest_of([first]), coarsest_of([second])))
        few = self.last or first.size == 1
        # A mask writes the same infinity on both sides; where nothing else is left, nothing was compared.
        found, far = self.drift.compare(
            first, second, unit, _any_finite(first), few=few, whole=_unmasked(first, second)
        )
        if found.verdict != "off":
            return found, ""
        if first.dtype.kind in "iub":
            return found, self.of_discrete()
        return found, self.drift.doubts(far, unit) if few else ""


def _any_finite(array: np.ndarray) -> bool:
    return dtypes.name_of(array) in dtypes.FLOATS and bool(np.isfinite(float64(array)).any())


def _unmasked(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Two answers without what a mask wrote into both, such as -1e9: beside that all else would look small."""
    if first.shape != second.shape or any(dtypes.name_of(array) not in dtypes.FLOATS for array in (first, second)):
        return None, None
    with np.errstate(over="ignore"):  # what is too large for the other's dtype is not the same
        masked = (first <= first.dtype.type(BLOCKED)) & (first == second.astype(first.dtype))
    if not masked.any():
        return None, None
    return np.where(masked, first.dtype.type(0), first), np.where(masked, second.dtype.type(0), second)


def paired_outputs(first: Side, second: Side) -> Iterator[tuple[str, Item, Item]]:
    """The outputs of a call on both sides, those that belong together, by the name that they have in the report.

    Frameworks hold the same answers in containers of their own: a mapping or a dataclass here, a tuple there. They go
    together by name where both sides have names in common, else by place; a container of one thing is that thing.
    """
    if first[1].attention or second[1].attention:
        yield from _of_attention(first[2].outputs, second[2].outputs)
        return
    yield from _paired("output", _tree(first[2]), _tree(second[2]))


def _of_attention(first: tuple[Item, ...], second: tuple[Item, ...]) -> Iterator[tuple[str, Item, Item]]:
    for number, (a, b) in enumerate(itertools.zip_longest(first, second, fillvalue=Item())):
        yield from _paired(("output", "attn_weights")[number] if number < 2 else f"output.{number}", a, b)


def _tree(call: RecordedCall) -> Item:
    """All that a call answered, as one thing."""
    if len(call.outputs) == 1 and not call.output_names:
        return call.outputs[0]
    return Item(items=call.outputs, names=call.output_names)


def _paired(name: str, first: Item, second: Item) -> Iterator[tuple[str, Item, Item]]:
    if first.items is None and second.items is None:
        yield name, first, second
    elif first.items is None or second.items is None:
        yield from _beside_one(name, first, second)
    elif set(first.names) & set(second.names):
        one, other = (dict(zip(each.names, each.items or (), strict=True)) for each in (first, second))
        for key in dict.fromkeys((*one, *other)):
            yield from _paired(f"{name}.{key}", one.get(key, Item()), other.get(key, Item()))
    else:
        yield from _by_place(name, first, second)


def _beside_one(name: str, first: Item, second: Item) -> Iterator[tuple[str, Item, Item]]:
    """A thing beside a container: beside what is in it, where that is one thing; else the others are missing."""
    which = int(first.items is None)
    one, many = (first, second)[1 - which], _children((first, second)[which])
    if _is_none(one) or not many:  # all of it is missing, or there is nothing at all
        many = many or [("", Item())]
    if len(many) == 1:
        many = [("", many[0][1])]
    for number, (key, item) in enumerate(many):
        there = one if one.left_out or not number else Item()
        yield from _paired(f"{name}.{key}" if key else name, *((item, there) if which == 0 else (there, item)))


def _by_place(name: str, first: Item, second: Item) -> Iterator[tuple[str, Item, Item]]:
    sides = [_children(first, False), _children(second, False)]
    if len(sides[0]) != len(sides[1]):  # such as a mapping that also lists what it has not
        sides = [_children(first), _children(second)]
    pairs = itertools.zip_longest(*sides, fillvalue=("", Item()))
    for number, ((one, a), (other, b)) in enumerate(pairs):
        called = (one if first.names else "") or (other if second.names else "") or str(number)
        yield from _paired(f"{name}.{called}", a, b)


def _children(item: Item, there: bool = True) -> list[tuple[str, Item]]:
    """What is in a container, each by its name or its number; those that are None only if asked for."""
    items = item.items or ()
    names = item.names or tuple(map(str, range(len(items))))
    return [(name, each) for name, each in zip(names, items, strict=True) if not (there and _is_none(each))]


def leaves(name: str, item: Item) -> Iterator[tuple[str, Item]]:
    """What lies in a tuple, a list or a mapping; anything else is that itself."""
    if item.items is None:
        yield name, item
        return
    for number, each in enumerate(item.items):
        yield from leaves(f"{name}.{item.names[number] if item.names else number}", each)


def compare_answers(first: Side, second: Side, far: Apart, compared: Compared) -> None:
    """Compare all outputs of one call."""
    for name, *pair in paired_outputs(first, second):
        items = pair[0], pair[1]
        if _is_missing(name, items, (first, second), compared):
            continue
        found, doubt = _compared(items, (first[0], second[0]), far)
        if doubt:
            values = found.reason if found.values is None else "{:g} and {:g}".format(*found.values)
            why = f"{name}: {values}: that cannot be told from rounding: {doubt}"
            compared.notes.append(why)
            compared.not_whole += [(0, why), (1, why)]
        else:
            compared.add(name, found, "computed")


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


def _compared(pair: tuple[Item, Item], recordings: tuple[Recording, Recording], far: Apart) -> tuple[Comparison, str]:
    missing = [which for which, item in zip(_SIDES, pair, strict=True) if _is_none(item)]
    if missing:
        return Comparison("broken", missing[0], f"missing on the {missing[0]} side"), ""
    values = [_value(item, recording) for item, recording in zip(pair, recordings, strict=True)]
    a, b = (_as_array(value, other) for value, other in (values, values[::-1]))
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return far.compare(a, b)
    if type(a) is type(b):
        if a == b:
            return Comparison("equal"), ""
        doubt = far.of_discrete() if isinstance(a, int) else ""
        return Comparison("off", reason=f"{a!r:.60} and {b!r:.60}"), doubt
    return Comparison("broken", reason=f"{_kind(a)} and {_kind(b)}"), ""


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
