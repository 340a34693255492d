"""The fast sums say what the exact ones say, and leave to these what they cannot say."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhabridge import dtypes
from mhabridge.diff import sums
from mhabridge.diff.bits import same_bits
from mhabridge.diff.comparing import Comparison, Measure, compare

KINDS = ["f2", ml_dtypes.bfloat16, "f4", "f8", "u1", "i1", "i2", "i4", "i8", "?"]
SIZE = 10_000


def exactly(first: np.ndarray, second: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> Comparison:
    with monkeypatch.context() as patched:
        patched.setattr(sums, "FEWEST", 1 << 60)
        return compare(first, second)


def assert_close(found: Comparison, expected: Comparison) -> None:
    for name in ("verdict", "side", "reason", "index", "values", "max_abs"):
        assert str(getattr(found, name)) == str(getattr(expected, name)), name
    for name in ("mean_abs", "max_rel", "mean_rel", "cosine"):
        wanted = pytest.approx(getattr(expected, name), rel=3e-6, abs=1e-300, nan_ok=True)
        assert getattr(found, name) == wanted, name


def drawn(kind: Any, seed: int) -> np.ndarray:
    values = 50 * np.random.default_rng(seed).standard_normal(SIZE)
    return (values > 0) if kind == "?" else values.astype("i8" if np.dtype(kind).kind in "iu" else kind).astype(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_those_of_float64(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = drawn(kind, 0), drawn(kind, 1)
    assert (sums.of(first, second) is None) == (kind == "i8")
    assert_close(compare(first, second), exactly(first, second, monkeypatch))
    assert_close(compare(first, first), exactly(first, first, monkeypatch))
    words = [dtypes.to_words(array) for array in (first, second)]
    assert_close(compare(*words), exactly(*words, monkeypatch))


@pytest.mark.parametrize("other", ["f2", ml_dtypes.bfloat16, "f8"])
def test_of_two_dtypes(other: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = drawn("f4", 0)
    for second in (first.astype(other), drawn(other, 1)):
        assert sums.of(first, second) is not None
        assert_close(compare(first, second), exactly(first, second, monkeypatch))


@pytest.mark.parametrize("strange", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["f2", ml_dtypes.bfloat16, "f4", "f8"])
def test_nothing_strange_passes(kind: Any, strange: float) -> None:
    first, second = drawn(kind, 0), drawn(kind, 0)
    second[777] = strange
    for pair in ((first, second), (second, first), (second, second)):
        found = compare(*pair)
        assert (found.verdict, found.index) == ("broken", (777,))


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e-12, 1e12, 1e18, 1e30])
def test_sizes_that_float32_cannot_square(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (drawn("f4", seed) * np.float32(size) for seed in (0, 1))
    assert_close(compare(first, second), exactly(first, second, monkeypatch))
    second = first.copy()
    second[5] = np.float32(size) * 3e4
    assert_close(compare(first, second), exactly(first, second, monkeypatch))


def test_zeros_on_both_sides_are_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = drawn("f4", 0), drawn("f4", 1)
    first[100:200] = second[100:200] = 0
    first[200:300] = 0
    found = sums.of(first, second)
    assert found is not None
    assert 1.0 <= found.max_rel <= 2.0
    assert_close(compare(first, second), exactly(first, second, monkeypatch))
    zeros = np.zeros(SIZE, "f4")
    assert_close(compare(zeros, second), exactly(zeros, second, monkeypatch))
    assert compare(zeros, -zeros).verdict == "rounding"


def test_one_bit_counts() -> None:
    first = drawn("f4", 0)
    second = first.copy()
    second.view("u4")[4321] ^= 1
    found = compare(first, second)
    assert (found.verdict, found.index) == ("off", (4321,))
    assert found.max_abs == abs(float(first[4321]) - float(second[4321]))


@given(st.lists(st.integers(1, 9000), min_size=1, max_size=6), st.integers(0, 3))
def test_pieces_and_parts_of_pieces_add_up(cuts: list[int], seed: int) -> None:
    first, second = drawn("f4", seed), drawn("f4", seed + 1)
    second[3000:6000] = first[3000:6000]
    whole, joined = Measure(), Measure()
    whole.add(first, second)
    places = sorted({0, SIZE, *cuts})
    for start, stop in itertools.pairwise(places):
        part = Measure()
        part.add(first[start:stop], second[start:stop])
        joined.join(part)
    found, expected = joined.numbers((SIZE,)), whole.numbers((SIZE,))
    assert (found["index"], found["values"], joined.same) == (expected["index"], expected["values"], whole.same)
    assert found["mean_abs"] == pytest.approx(expected["mean_abs"], rel=1e-6)
    assert found["cosine"] == pytest.approx(expected["cosine"], abs=1e-6)


def test_what_is_strange_is_joined_too() -> None:
    first, second = Measure(), Measure()
    first.add(np.zeros(3), np.zeros(3))
    second.add(np.array([1.0, np.nan]), np.array([1.0, 2.0]))
    first.join(second)
    assert (first.strange, first.strange_count, first.same) == (4, 1, False)


@pytest.mark.parametrize("kind", ["f2", "f4", "f8"])
@pytest.mark.parametrize("of_zeros", [False, True])
def test_arrays_are_written_over_only_when_they_are_spent(kind: str, of_zeros: bool) -> None:
    first, second = drawn(kind, 0), drawn(kind, 1)
    if of_zeros:
        first[100:200] = second[100:200] = 0
    kept = first.copy(), second.copy()
    expected = sums.of(first, second)
    assert expected is not None
    assert same_bits(first, kept[0])
    assert same_bits(second, kept[1])
    assert sums.of(first, second, spent=True) == expected
