from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mhabridge import ArgumentError, ArgumentTypeError, UnsupportedError, dtypes, masks
from mhabridge.masks import Sizes, canonical

SIZES = Sizes(batch=2, heads=3, target=4, source=5)
INF = np.inf


def meaning(found: masks.Masks, sizes: Sizes = SIZES) -> np.ndarray:
    """What the canonical form says, as one additive array (N, H, L, S)."""
    total = np.zeros((sizes.batch, sizes.heads, sizes.target, sizes.source))
    if found.added is not None:
        total = total + found.added
    if found.blocked is not None:
        total = np.where(found.blocked, -INF, total)
    return total


def one_by_one(kpm: Any, attn: Any, causal: bool, sizes: Sizes = SIZES) -> np.ndarray:
    """The definition, element by element and without any broadcasting."""
    total = np.zeros((sizes.batch, sizes.heads, sizes.target, sizes.source))
    for n, h, i, j in np.ndindex(total.shape):
        cells = []
        if kpm is not None:
            cells.append(kpm[n, j] if sizes.batched else kpm[j])
        if attn is not None:
            cells.append(attn[i, j] if attn.ndim == 2 else attn[n * sizes.heads + h, i, j])
        for cell in cells:
            kind = np.asarray(cell).dtype.kind
            if kind in "biu":
                total[n, h, i, j] += -INF if cell != 0 else 0.0
            else:
                total[n, h, i, j] += float(cell)
        if causal and j > i:
            total[n, h, i, j] = -INF
    return total


def cells(dtype: str) -> st.SearchStrategy[Any]:
    if dtype == "bool":
        return st.booleans()
    if dtype == "uint8":
        return st.integers(0, 255)
    if dtype in ("int32", "int64", "int8", "uint16"):
        return st.integers(0, 1)
    return st.sampled_from([0.0, -1.5, 2.25, -INF, 0.5, -300.0])


@st.composite
def mask_arrays(draw: st.DrawFn, shapes: list[tuple[int, ...]]) -> np.ndarray | None:
    if draw(st.booleans()):
        return None
    names = ["bool", "uint8", "int32", "int64", "int8", "uint16", "float16", "float32", "float64", "bfloat16"]
    dtype = draw(st.sampled_from(names))
    shape = draw(st.sampled_from(shapes))
    wide = draw(hnp.arrays(object, shape, elements=cells(dtype)))
    return wide.astype("float64").astype(ml_dtypes.bfloat16) if dtype == "bfloat16" else wide.astype(dtype)


@given(mask_arrays([(2, 5)]), mask_arrays([(4, 5), (6, 4, 5)]), st.booleans())
def test_any_mixture_means_what_the_definition_says(kpm: Any, attn: Any, causal: bool) -> None:
    found = canonical(kpm, attn, causal, sizes=SIZES)
    np.testing.assert_array_equal(meaning(found), one_by_one(kpm, attn, causal))


@given(mask_arrays([(5,)]), mask_arrays([(4, 5), (3, 4, 5)]), st.booleans())
def test_unbatched_masks_too(kpm: Any, attn: Any, causal: bool) -> None:
    sizes = Sizes(1, 3, 4, 5, batched=False)
    found = canonical(kpm, attn, causal, sizes=sizes)
    np.testing.assert_array_equal(meaning(found, sizes), one_by_one(kpm, attn, causal, sizes))


@given(mask_arrays([(2, 5)]), mask_arrays([(4, 5), (6, 4, 5)]), st.booleans(), st.integers(0, 2))
def test_fully_masked_rows_are_those_with_every_position_blocked(kpm: Any, attn: Any, causal: bool, extra: int) -> None:
    dead = canonical(kpm, attn, causal, sizes=SIZES).fully_masked(extra)
    expected = np.isneginf(one_by_one(kpm, attn, causal)).all(axis=-1) & (extra == 0)
    np.testing.assert_array_equal(dead, expected)


