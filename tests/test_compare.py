"""Two tensors beside each other: no false pass and no false fail on what fools other tools."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhabridge import dtypes
from mhabridge.diff.bits import are_copies
from mhabridge.diff.comparing import Comparison, Measure, compare
from mhabridge.diff.judge import Distance
from mhabridge.errors import ArgumentError

RNG = np.random.default_rng(0)
X = RNG.standard_normal((4, 6)).astype(np.float32)
OK = Distance("rounding", max_error=1e-7)
OFF = Distance("off", "an element is 9 times as far off as rounding justifies")


def with_at(index: tuple[int, int], value: float) -> np.ndarray:
    changed = X.copy()
    changed[index] = value
    return changed


@pytest.mark.parametrize(
    ("first", "second", "verdict", "side", "words"),
    [
        (X, with_at((1, 2), np.nan), "broken", "second", "nan"),
        (with_at((1, 2), np.nan), X, "broken", "first", "nan"),
        (with_at((1, 2), np.nan), with_at((1, 2), np.nan), "broken", "both", "nan and nan"),
        (X * np.nan, X * np.nan, "broken", "both", "24 elements"),
        (X, with_at((0, 0), np.inf), "broken", "second", "inf"),
        (with_at((0, 0), np.inf), with_at((0, 0), np.inf), "broken", "both", "inf and inf"),
        (with_at((0, 0), np.inf), with_at((0, 0), -np.inf), "broken", "both", "inf and -inf"),
        (None, X, "broken", "first", "missing"),
        (X, None, "broken", "second", "missing"),
        (X[:1], X, "broken", "", "shape (1, 6) and (4, 6)"),
        (X, X.T.copy(), "broken", "", "shape"),
        (np.float32(1.0).reshape(()), np.float32([1.0]), "broken", "", "shape () and (1,)"),
        (X, X.astype(np.int32), "broken", "", "dtype float32 and int32"),
        (np.int32([1]), np.int64([1]), "broken", "", "dtype"),
        (np.array([True]), np.uint8([1]), "broken", "", "dtype"),
        (X, -X, "off", "", "differs"),
        (X, X[::-1].copy(), "off", "", "differs"),
        (X, X.reshape(6, 4).T.copy(), "off", "", "differs"),
        (np.float32([1, 3]), np.float32([2, 2]), "off", "", "differs"),  # equal means
        (X, np.nextafter(X, np.float32(9)), "off", "", "nothing was computed that rounds"),
        (np.array([True, False]), np.array([True, True]), "off", "", "values differ"),
        (np.zeros((0, 3), np.float32), np.zeros((0, 4), np.float32), "broken", "", "shape"),
        (X, X.copy(), "equal", "", ""),
        (np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32), "equal", "", ""),
        (np.array([True]), np.array([True]), "equal", "", ""),
        (np.float32([0.0, 1.0]), np.float32([-0.0, 1.0]), "rounding", "", "zeros of another sign"),
        (X, X.astype(np.float16), "rounding", "", "the same numbers, rounded"),
        (X.astype(ml_dtypes.bfloat16), X, "rounding", "", "the same numbers, rounded"),
        (X, (X * np.float32(1.01)).astype(np.float16), "off", "", "differs"),
        (X.astype(np.float16), X.astype(ml_dtypes.bfloat16), "rounding", "", "the same numbers, rounded"),
        (X.astype(np.float16), (X * np.float32(1.01)).astype(ml_dtypes.bfloat16), "off", "", "differs"),
    ],
)
def test_verdicts_without_a_reference(first: Any, second: Any, verdict: str, side: str, words: str) -> None:
    found = compare(first, second)
    assert (found.verdict, found.side) == (verdict, side), found
    assert words in found.reason
    assert found.ok == (verdict in ("equal", "rounding"))


@given(st.lists(st.floats(-65000, 65000, width=32), min_size=1), st.floats(2.0**-7, 1))
def test_halves_of_both_kinds_are_copies_of_the_numbers_they_were(values: list[float], further: float) -> None:
    """Rounding one of them to the other would often miss by one number."""
    numbers = np.float32(values)
    half, brain = numbers.astype(np.float16), numbers.astype(ml_dtypes.bfloat16)
    assert are_copies(half, brain)
    assert are_copies(dtypes.to_words(brain), half)
    assert are_copies(numbers, dtypes.to_words(brain))
    moved = np.append(numbers, 1).astype(np.float16)
    other = np.append(numbers, 1 + 2.0**-6 + further).astype(ml_dtypes.bfloat16)
    assert not are_copies(moved, other)


def test_integers_do_not_wrap_around() -> None:
    assert compare(np.uint8([255, 0]), np.uint8([0, 0])).max_abs == 255
    assert compare(np.int8([127]), np.int8([-128])).max_abs == 255
    wide = compare(np.uint64([2**64 - 1]), np.uint64([2**64 - 2]))
    assert (wide.verdict, wide.max_abs) == ("off", 1.0)
    assert compare(np.int64([2**62]), np.int64([-(2**62)])).max_abs == 2.0**63


def test_the_reference_decides_between_rounding_and_off() -> None:
    near = np.nextafter(X, np.float32(9))
    assert compare(X, near, distances=(OK, OK)).verdict == "rounding"
    for distances, side in (((OFF, OK), "first"), ((OK, OFF), "second"), ((OFF, OFF), "both")):
        found = compare(X, near, distances=distances)
        assert (found.verdict, found.side) == ("off", side)
        assert "9 times" in found.reason


def test_equal_bits_do_not_excuse_what_both_sides_have_wrong() -> None:
    assert compare(X, X.copy(), distances=(OFF, OFF)).verdict == "off"
    assert compare(X, X.copy(), distances=(Distance("broken", "missing"), OK)).verdict == "broken"


def test_nan_passes_exactly_where_the_reference_has_it() -> None:
    there = np.zeros(X.shape, bool)
    there[1, 2] = True
    both = with_at((1, 2), np.nan)
    assert compare(both, both.copy(), allowed=there).verdict == "equal"
    assert compare(both, X, allowed=there).verdict == "broken"
    assert compare(both, both.copy(), allowed=np.roll(there, 1)).verdict == "broken"
    everywhere = np.full(X.shape, np.nan, np.float32)
    found = compare(everywhere, everywhere.copy(), allowed=np.ones(X.shape, bool))
    assert (found.verdict, found.max_abs) == ("equal", 0.0)


def test_what_is_justified_passes_and_no_more() -> None:
    near = X + np.float32(1e-5)
    assert compare(X, near, justified=2e-5).verdict == "rounding"
    assert compare(X, near, justified=5e-6).verdict == "off"
    assert compare(X, with_at((0, 0), np.nan), justified=np.inf).verdict == "broken"


def test_the_numbers() -> None:
    found = compare(np.float64([1.0, -4.0, 0.0]), np.float64([1.0, -5.0, 0.0]))
    assert (found.max_abs, found.max_rel, found.index, found.values) == (1.0, 0.2, (1,), (-4.0, -5.0))
    assert found.mean_abs == pytest.approx(1 / 3)
    assert found.mean_rel == pytest.approx(0.2 / 3)
    assert found.cosine == pytest.approx(21 / math.sqrt(17 * 26))
    assert found.shapes == ((3,), (3,))
    assert compare(X, -X).cosine == pytest.approx(-1.0)
    assert math.isnan(compare(np.zeros(3), np.zeros(3)).cosine)


def test_the_worst_element_of_a_broken_tensor_is_the_broken_one() -> None:
    found = compare(X, with_at((3, 1), np.nan))
    assert found.index == (3, 1)
    assert math.isnan(found.values[1])
    assert found.max_abs == 0.0  # over what is finite on both sides


def test_json_holds_what_no_number_is() -> None:
    text = json.dumps(compare(X, with_at((0, 0), -np.inf)).to_dict(), allow_nan=False)
    assert json.loads(text)["values"][1] == "-inf"
    assert json.loads(json.dumps(Comparison("equal").to_dict(), allow_nan=False))["max_abs"] is None


def test_neither_tensor_is_an_error() -> None:
    with pytest.raises(ArgumentError, match="at least one"):
        compare(None, None)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_pieces_give_what_the_whole_gives(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 40))
    values = st.floats(width=32, allow_nan=True, allow_infinity=True)
    a, b = (np.array(data.draw(st.lists(values, min_size=size, max_size=size)), np.float32) for _ in "ab")
    cuts = sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=4))})
    whole, pieces = Measure(), Measure()
    whole.add(a, b)
    for start, stop in itertools.pairwise(cuts):
        pieces.add(a[start:stop], b[start:stop])
    assert (whole.strange, whole.strange_count, whole.same) == (pieces.strange, pieces.strange_count, pieces.same)
    expected, found = whole.numbers((size,)), pieces.numbers((size,))
    assert expected.keys() == found.keys()
    for name in expected.keys() - {"index", "values"}:
        assert found[name] == pytest.approx(expected[name], rel=1e-9, nan_ok=True)
    assert expected.get("index") == found.get("index")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20), st.data())
def test_a_changed_element_never_passes(values: list[float], data: st.DataObject) -> None:
    a = np.array(values, np.float32)
    b = a.copy()
    at = data.draw(st.integers(0, len(values) - 1))
    b[at] = data.draw(st.floats(width=32).filter(lambda value: value != a[at]))
    found = compare(a, b)
    assert not found.ok
    assert found.index == (at,)


def test_the_side_with_nan_is_named_over_all_elements() -> None:
    a, b = np.float32([np.nan, 1, 2]), np.float32([0, np.nan, 2])
    assert compare(a, b).side == "both"
    assert compare(np.float32([1, 1]), np.float32([np.nan, np.inf])).side == "second"
    one, two = Measure(), Measure()
    one.add(a[:1], b[:1])
    two.add(a[1:], b[1:])
    one.join(two)
    assert one.strange_sides == (True, True)


def test_the_reference_is_not_blamed_for_nan_that_belongs_there() -> None:
    exact, wrong = np.float32([np.nan, 1]), np.float32([0, 1])
    found = compare(exact, wrong, distances=(OK, Distance("broken", "0 where NaN belongs")), allowed=np.isnan(exact))
    assert (found.verdict, found.side) == ("broken", "second")
