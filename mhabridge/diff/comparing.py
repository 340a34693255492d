"""Two tensors beside each other: how far apart, where most, and whether that is rounding or a fault.

A verdict cannot lie: nothing is broadcast, no NaN passes unless it is known to belong there, integers do not wrap
around, and a tensor that one side lacks is broken.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mhabridge import dtypes
from mhabridge.diff import sums
from mhabridge.diff.bits import are_copies, same_bits
from mhabridge.diff.judge import Distance, plain_number
from mhabridge.errors import ArgumentError

VERDICTS = ("equal", "rounding", "off", "broken")
_NAN = float("nan")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two tensors beside each other.

    Args:
        verdict: "equal" (bit for bit), "rounding" (rounding explains all of it), "off" (it does not) or "broken"
            (missing, another shape or dtype, NaN or inf where none belongs).
        side: which is off or broken: "first", "second", "both", or "" where that cannot be told.
        reason: in words, for "off" and "broken", and for what rounding explains by itself.
        shapes: of both; None for a tensor that is missing.
        dtypes: of both; "" for a tensor that is missing.
        max_abs: largest absolute difference over what is finite on both sides; NaN when nothing can be compared.
        mean_abs: mean absolute difference, likewise.
        max_rel: largest of |a - b| / max(|a|, |b|), likewise; 0 where both are 0.
        mean_rel: its mean.
        cosine: of the angle between the two as vectors; NaN when one of them is zero.
        index: of the element with the largest absolute difference, or of the first one that is broken.
        values: both, there.
        distances: of each side to the float64 reference, where there is one.
    """

    verdict: str
    side: str = ""
    reason: str = ""
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None] = (None, None)
    dtypes: tuple[str, str] = ("", "")
    max_abs: float = _NAN
    mean_abs: float = _NAN
    max_rel: float = _NAN
    mean_rel: float = _NAN
    cosine: float = _NAN
    index: tuple[int, ...] | None = None
    values: tuple[float, float] = (_NAN, _NAN)
    distances: tuple[Distance | None, Distance | None] = (None, None)

    @property
    def ok(self) -> bool:
        """Whether rounding explains all of the difference."""
        return self.verdict in ("equal", "rounding")

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, as JSON can hold them: NaN (nothing to compare) becomes None, inf a word."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["distances"] = [None if each is None else each.to_dict() for each in self.distances]
        fields["values"] = [plain_number(each) for each in self.values]
        return {name: plain_number(item) for name, item in fields.items()}