def test_causal_is_aligned_top_left_whatever_the_lengths() -> None:
    wide = canonical(is_causal=True, sizes=Sizes(1, 1, 2, 4)).blocked
    tall = canonical(is_causal=True, sizes=Sizes(1, 1, 4, 2)).blocked
    assert wide is not None
    assert tall is not None
    assert wide[0, 0].tolist() == [[False, True, True, True], [False, False, True, True]]
    assert tall[0, 0].tolist() == [[False, True], [False, False], [False, False], [False, False]]


def test_a_two_dimensional_mask_is_not_blown_up() -> None:
    found = canonical(None, np.zeros((4, 5), bool), sizes=SIZES)
    assert found.blocked is not None
    assert found.blocked.shape == (1, 1, 4, 5)


@pytest.mark.parametrize(
    ("name", "mask", "words"),
    [
        ("attn_mask", np.zeros((1, 5), bool), r"\(L, S\) = \(4, 5\) or \(N \* H, L, S\) = \(6, 4, 5\)"),
        ("attn_mask", np.zeros((5, 4), bool), r"\(4, 5\)"),
        ("attn_mask", np.zeros((2, 4, 5), bool), r"\(6, 4, 5\)"),
        ("attn_mask", np.zeros((2, 3, 4, 5), bool), r"\(6, 4, 5\)"),
        ("key_padding_mask", np.zeros((1, 5), bool), r"\(N, S\) = \(2, 5\)"),
        ("key_padding_mask", np.zeros((5, 2), bool), r"\(2, 5\)"),
        ("key_padding_mask", np.zeros(5, bool), r"\(2, 5\)"),
        ("attn_mask", np.full((4, 5), np.nan), "NaN"),
        ("attn_mask", np.full((4, 5), INF), r"\+inf"),
        ("key_padding_mask", np.full((2, 5), np.nan, "float16"), "NaN"),
        ("attn_mask", np.full((4, 5), 2), "2 in a mask of int64"),
        ("attn_mask", np.full((4, 5), -1, "int8"), "-1 in a mask of int8"),
        ("key_padding_mask", np.full((2, 5), 255, "uint16"), "255"),
        ("attn_mask", np.zeros((4, 5), complex), "complex128"),
        ("attn_mask", np.full((4, 5), "x"), "<U1"),
        ("attn_mask", [[None] * 5] * 4, "object"),
        ("attn_mask", np.zeros((4, 5), np.longdouble), "float128"),
        ("attn_mask", [[True], [True, False]], "no array"),
    ],
)
def test_a_wrong_mask_is_refused_by_name(name: str, mask: Any, words: str) -> None:
    with pytest.raises((ArgumentError, ArgumentTypeError), match=words) as error:
        canonical(**{name: mask}, sizes=SIZES)
    assert error.value.subject == name


def test_two_huge_masks_do_not_add_up_to_blocked() -> None:
    low = np.finfo(np.float64).min
    found = canonical(np.full((2, 5), low), np.full((4, 5), low), sizes=SIZES)
    assert found.added is not None
    assert np.isfinite(found.added).all()
    assert not found.fully_masked().any()


def test_is_causal_is_a_flag() -> None:
    with pytest.raises(ArgumentTypeError, match="is_causal"):
        canonical(is_causal=1, sizes=SIZES)  # type: ignore[arg-type]


def test_the_error_policy_names_batch_head_and_row() -> None:
    mask = np.zeros((6, 4, 5), bool)
    mask[4, 2] = True  # batch 1, head 1
    with pytest.raises(ArgumentError, match="batch 1, head 1, row 2"):
        masks.refuse_fully_masked(canonical(None, mask, sizes=SIZES).fully_masked())
    masks.refuse_fully_masked(np.zeros((2, 3, 4), bool))
    with pytest.raises(ArgumentError, match="nan, zero, error"):
        masks.check_policy("none")


