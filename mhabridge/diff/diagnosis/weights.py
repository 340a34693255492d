"""Which simple mistake explains that the parameters of one layer differ between two sides; no layer is run.

What is found is a rearrangement of the first side's parameters that gives the second's bit for bit, after both are
rounded to the narrower of their dtypes (and zeros lose their signs), or a factor that gives them to rounding. Rows and
columns are compared by 64-bit hashes with a key of this process, so that of large matrices little is in memory.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from mhabridge import dtypes
from mhabridge.diff.diagnosis.arrangements import Arrangement, arrangement, packed_arrangement
from mhabridge.diff.diagnosis.findings import Diagnosis, Fault
from mhabridge.diff.diagnosis.sources import Source, hashes, order_of, together

PACKED = (("q_weight", "k_weight", "v_weight"), ("q_bias", "k_bias", "v_bias"))
_WORDS = {"q": "query", "k": "key", "v": "value"}
_UNITS = 4.0  # of roundoff: a factor that was itself rounded, a product, and the rounding of each side
_NEARLY = 2e-6  # of 1: how exact a cosine is
REARRANGED = 0.999  # cosines below that: two matrices as near as this are no rearrangements of each other


@dataclasses.dataclass(frozen=True)
class _Finding:
    """What explains one parameter: the faults have one key where they are one fault in several parameters."""

    part: str
    name: str
    words: str
    mend: str
    other: str = ""

    def key(self) -> tuple[str, str, str]:
        return self.name, self.words.replace(self.part, "*"), self.mend.partition(": ")[2]


def diagnose_weights(
    layer: str,
    side: str,
    first: Mapping[str, Source],
    second: Mapping[str, Source],
    differing: Mapping[str, float],
    names: Mapping[str, str],
    heads: int | None = None,
) -> Diagnosis:
    """What was done to the second side's parameters.

    Args:
        layer: its path.
        side: the name of the second side.
        first: its parameters by canonical name (``q_weight``, ...; of another layer whatever it has).
        second: likewise.
        differing: the parameters to explain, with the cosine between the two sides; NaN where there is none.
        names: what the second side's file calls them.
        heads: of the layer; None when that is not known.

    Example:
        >>> weight = np.float32([[1, 2], [3, 4]])
        >>> from mhabridge.diff.diagnosis.sources import ArraySource
        >>> found = diagnose_weights(
        ...     "fc", "b", {"weight": ArraySource(weight)}, {"weight": ArraySource(weight.T)}, {"weight": 0.9},
        ...     {"weight": "fc.weight"},
        ... )
        >>> found.faults[0].mend, found.sure
        ('fc.weight: transpose', 'certain')
    """
    with np.errstate(all="ignore"):  # what is not finite explains nothing
        return _diagnosed(layer, side, _Search(first, second, names, heads), differing)


def _diagnosed(layer: str, side: str, search: _Search, differing: Mapping[str, float]) -> Diagnosis:
    matrices = [part for part in differing if len(search.shape(part)) == 2]
    found = search.every({part: differing[part] for part in matrices})
    vectors = {part: cosine for part, cosine in differing.items() if part not in found}
    found.update(search.every(vectors) if all(found.values()) else {part: [] for part in vectors})
    left = [part for part, findings in found.items() if not findings]
    chosen = [findings[0] for findings in found.values() if findings]
    faults = _faults([search.as_rows(one) for one in _in_order(chosen)])
    if left:
        partly = f" What is explained: {'; '.join(fault.words for fault in faults)}." if faults else ""
        words = f"Unexplained: {', '.join(left)} differ by more than a simple mistake.{partly}"
        return Diagnosis(layer, side, tried=search.tried, words=words)
    others = tuple((_fault(one),) for findings in found.values() for one in findings[1:])
    text = "; ".join(fault.words for fault in faults) + "." + _same_layer(faults)
    return Diagnosis(
        layer,
        side,
        faults,
        "likely" if others else "certain",
        others,
        search.explains,
        search.tried,
        text,
    )


def _in_order(findings: Sequence[_Finding]) -> list[_Finding]:
    """Parameters that changed places with each other are one fault."""
    made = []
    for packed in PACKED:
        moved = {one.part: one.other for one in findings if one.other and one.part in packed}
        if len(moved) > 1 and moved.keys() == set(moved.values()):
            made += [(part, moved) for part in moved]
    swapped = dict(made)
    return [dataclasses.replace(one, name="q/k/v in another order") if one.part in swapped else one for one in findings]


def _faults(findings: Sequence[_Finding]) -> tuple[Fault, ...]:
    """One fault for each kind, wherever it happened."""
    grouped: dict[tuple[str, ...], list[_Finding]] = {}
    for one in findings:
        grouped.setdefault((one.name,) if one.name.startswith("q/k/v") else one.key(), []).append(one)
    found = []
    for same in grouped.values():
        where, mends = ", ".join(one.part for one in same), "; ".join(one.mend for one in same)
        words = same[0].words.replace(same[0].part, where, 1)
        if same[0].name.startswith("q/k/v"):
            words = ", ".join(one.words for one in same)
        found.append(Fault(same[0].name, where, words, mends))
    return tuple(found)


def _fault(one: _Finding) -> Fault:
    return Fault(one.name, one.part, one.words, one.mend)


def _same_layer(faults: Sequence[Fault]) -> str:
    """Heads that are in another order everywhere alike give the same outputs."""
    there = {part for fault in faults if fault.name == "heads permuted" for part in fault.where.split(", ")}
    if {"q_weight", "k_weight", "v_weight", "out_weight"} <= there and len({fault.name for fault in faults}) == 1:
        return " If that is one order everywhere, outputs are the same, and attention weights are in that order."
    return ""


class _Search:
    """Tries rearrangements of the first side's parameters."""

    def __init__(
        self, first: Mapping[str, Source], second: Mapping[str, Source], names: Mapping[str, str], heads: int | None
    ) -> None:
        self.first, self.second, self.names, self.heads = first, second, names, heads
        self.tried, self.explains = 0, 0.0
        self._orders: dict[str, list[int]] = {}  # of the rows of weights that are permuted
        self._prints: dict[tuple[str, str, bool, bool], list[int]] = {}
        used = {one.dtype for one in (*first.values(), *second.values()) if one.dtype in dtypes.FLOATS}
        self.narrow = max(used, key=dtypes.UNIT_ROUNDOFF.__getitem__, default="float32")

    def shape(self, part: str) -> tuple[int, ...]:
        """Of a parameter, on the side that has it."""
        source = self.second.get(part) or self.first.get(part)
        return source.shape if source is not None else ()

    def every(self, differing: Mapping[str, float]) -> dict[str, list[_Finding]]:
        """What explains each of some parameters, by themselves or together."""
        found = {part: self.explain(part, cosine) for part, cosine in differing.items()}
        near = all(abs(cosine) > REARRANGED for cosine in differing.values())
        left = tuple(part for part, findings in found.items() if not findings)
        found.update({finding.part: [finding] for finding in (() if near else self.packed(left))})
        return found

    def explain(self, part: str, cosine: float) -> list[_Finding]:
        """Everything that explains one parameter by itself; the likeliest comes first."""
        mine, theirs = self.first.get(part), self.second.get(part)
        if mine is None or theirs is None:
            return self._lost(part)
        if mine.dtype not in dtypes.FLOATS or theirs.dtype not in dtypes.FLOATS or len(mine.shape) not in (1, 2):
            return []
        if math.isnan(cosine) and self._zeros("second", part) and not self._zeros("first", part):
            return [self._made(part, "zeros", f"{part} is all zeros", "take it from the first side")]
        if abs(cosine) > 1 - _NEARLY - 4 * dtypes.UNIT_ROUNDOFF[self.narrow] ** 2:
            found = self._scaled(part, cosine)
            if found:
                return found
        if abs(cosine) > REARRANGED and len(mine.shape) == 2:
            return []
        found = self._elsewhere(part)
        return found or self._slice(part) or self._permuted(part)

    def _made(self, part: str, name: str, words: str, mend: str, other: str = "") -> _Finding:
        return _Finding(part, name, words, f"{self.names.get(part, part)}: {mend}", other)

    def _lost(self, part: str) -> list[_Finding]:
        if not part.endswith("bias") and not part.startswith("bias_"):
            return []
        lost = part not in self.second
        what = "lost" if lost else "added"
        mend = "take it from the first side" if lost else "leave it out"
        return [self._made(part, f"bias {what}", f"{part} is {what} on the second side", mend)]

    def _zeros(self, which: str, part: str) -> bool:
        source = (self.first if which == "first" else self.second)[part]
        return not any(np.any(dtypes.to_float64(block) != 0) for block in source.blocks())

    def _scaled(self, part: str, cosine: float) -> list[_Finding]:
        """One factor for all elements, told by the first block."""
        self.tried += 1
        factor, unit, worst = None, dtypes.UNIT_ROUNDOFF[self.narrow], 0.0
        if self.first[part].shape != self.second[part].shape:
            return []
        for one, other in together(self.first[part].blocks(), self.second[part].blocks()):
            x, y = dtypes.to_float64(one).ravel(), dtypes.to_float64(other).ravel()
            if factor is None:
                square = float(np.dot(x, x))
                factor = float(np.dot(x, y)) / square if square > 0 and math.isfinite(square) else None
                if factor is not None and not math.isfinite(factor):
                    return []
                factor = None if factor is None else self._plain(factor, unit)
            if factor is None:
                continue
            bound = _UNITS * unit * np.maximum(np.abs(y), np.abs(factor * x)) + 1e-300
            times = float(np.max(np.abs(y - factor * x) / bound, initial=0.0))
            if not times <= 1.0:  # also where one is NaN
                return []
            worst = max(worst, times)
        if factor is None or abs(factor - 1) <= _UNITS * unit:
            return []
        self.explains = max(self.explains, worst)
        if factor == -1:
            return [self._made(part, "negated", f"{part} is negated", "negate")]
        text = f"{factor:.6g}{self._known_factors().get(factor, '')}"
        name = "bias doubled" if "bias" in part and factor == 2 else "scaled"
        return [self._made(part, name, f"{part} is multiplied by {text}", f"divide by {factor:.6g}")]

    def _known_factors(self) -> dict[float, str]:
        """Factors that people forget or use twice, and their names."""
        found = {2.0: "", 0.5: "", -1.0: ""}
        if self.heads and "q_weight" in self.first:
            size = self.first["q_weight"].shape[0] / self.heads
            found.update(
                {size**0.5: f" (sqrt of the head size {size:g})", size**-0.5: f" (1/sqrt of the head size {size:g})"}
            )
        return found

    def _plain(self, factor: float, unit: float) -> float:
        """The known factor that is as near as rounding leaves it, or the factor itself."""
        return next((one for one in self._known_factors() if abs(factor / one - 1) <= unit), factor)

    def _elsewhere(self, part: str) -> list[_Finding]:
        """The whole of a parameter, its own or another, turned or not, with its sign or the other."""
        found = []
        others = [part, *(name for name in self.first if name != part)]
        ways = itertools.product((False, True), (False, True), others)
        for negated, turned, other in ways:
            if (other == part and not turned and not negated) or not self._comparable(part, other, turned):
                continue
            self.tried += 1
            if self._own(part, False)[:1] != self._of(other, turned, negated)[:1]:
                continue
            if self._own(part, False) == self._of(other, turned, negated):
                found.append(self._told(part, other, turned, negated))
        return found

    def _told(self, part: str, other: str, turned: bool, negated: bool) -> _Finding:
        steps = [word for word, is_so in (("transpose", turned), ("negate", negated)) if is_so]
        done = " and ".join({"transpose": "transposed", "negate": "negated"}[step] for step in steps)
        if other == part:
            projection = "projection " if part.endswith("_weight") else ""
            name = f"{projection}transposed" if turned else "negated"
            return self._made(part, name, f"{part} is {done}", ", then ".join(steps))
        held = [name for name in self.second if self._comparable(name, part, False) and name != part]
        holder = next((name for name in held if self._own(name, False) == self._of(part, False, False)), None)
        mend = f"put what lies in {self.names.get(holder, holder)} there" if holder else f"take the first side's {part}"
        words = f"{part} holds {other}" + (f", {done}" if done else "")
        return self._made(part, "wrong slice", words, mend, "" if done else other)

    def _comparable(self, part: str, other: str, turned: bool) -> bool:
        one, two = self.second.get(part), self.first.get(other)
        if one is None or two is None or two.dtype not in dtypes.FLOATS or len(two.shape) not in (1, 2):
            return False
        shape = two.shape[::-1] if turned else two.shape
        return one.shape == shape and not (turned and len(shape) != 2)

    def _slice(self, part: str) -> list[_Finding]:
        """Rows of the packed projection from a wrong one on."""
        packed = next((parts for parts in PACKED if part in parts), ())
        rows = self._stack(packed)
        own = self._own(part, False)
        if not rows or not own:
            return []
        self.tried += 1
        for start in [place for place, row in enumerate(rows) if row == own[0]]:
            if rows[start : start + len(own)] == own:
                return [self._of_rows(part, packed, start, len(own))]
        return []

    def _of_rows(self, part: str, packed: Sequence[str], start: int, length: int) -> _Finding:
        """Said as a diff of what layers compute says it, where the second side's file has the three in one tensor."""
        right = self._begin(part, packed)
        span, wanted = (f"{at}:{at + length}" for at in (start, right))
        words = f"{part} holds rows [{span}] of the packed projection instead of [{wanted}]"
        if not self._in_one_tensor(part):
            return self._made(part, "wrong slice", words, f"take rows [{wanted}] of the packed projection")
        whole = self.names[part].removesuffix(f" ({part})")
        mend = f"{whole}: rows {wanted} of the packed projection are the {_WORDS[part[0]]}, not {span}"
        return _Finding(part, "wrong slice", words, mend)

    def _begin(self, part: str, packed: Sequence[str]) -> int:
        return sum(self.first[name].shape[0] for name in packed[: packed.index(part)])

    def _in_one_tensor(self, part: str) -> bool:
        """The name of a tensor that holds several parameters has the parameter's behind it."""
        return self.names.get(part, part).endswith(f" ({part})")

    def as_rows(self, one: _Finding) -> _Finding:
        """Another projection's whole block, taken from the packed one, is a slice of it at the wrong rows."""
        packed = next((parts for parts in PACKED if one.part in parts and one.other in parts), ())
        if one.name != "wrong slice" or not packed or not self._stack(packed) or not self._in_one_tensor(one.part):
            return one
        return self._of_rows(one.part, packed, self._begin(one.other, packed), self.second[one.part].shape[0])

    def _stack(self, packed: Sequence[str]) -> list[int]:
        there = [self.first[part] for part in packed if part in self.first]
        if len(there) != 3 or len({(one.shape[1:], one.dtype in dtypes.FLOATS) for one in there}) != 1:
            return []
        return [row for part in packed for row in self._of(part, False, False)]

    def _permuted(self, part: str) -> list[_Finding]:
        """Its rows, or its columns, in another order; of a matrix that lay the right way round or was transposed."""
        for turned, columns in ((False, False), (False, True), (True, False), (True, True)):
            if not self._comparable(part, part, turned):
                continue
            self.tried += 1
            own, rows = self._own(part, columns), self._of(part, turned != columns, False)
            order = order_of(own, rows) or self._order_of_weight(part, own, rows)
            if order is not None:
                self._orders[part] = order if not columns else []
                axis = "columns" if columns else "rows"
                made = arrangement(order, self._heads_of(part, len(own)), axis)
                return [self._arranged(part, made, turned)]
        return []

    def _order_of_weight(self, part: str, own: Sequence[int], rows: Sequence[int]) -> list[int] | None:
        """A bias may have the same number twice: then the order of its weight's rows is tried."""
        order = self._orders.get(part.replace("bias", "weight"), [])
        return order if order and len(order) == len(rows) and list(own) == [rows[place] for place in order] else None

    def _heads_of(self, part: str, length: int) -> int | None:
        known = self.heads if self.heads and length % self.heads == 0 else None
        return known if part.startswith(("q_", "k_", "v_", "out_weight")) else None

    def _arranged(self, part: str, made: Arrangement, turned: bool) -> _Finding:
        words = f"of {part}{', transposed,' if turned else ''} {made.words}"
        return self._made(part, made.name, words, f"{'transpose, then ' if turned else ''}{made.mend}")

    def packed(self, parts: tuple[str, ...]) -> list[_Finding]:
        """Rows of all three projections among each other: the packed one was read in another order."""
        found = []
        for packed in PACKED:
            here = [part for part in packed if part in self.second]
            rows = self._stack(packed)
            if not set(parts) & set(packed) or len(here) != 3 or not rows:
                continue
            self.tried += 1
            own = [row for part in packed for row in self._own(part, False)]
            weight = packed[0].replace("bias", "weight") + " packed"
            order = order_of(own, rows) or self._order_of_weight(weight, own, rows)
            made = None if order is None else packed_arrangement(order, self._heads_of(packed[0], len(rows) // 3))
            if made is not None and order is not None:
                self._orders[f"{packed[0]} packed"] = order
                found += [self._arranged(part, made, False) for part in packed if part in parts]
        return found

    def _own(self, part: str, turned: bool) -> list[int]:
        return self._printed("second", part, turned, False)

    def _of(self, part: str, turned: bool, negated: bool) -> list[int]:
        return self._printed("first", part, turned, negated)

    def _printed(self, which: str, part: str, turned: bool, negated: bool) -> list[int]:
        key = (which, part, turned, negated)
        if key not in self._prints:
            source = (self.first if which == "first" else self.second)[part]
            self._prints[key] = [row for block in source.blocks(turned) for row in hashes(block, self.narrow, negated)]
        return self._prints[key]