class Measure:
    """The differences between two tensors of one shape, added up over pieces, so that a file can be streamed."""

    def __init__(self) -> None:
        self.elements = 0
        self.max_abs = self.max_rel = 0.0
        self.worst: int | None = None
        self.values = (_NAN, _NAN)
        self._sum_abs = self._sum_rel = self._dot = self._first = self._second = 0.0
        self.same = True
        self.same_values = True
        self.strange: int | None = None
        self.strange_values = (_NAN, _NAN)
        self.strange_count = 0
        self.strange_sides: tuple[bool, bool] = (False, False)

    def add(
        self, first: np.ndarray, second: np.ndarray, allowed: np.ndarray | None = None, *, spent: bool = False
    ) -> None:
        """Add the next elements of both, in C order.

        Args:
            first: of any dtype and shape.
            second: of the same shape.
            allowed: bool, where both may be NaN or the same infinity.
            spent: whether nobody needs the arrays any more, so that they may be written over.
        """
        a, b = np.ravel(first), np.ravel(second)
        start, self.elements = self.elements, self.elements + a.size
        same = same_bits(a, b)
        if same and self._add_equal(a):
            return
        self.same = self.same and same
        found = None if same else sums.of(a, b, spent)
        if found is not None:
            self._add_sums(found, start)
            return
        x, y = _exactly(a), _exactly(b)
        fine = np.isfinite(x) & np.isfinite(y)
        self._note_strange(x, y, fine, None if allowed is None else np.ravel(allowed), start)
        apart = _apart(a, b, x, y, fine)
        self._add_apart(apart, x, y, fine, start)

    def join(self, later: Measure) -> None:
        """Add what another one measured of the elements that follow.

        Example:
            >>> one, two = Measure(), Measure()
            >>> one.add(np.float32([1, 2]), np.float32([1, 2]))
            >>> two.add(np.float32([3, 4]), np.float32([3, 5]))
            >>> one.join(two)
            >>> one.numbers((4,))["index"], one.max_abs
            ((3,), 1.0)
        """
        start, self.elements = self.elements, self.elements + later.elements
        if later.worst is not None and (self.worst is None or later.max_abs > self.max_abs):
            self.worst, self.values = start + later.worst, later.values
        if later.strange is not None and self.strange is None:
            self.strange, self.strange_values = start + later.strange, later.strange_values
        self.strange_count += later.strange_count
        self.strange_sides = (
            self.strange_sides[0] or later.strange_sides[0],
            self.strange_sides[1] or later.strange_sides[1],
        )
        self.max_abs, self.max_rel = max(self.max_abs, later.max_abs), max(self.max_rel, later.max_rel)
        self._sum_abs, self._sum_rel = self._sum_abs + later._sum_abs, self._sum_rel + later._sum_rel
        self._dot, self._first = self._dot + later._dot, self._first + later._first
        self._second += later._second
        self.same, self.same_values = self.same and later.same, self.same_values and later.same_values

    def _add_equal(self, a: np.ndarray) -> bool:
        """Add what is the same on both sides; False when not all of it is finite."""
        square = sums.of_equal(a)
        if square is None:
            if not _all_finite(a):
                return False
            x = _exactly(a)
            with np.errstate(over="ignore", invalid="ignore"):
                square = float(np.dot(x, x))
        self._dot, self._first, self._second = self._dot + square, self._first + square, self._second + square
        if self.worst is None and a.size:
            value = float(_exactly(a[:1])[0])
            self.worst, self.values = self.elements - a.size, (value, value)
        return True

    def _add_sums(self, found: sums.Sums, start: int) -> None:
        self._dot, self._first = self._dot + found.dot, self._first + found.first
        self._second, self._sum_abs = self._second + found.second, self._sum_abs + found.sum_abs
        self._sum_rel, self.max_rel = self._sum_rel + found.sum_rel, max(self.max_rel, found.max_rel)
        self.same_values = self.same_values and not found.largest
        if self.worst is None or found.largest > self.max_abs:
            self.worst, self.values, self.max_abs = start + found.worst, found.values, found.largest

    def _note_strange(
        self, x: np.ndarray, y: np.ndarray, fine: np.ndarray, allowed: np.ndarray | None, start: int
    ) -> None:
        alike = (np.isnan(x) & np.isnan(y)) | (x == y)
        strange = ~fine if allowed is None else ~fine & ~(allowed & alike)
        found = np.flatnonzero(strange)
        self.strange_count += len(found)
        sides = (bool((strange & ~np.isfinite(x)).any()), bool((strange & ~np.isfinite(y)).any()))
        self.strange_sides = (self.strange_sides[0] or sides[0], self.strange_sides[1] or sides[1])
        if len(found) and self.strange is None:
            at = int(found[0])
            self.strange, self.strange_values = start + at, (float(x[at]), float(y[at]))

    def _add_apart(self, apart: np.ndarray, x: np.ndarray, y: np.ndarray, fine: np.ndarray, start: int) -> None:
        x, y = np.where(fine, x, 0.0), np.where(fine, y, 0.0)
        larger = np.maximum(np.abs(x), np.abs(y))
        relative = np.divide(apart, larger, out=np.zeros_like(apart), where=larger > 0)
        with np.errstate(over="ignore", invalid="ignore"):
            self._dot, self._first = self._dot + float(np.dot(x, y)), self._first + float(np.dot(x, x))
            self._second += float(np.dot(y, y))
        self._sum_abs, self._sum_rel = self._sum_abs + float(apart.sum()), self._sum_rel + float(relative.sum())
        if not apart.size or not fine.any():
            return
        self.same_values = self.same_values and not apart.any()
        self.max_rel = max(self.max_rel, float(relative.max()))
        at = int(np.argmax(np.where(fine, apart, -1.0)))
        if self.worst is None or apart[at] > self.max_abs:
            self.worst, self.values = start + at, (float(x[at]), float(y[at]))
            self.max_abs = float(apart[at])

    def numbers(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """The fields of ``Comparison`` that are measured."""
        if not self.elements:
            return {"max_abs": 0.0, "mean_abs": 0.0, "max_rel": 0.0, "mean_rel": 0.0}
        if self.strange is not None and self.worst is None:  # nothing finite to compare
            return {"index": unravel(self.strange, shape), "values": self.strange_values}
        if self.worst is None:  # all of it is NaN, and that is how it should be
            return {"max_abs": 0.0, "mean_abs": 0.0, "max_rel": 0.0, "mean_rel": 0.0}
        length = math.sqrt(self._first) * math.sqrt(self._second)
        if self._dot == self._first == self._second:
            length = self._dot  # the same numbers: its cosine is 1, which two roots may miss
        return {
            "max_abs": self.max_abs,
            "mean_abs": self._sum_abs / self.elements,
            "max_rel": self.max_rel,
            "mean_rel": self._sum_rel / self.elements,
            "cosine": max(-1.0, min(1.0, self._dot / length)) if 0 < length < math.inf else _NAN,
            "index": unravel(self.worst if self.strange is None else self.strange, shape),
            "values": self.values if self.strange is None else self.strange_values,
        }


def unravel(position: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The index of an element by its place in C order.

    Example:
        >>> unravel(5, (2, 3))
        (1, 2)
    """
    return tuple(int(i) for i in np.unravel_index(position, shape))


def _all_finite(a: np.ndarray) -> bool:
    return dtypes.name_of(a) not in dtypes.FLOATS or bool(np.isfinite(a).all())


def _exactly(a: np.ndarray) -> np.ndarray:
    """As float64, for measuring; the differences of wide integers are taken before (``_apart``)."""
    return dtypes.to_float64(a) if dtypes.name_of(a) in dtypes.FLOATS else a.astype(np.float64)


def _apart(a: np.ndarray, b: np.ndarray, x: np.ndarray, y: np.ndarray, fine: np.ndarray) -> np.ndarray:
    """|a - b| in float64; integers are subtracted the way round that does not wrap."""
    if a.dtype.kind in "iub" and b.dtype == a.dtype and a.dtype.itemsize == 8:
        with np.errstate(over="ignore", invalid="ignore"):  # modulo 2**64, then read without sign: exact
            return np.asarray(np.where(a > b, a - b, b - a).view(np.uint64).astype(np.float64))
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(np.abs(np.where(fine, x, 0.0) - np.where(fine, y, 0.0)))


def compare(
    first: np.ndarray | None,
    second: np.ndarray | None,
    *,
    distances: tuple[Distance | None, Distance | None] = (None, None),
    allowed: np.ndarray | None = None,
    justified: np.ndarray | float | None = None,
) -> Comparison:
    """Compare two tensors.

    Args:
        first: any dtype of NumPy's or bfloat16; None if that side lacks it.
        second: likewise.
        distances: of each to the float64 reference, where there is one: they decide between "rounding" and "off".
        allowed: bool, in their shape: where both may be NaN, or the same infinity (the reference has it there, or it
            is a mask). None: nowhere.
        justified: without distances, the absolute difference that rounding explains; it broadcasts to their shape.
            None: only what turning one dtype into the other explains.

    Returns:
        Without distances and ``justified`` two floating tensors of one dtype are "rounding" only when their values are
        equal (a zero of another sign); of two dtypes when they hold the same numbers, as far as these can.

    Raises:
        ArgumentError: both are None.

    Example:
        >>> compare(np.float32([1, 2]), np.float32([1, 2.5])).verdict
        'off'
        >>> compare(np.float16([0.1]), np.float32([0.1])).verdict
        'rounding'
        >>> compare(np.float32([1]), np.float32([[1]])).reason
        'shape (1,) and (1, 1)'
        >>> compare(np.uint8([255]), np.uint8([0])).max_abs
        255.0
    """
    if first is None and second is None:
        raise ArgumentError("compare", given="neither tensor", expected="at least one")
    measure = Measure()
    if first is None or second is None or first.shape != second.shape:
        return decide(first, second, measure, distances=distances)
    measure.add(first, second, allowed)
    within = None
    if justified is not None and measure.strange is None:
        x, y = _exactly(np.asarray(first)), _exactly(np.asarray(second))
        with np.errstate(invalid="ignore"):
            within = bool(np.all((np.abs(x - y) <= justified) | (x == y) | (np.isnan(x) & np.isnan(y))))
    return decide(first, second, measure, distances=distances, within=within, copied=are_copies(first, second))


def decide(
    first: Any,
    second: Any,
    measure: Measure,
    *,
    distances: tuple[Distance | None, Distance | None] = (None, None),
    within: bool | None = None,
    copied: bool = False,
) -> Comparison:
    """The verdict on two tensors, or on two things with a shape and a dtype whose elements were measured.

    Args:
        first: what has ``shape`` and ``dtype``; None if that side lacks it.
        second: likewise.
        measure: of all their elements; empty where the shapes differ.
        distances: as for ``compare``.
        within: whether all differences are within what is justified; None if nothing is.
        copied: whether both hold the same numbers, as far as their dtypes can (``bits.are_copies``).
    """
    shapes = _shape(first), _shape(second)
    names = _name(first), _name(second)
    known: dict[str, Any] = {"shapes": shapes, "dtypes": names, "distances": distances}
    for missing, which in zip((first is None, second is None), ("first", "second"), strict=True):
        if missing:
            return Comparison("broken", which, f"missing on the {which} side", **known)
    if shapes[0] != shapes[1]:
        return Comparison("broken", _to_blame(distances), f"shape {shapes[0]} and {shapes[1]}", **known)
    known.update(measure.numbers(shapes[0] or ()))
    floats = [name in dtypes.FLOATS for name in names]
    if names[0] != names[1] and not all(floats):
        return Comparison("broken", _to_blame(distances), f"dtype {names[0]} and {names[1]}", **known)
    if measure.strange is not None:
        a, b = measure.strange_values
        reason = f"{a:g} and {b:g} ({measure.strange_count} elements that are NaN or infinite on a side)"
        return Comparison("broken", _to_blame(distances) or _strange_side(measure), reason, **known)
    return _decide_values(measure, distances, within, copied, all(floats), names, known)


def _decide_values(
    measure: Measure,
    distances: tuple[Distance | None, Distance | None],
    within: bool | None,
    copied: bool,
    floats: bool,
    names: tuple[str, str],
    known: dict[str, Any],
) -> Comparison:
    bad = [
        which for which, each in zip(("first", "second"), distances, strict=True) if each is not None and not each.ok
    ]
    if bad:
        broken = any(each is not None and each.verdict == "broken" for each in distances)
        reasons = [f"{which}: {each.reason}" for which, each in _named(distances) if not each.ok]
        side = "both" if len(bad) == 2 else bad[0]
        return Comparison("broken" if broken else "off", side, "; ".join(reasons), **known)
    if measure.same and names[0] == names[1]:
        return Comparison("equal", **known)
    if all(each is not None for each in distances):
        return Comparison("rounding", **known)
    if not floats:
        return Comparison("off", reason="the values differ", **known)
    if copied:
        return Comparison("rounding", reason=f"{names[0]} beside {names[1]}: the same numbers, rounded", **known)
    if measure.same_values and names[0] == names[1]:
        return Comparison("rounding", reason="equal values; zeros of another sign", **known)
    if within:
        return Comparison("rounding", **known)
    return Comparison("off", reason=_how_far(known, within), **known)


def _how_far(known: dict[str, Any], within: bool | None) -> str:
    text = f"differs by up to {known['max_abs']:.3g}"
    return text + (", more than rounding explains" if within is False else ", and nothing was computed that rounds")


def _named(distances: Sequence[Distance | None]) -> list[tuple[str, Distance]]:
    return [(which, each) for which, each in zip(("first", "second"), distances, strict=True) if each is not None]


def _to_blame(distances: tuple[Distance | None, Distance | None]) -> str:
    bad = [which for which, each in _named(distances) if not each.ok]
    return "both" if len(bad) == 2 else (bad[0] if bad else "")


def _strange_side(measure: Measure) -> str:
    return "both" if all(measure.strange_sides) else ("first" if measure.strange_sides[0] else "second")


def _shape(tensor: Any) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(int(size) for size in tensor.shape)


def _name(tensor: Any) -> str:
    if tensor is None:
        return ""
    return dtypes.name_of(tensor) if isinstance(tensor, np.ndarray) else str(tensor.dtype)