@pytest.mark.parametrize("dtype", dtypes.FLOATS)
def test_merge_keeps_finite_values_finite(dtype: str) -> None:
    added = np.array([[[[-1e300, 1e300, 1.0]]]])
    merged = masks.merge(np.array([[[[False, False, True]]]]), added, dtype)
    assert merged is not None
    values = dtypes.to_float64(merged)[0, 0, 0]
    if dtype != "float64":
        assert values[0] == -dtypes.LARGEST[dtype]
        assert values[1] == dtypes.LARGEST[dtype]
    assert np.isfinite(values[:2]).all()
    assert values[2] == -INF
    assert masks.merge(None, None, dtype) is None


def test_gradients_of_masks_have_the_masks_shapes() -> None:
    found = canonical(np.zeros((2, 5)), np.zeros((4, 5)), sizes=SIZES)
    grad = np.arange(2 * 3 * 4 * 5, dtype=float).reshape(2, 3, 4, 5)
    grads = found.gradients(grad)
    np.testing.assert_array_equal(grads["key_padding_mask"], grad.sum((1, 2)))
    np.testing.assert_array_equal(grads["attn_mask"], grad.sum((0, 1)))
    full = canonical(None, np.zeros((6, 4, 5)), sizes=SIZES).gradients(grad)
    np.testing.assert_array_equal(full["attn_mask"], grad.reshape(6, 4, 5))


# -- cuDNN-style pairs ---------------------------------------------------------------------------------------------


@given(st.data())
def test_cudnn_pairs_both_ways(data: st.DataObject) -> None:
    ends = [data.draw(st.tuples(st.integers(0, 5), st.integers(0, 5)).map(sorted)) for _ in range(4)]
    pairs = np.array([pair if pair[0] < pair[1] else [0, 0] for pair in ends], np.int32).T
    lengths = np.array([[4, 4], data.draw(st.lists(st.integers(0, 5), min_size=2, max_size=2))], np.int32)
    attn, padding = masks.decode_cudnn(pairs, lengths, 5)
    for i, (start, end) in enumerate(pairs.T):
        assert attn[i].tolist() == [not start <= j < end for j in range(5)]
    for n, length in enumerate(lengths[1]):
        assert padding[n].tolist() == [j >= length for j in range(5)]
    encoded = masks.encode_cudnn(attn, padding, sizes=SIZES)
    np.testing.assert_array_equal(encoded[0], pairs)
    np.testing.assert_array_equal(encoded[1], lengths)


def test_cudnn_causal_is_megengines_own() -> None:
    causal = np.triu(np.ones((4, 5), bool), 1)
    windows, lengths = masks.encode_cudnn(causal, None, sizes=SIZES)
    assert windows.tolist() == [[0, 0, 0, 0], [1, 2, 3, 4]]
    assert lengths.tolist() == [[4, 4], [5, 5]]


@pytest.mark.parametrize(
    ("attn", "padding", "words"),
    [
        (np.array([[False, True, False, False, False]] * 4), None, "several runs"),
        (np.full((4, 5), -1.0), None, "adds numbers"),
        (np.zeros((6, 4, 5), bool), None, "for each head"),
        (None, np.array([[True, False, False, False, False]] * 2), "at the end"),
    ],
)
def test_what_cudnn_cannot_say_is_refused(attn: Any, padding: Any, words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        masks.encode_cudnn(attn, padding, sizes=SIZES)


@pytest.mark.parametrize(
    ("pair", "lengths", "error", "words"),
    [
        ([[0, 0], [1, 6]], [[2], [5]], ArgumentError, "not inside the source"),
        ([[3, 0], [1, 2]], [[2], [5]], ArgumentError, "not inside the source"),
        ([[0, 0], [1, 2]], [[2], [6]], ArgumentError, "key lengths"),
        ([[0, 0], [1, 2]], [[1], [5]], UnsupportedError, "query lengths"),
        ([[0, 0, 0]], [[2], [5]], ArgumentError, r"\(2, L\)"),
        ([[0.5, 0], [1, 2]], [[2], [5]], ArgumentError, "integers"),
    ],
)
def test_bad_cudnn_pairs_are_refused(pair: Any, lengths: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        masks.decode_cudnn(np.array(pair), np.array(lengths), 5)
