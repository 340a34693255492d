"""How far two runs may have drifted apart by rounding before a layer is reached.

What lies between two recorded layers (norms, a feed-forward network, the residual sums) is not recorded, so it cannot
be computed again. What rounding does there is known all the same: each of its operations adds a relative error of a few
u, with u the larger unit roundoff of the two sides' dtypes; these errors are independent of each other and of the
values, so they add up like the steps of a random walk; and a step of the model that keeps its values in range, as norms
do, hands on the relative error that comes in about as large as it was. Therefore, with d the relative difference
|a - b| / |a| (Euclidean norms over a whole tensor) at the inputs of a layer and D the largest one at the inputs of the
layers before it whose computation was found fine, rounding explains

    d <= sqrt((GROWTH D)^2 + (FRESH u)^2)

and likewise, in each row by itself, ROW times that: a fault in one position must not hide among the others. It also
explains only a small *common scale* of the difference, s = <a - b, a> / <a, a>: errors that are independent of the
values have none, while a norm with another epsilon changes nothing but the scale:

    |s| <= sqrt((GROWTH S)^2 + (SCALE u)^2)

with S the largest such scale before. None of these bounds exceeds ``MOST``: zeros and a flipped sign are no rounding,
however coarse the dtype. A bound that grows with what was measured before, and not with the depth, stays
tight in a deep model that drifts slowly, and does not blame a layer for what came in.

Measured on encoders of 12 layers (E = 256 and 768, norms first and last) and on the 6 of MiniLM, over all pairs of
PyTorch, MindSpore and MegEngine in float32, PyTorch and MindSpore in float16, PyTorch in bfloat16, and each of them
against PyTorch in float64: one layer adds at most 13 u and multiplies by at most 1.5; a row differs at most 2.5 times
as much as the tensor; the scale stays below 2 u. Gradients of MiniLM begin 17 u apart and end at 35 u, their scale at
7 u.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np

from mhabridge import dtypes
from mhabridge.diff.comparing import Comparison, Measure, decide
from mhabridge.diff.recordings.arrays import float64, of_one_width

FRESH = 32.0
GROWTH = 2.0
ROW = 8.0
SCALE = 12.0
BACKWARD = 4.0
MOST = 0.5  # of a tensor's norm: what is further apart shares too little to be called the same
MOST_OF_FEW = 0.1  # as far as a few numbers may be apart: they come close to others by chance
_FEW = 2.0  # what ``luck`` has of a few: of six
_UNLUCKY = 100.0
_BLOCK = 1 << 20  # elements that are looked at at once: in float64, several times


@dataclasses.dataclass(frozen=True)
class Apart:
    """How far two tensors are apart.

    Args:
        whole: |a - b| / |a| over the tensor.
        row: the largest one of a row (the last axis), with the root mean square of all rows in the place of a norm that
            is smaller than that.
        scale: <a - b, a> / <a, a>.
        norm: of the larger side.
        elements: how many there are.
    """

    whole: float
    row: float
    scale: float
    norm: float = 0.0
    elements: int = 0

    @property
    def size(self) -> float:
        """Of its elements: their root mean square."""
        return self.norm / math.sqrt(max(1, self.elements))


def apart(first: np.ndarray, second: np.ndarray) -> Apart:
    """How far two tensors of one shape are apart, over what is finite on both sides; in bounded memory.

    Example:
        >>> found = apart(np.float32([[3, 4], [0, 5]]), np.float32([[3, 4], [0, 6]]))
        >>> round(found.whole, 4), found.row, round(found.scale, 4)
        (0.1414, 0.2, -0.1)
    """
    if not first.size:
        return Apart(0.0, 0.0, 0.0)
    one, other = _as_rows(first), _as_rows(second)
    squares, errors, along, theirs = np.zeros(len(one)), np.zeros(len(one)), 0.0, 0.0
    step = max(1, _BLOCK // one.shape[1])
    for start in range(0, len(one), step):
        part = slice(start, start + step)
        a, b = float64(one[part]), float64(other[part])
        fine = np.isfinite(a) & np.isfinite(b)
        a, b = np.where(fine, a, 0.0), np.where(fine, b, 0.0)
        difference = a - b
        squares[part], errors[part] = np.einsum("ij,ij->i", a, a), np.einsum("ij,ij->i", difference, difference)
        along += float(np.vdot(difference, a))
        theirs += float(np.vdot(b, b))
    total, wrong = float(squares.sum()), float(errors.sum())
    norm = math.sqrt(max(total, theirs))
    if wrong == 0.0:
        return Apart(0.0, 0.0, 0.0, norm, first.size)
    if total == 0.0:
        return Apart(math.inf, math.inf, 0.0, norm, first.size)
    rows = np.sqrt(errors / np.maximum(squares, squares.mean()))
    return Apart(math.sqrt(wrong / total), float(rows.max()), along / total, norm, first.size)


def _as_rows(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1, array.shape[-1]) if array.ndim else array.reshape(1, 1)


def luck(elements: int) -> float:
    """By how much more a model's last answer may differ that has but a few elements.

    It is the sum of many products, which may cancel: that its norm comes out smaller by t than such sums are has a
    probability of about t ** elements. This is 1/t for one in a hundred, and with what ``FRESH`` leaves over for less
    than one in 300.

    Example:
        >>> luck(1), luck(2), round(luck(100), 2)
        (100.0, 10.0, 1.05)
    """
    return float(_UNLUCKY ** (1.0 / max(1, elements)))


class Drift:
    """What two runs have drifted apart so far.

    Args:
        times: by how much more one step may add: 1 forward; gradients cancel more than values do (``BACKWARD``).
    """

    def __init__(self, times: float = 1.0) -> None:
        self._times = times
        self._whole = self._scale = self._norm = self._size = 0.0

    def backward(self) -> Drift:
        """The drift of the gradients: they begin as far apart as the values are on which they depend."""
        later = Drift(BACKWARD)
        later._whole, later._scale = self._whole, self._scale
        return later

    def after(self, more: Iterable[Apart]) -> Drift:
        """A drift after some more differences; the old one stays as it is."""
        later = Drift(self._times)
        later._whole, later._scale = self._whole, self._scale
        later._norm, later._size = self._norm, self._size
        for found in more:
            later.add(found)
        return later

    def explains(self, found: Apart, unit: float, elements: int = 0) -> str:
        """Why rounding does not explain a difference; empty when it does.

        Args:
            found: the difference.
            unit: u, the larger unit roundoff of the two sides.
            elements: how many there are, if so few that they may have cancelled (``luck``); 0 for no such allowance.
        """
        if elements and found.whole and not self._tells(unit, elements):
            return f"a relative difference of {found.whole:.2g}, where so few numbers tell nothing"
        times = luck(elements) if elements else 1.0
        whole = min(MOST, times * self._bound(unit))
        scale = min(MOST, times * math.hypot(GROWTH * self._scale, SCALE * self._times * unit))
        if elements:  # errors of n elements that know nothing of each other have this much of a common scale
            scale = max(scale, whole / math.sqrt(elements))
        row = min(MOST, ROW * whole)
        if not found.whole <= whole:
            return f"a relative difference of {found.whole:.2g}, where rounding explains {whole:.2g}"
        if not found.row <= row:
            return f"a row with a relative difference of {found.row:.2g}, where rounding explains {row:.2g}"
        if not abs(found.scale) <= scale:
            return f"another scale by {abs(found.scale):.2g}, where rounding explains {scale:.2g}"
        return ""

    def _bound(self, unit: float) -> float:
        return math.hypot(GROWTH * self._whole, FRESH * self._times * unit)

    def _tells(self, unit: float, elements: int) -> bool:
        """Whether elements of a last answer that rounding explains are more than some that came close by chance."""
        return luck(elements) < _FEW or luck(elements) * self._bound(unit) <= MOST_OF_FEW

    def doubts(self, found: Apart, unit: float) -> str:
        """Why it cannot be told whether rounding explains a difference that it need not; empty where it can.

        Args:
            found: the difference of a model's last answer.
            unit: u.

        Example:
            >>> Drift().doubts(Apart(0.5, 0.5, 0.5, 1.0, 1), 2.0**-9)
            'rounding may have changed so few numbers by 6.2 of their size'
            >>> Drift().doubts(Apart(0.5, 0.5, 0.5, 1.0, 1), 2.0**-24)
            ''
        """
        if not found.elements:
            return ""
        bound = self._bound(unit)
        lucky = luck(found.elements) * bound
        if not self._tells(unit, found.elements) and found.whole <= lucky and found.row <= ROW * lucky:
            return f"rounding may have changed so few numbers by {lucky:.2g} of their size"
        # A sum over all that came in has an error of this size, whatever is left of it.
        few = luck(found.elements) >= _FEW
        lost = bound * (self._norm / math.sqrt(found.elements) if few else self._size)
        if found.size <= lost:
            return f"it is of size {found.size:.2g}, and rounding of what it is made of may have left {lost:.2g}"
        return ""

    def add(self, found: Apart) -> None:
        """Take a difference that is explained as what comes in further on."""
        self._whole, self._scale = max(self._whole, found.whole), max(self._scale, abs(found.scale))
        self._norm, self._size = max(self._norm, found.norm), max(self._size, found.size)

    def compare(
        self,
        first: np.ndarray | None,
        second: np.ndarray | None,
        unit: float,
        infinite: bool = False,
        *,
        whole: tuple[np.ndarray | None, np.ndarray | None] = (None, None),
        few: bool = False,
    ) -> tuple[Comparison, Apart]:
        """Compare two tensors that came a long way.

        Args:
            first: of one side; None if it is missing.
            second: of the other.
            unit: u.
            infinite: whether both may have the same infinity: masks do.
            whole: what the two are parts of, where a difference is to be seen beside all of that.
            few: whether they may be so few elements that they have cancelled.

        Returns:
            The comparison, and how far they are apart (nothing, where that cannot be said).

        Example:
            >>> drift = Drift()
            >>> x = np.linspace(-1, 1, 64, dtype="float32").reshape(8, 8)
            >>> noise = np.where(np.arange(64).reshape(8, 8) % 2, 1e-7, -1e-7).astype("float32")
            >>> drift.compare(x, x + noise, 2.0**-24)[0].verdict, drift.compare(x, x * 1.00001, 2.0**-24)[0].verdict
            ('rounding', 'off')
        """
        measure, found, why = Measure(), Apart(0.0, 0.0, 0.0), ""
        names = tuple("" if each is None else dtypes.name_of(each) for each in (first, second))
        if first is not None and second is not None:
            first, second = of_one_width(first, second)
        if first is not None and second is not None and first.shape == second.shape:
            _measure(first, second, infinite, measure)
            if measure.strange is None:
                a, b = whole
                found = apart(first, second) if a is None or b is None or a.shape != b.shape else apart(a, b)
                why = self.explains(found, unit, first.size if few else 0)
        comparison = decide(first, second, measure, within=not why)
        comparison = dataclasses.replace(comparison, dtypes=(names[0], names[1]))
        if comparison.verdict == "off" and why:
            comparison = dataclasses.replace(comparison, reason=why)
        return comparison, found


def _measure(first: np.ndarray, second: np.ndarray, infinite: bool, measure: Measure) -> None:
    """Add two tensors to a measure, in bounded memory."""
    x, y = np.ravel(first), np.ravel(second)
    for start in range(0, max(1, x.size), _BLOCK):
        a, b = x[start : start + _BLOCK], y[start : start + _BLOCK]
        allowed = None
        if infinite:
            exact = float64(a)
            allowed = np.isinf(exact) & (exact == float64(b))
        measure.add(a, b, allowed)
