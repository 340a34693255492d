"""What is drawn of two tensors: which elements, which heads, which counts; and how numbers become colours."""

from __future__ import annotations

import numpy as np
import pytest

from mhabridge import dtypes
from mhabridge.diff.page import colours
from mhabridge.diff.page.tree import Branch, grown
from mhabridge.diff.pictures import CELLS, DECADES, HEADS, picture
from mhabridge.diff.report import Picture


def drawn(first: np.ndarray, second: np.ndarray, tensor: str = "attn_weights", **options: object) -> Picture:
    return picture("layer", tensor, "a", "b", first, second, **options)  # type: ignore[arg-type]


def random(shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(0).random(shape).astype(dtype)


@pytest.mark.parametrize("at", [(0, 0), (63, 64), (64, 63), (199, 130), (100, 1)])
def test_a_single_wrong_element_of_a_large_head_is_seen(at: tuple[int, int]) -> None:
    first = random((1, 2, 200, 131))
    second = first.copy()
    second[(0, 1, *at)] += 0.25
    head = drawn(first, second).maps[1]
    assert head.first.shape == (len(head.rows), len(head.columns)) == (50, 44)
    assert max(head.first.shape) <= CELLS
    cells = np.argwhere(head.first != head.second)
    assert cells.tolist() == [[at[0] // 4, at[1] // 3]]
    row, column = cells[0]
    assert head.rows[row] <= at[0] < head.rows[row] + 4
    assert head.columns[column] <= at[1] < head.columns[column] + 3
    assert head.second[row, column] - head.first[row, column] == pytest.approx(0.25, abs=1e-6)


def test_where_nothing_differs_a_block_shows_its_largest_element() -> None:
    first = np.zeros((1, 1, 128, 128), np.float32)
    first[0, 0, 5, 7] = 0.5
    head = drawn(first, first).maps[0]
    assert head.first[2, 3] == 0.5
    assert head.first.sum() == 0.5
    assert np.array_equal(head.first, head.second)


def test_the_batch_element_is_the_one_that_differs_most() -> None:
    first = random((3, 2, 4, 5))
    second = first.copy()
    second[0, 0, 0, 0] += 0.1
    second[2, 1, 3, 4] -= 0.2
    found = drawn(first, second)
    assert found.batch == 2
    assert np.array_equal(found.maps[1].first, first[2, 1])
    assert np.array_equal(found.maps[1].second, second[2, 1])


def test_nan_on_one_side_differs_more_than_any_number_and_nan_on_both_does_not() -> None:
    first, second = random((2, 1, 4, 4)), random((2, 1, 4, 4))
    first[0, 0, 0], second[0, 0, 0] = np.nan, np.nan
    second[0, 0, 2, 2] += 100
    second[1, 0, 3, 1] = np.nan
    found = drawn(first, second)
    assert found.batch == 1
    assert found.origin == (1, 0, 0, 0)
    assert np.isnan(found.near_second[3, 1])
    assert sum(found.counts) == 32 - 5


@pytest.mark.parametrize(
    ("shape", "options", "titles", "batch"),
    [
        ((2, 3, 4, 5), {}, ["head 0", "head 1", "head 2"], 0),
        ((2, 4, 5), {}, ["average of the heads"], 0),
        ((2, 4, 5), {"unbatched": True}, ["head 0", "head 1"], None),
        ((4, 5), {}, ["average of the heads"], None),
        ((5,), {}, [], None),
        ((1, 2, 3, 4, 5), {}, [], None),
    ],
)
def test_heads_of_every_form(
    shape: tuple[int, ...], options: dict[str, bool], titles: list[str], batch: int | None
) -> None:
    first = random(shape)
    found = drawn(first, first, **options)
    assert [each.title for each in found.maps] == titles
    assert found.batch == batch


@pytest.mark.parametrize("name", ["output", "grads.query", "not_attn_weights", "attn_weights.q_weight"])
def test_only_attention_weights_have_maps(name: str) -> None:
    first = random((1, 2, 3, 4))
    assert not drawn(first, first, name).maps
    assert drawn(first, first, "outputs.attn_weights").maps


def test_other_tensors_have_an_overview_of_their_last_two_axes() -> None:
    first = random((3, 100, 130))
    second = first.copy()
    second[2, 57, 99] += 1
    found = drawn(first, second, "output").overview
    assert found is not None
    assert np.argwhere(found.first != found.second).tolist() == [[57 // 2, 99 // 3]]
    assert found.first[0, 0] in first[2, :2, :3]
    assert drawn(first[0], second[0], "output").overview is not None
    assert drawn(first[0, 0], second[0, 0], "output").overview is None
    assert drawn(first, second).overview is None


def test_of_many_heads_those_that_differ_most_are_drawn_in_their_order() -> None:
    first = random((1, HEADS + 8, 4, 4))
    second = first.copy()
    for head in (39, 3, 17):
        second[0, head, 0, 0] += 0.1
    titles = [each.title for each in drawn(first, second).maps]
    assert len(titles) == HEADS
    assert {"head 3", "head 17", "head 39"} <= set(titles)
    assert titles == sorted(titles, key=lambda title: int(title.split()[1]))


def test_counts_stand_in_their_decades() -> None:
    apart = np.array([0, 0, 1e-5, 9.9e-5, 1e-4, 0.5, np.nan])
    found = drawn(np.zeros(7), apart, "output")
    assert found.edges == (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    assert found.counts == (2, 2, 1, 0, 0, 1)


def test_what_is_far_below_the_largest_difference_counts_as_equal() -> None:
    found = drawn(np.zeros(3), np.array([1e-300, 1e-20, 1.0]), "output")
    assert len(found.counts) == DECADES + 2
    assert found.counts[0] == 1
    assert found.edges[1] == pytest.approx(1e-30)
    assert sum(found.counts) == 3


@pytest.mark.parametrize(
    ("shape", "at", "origin", "size"),
    [
        ((), (), (), (1, 1)),
        ((3,), (1,), (0,), (1, 3)),
        ((20,), (19,), (13,), (1, 7)),
        ((20, 20), (0, 0), (0, 0), (5, 7)),
        ((20, 20), (10, 10), (8, 7), (5, 7)),
        ((4, 20, 20), (3, 19, 19), (3, 15, 13), (5, 7)),
        ((4, 2, 3), (3, 1, 0), (3, 0, 0), (2, 3)),
    ],
)
def test_the_neighbourhood_lies_around_the_worst_element(
    shape: tuple[int, ...], at: tuple[int, ...], origin: tuple[int, ...], size: tuple[int, int]
) -> None:
    first = random(shape, "float64")
    second = first.copy()
    second[at] += 1
    found = drawn(first, second, "output")
    assert found.origin == origin
    assert found.near_first.shape == size
    cell = tuple(np.argwhere(found.near_first != found.near_second)[0])
    inside = tuple(i - j for i, j in zip(at, origin, strict=True))[-2:]
    assert cell == (0, *inside)[-2:] if len(shape) == 1 else cell == (inside or (0, 0))


def test_the_index_of_the_comparison_can_be_asked_for() -> None:
    first = random((2, 1, 9, 9))
    second = first.copy()
    second[0, 0, 0, 0] += 1
    found = drawn(first, second, index=(1, 0, 8, 8))
    assert found.batch == 1
    assert found.origin == (1, 0, 4, 2)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64", "float16", "bfloat16"])
def test_any_dtype_is_measured_without_wrapping(dtype: str) -> None:
    numpy_dtype = dtypes.numpy_dtype("bfloat16") if dtype == "bfloat16" else np.dtype(dtype)
    first, second = np.zeros(4, numpy_dtype), np.array([0, 0, 0, 1], numpy_dtype)
    for a, b in ((first, second), (second, first), (dtypes.to_words(second), dtypes.to_words(first))):
        found = drawn(a, b, "output")
        assert found.counts == (3, 1)
        assert found.edges == (0.0, 1.0, 10.0)


def test_different_shapes_and_nothing_have_no_picture() -> None:
    for a, b in (((2, 3), (3, 2)), ((3,), ()), ((0,), (0,))):
        found = drawn(np.zeros(a), np.zeros(b), "output")
        assert not found.counts
        assert not found.near_first.size


def test_neighbouring_colours_differ_by_one_step_and_can_be_read_back() -> None:
    for palette in (colours.SEQUENTIAL, colours.DIVERGING):
        seen: dict[bytes, int] = {}
        for code, colour in enumerate(palette):
            assert code - seen.setdefault(colour.tobytes(), code) <= 1
    lightness = colours.SEQUENTIAL.astype(float) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) > -1).all()  # also without colours, larger is lighter
    middle = len(colours.DIVERGING) // 2
    lightness = colours.DIVERGING.astype(float) @ [0.2126, 0.7152, 0.0722]
    assert lightness.argmax() == middle


def test_both_ends_of_a_scale_and_what_is_no_number() -> None:
    scale = colours.difference_scale([np.array([0.5, -0.25, np.nan, np.inf])])
    codes = scale.codes(np.array([-0.5, 0.0, 0.5, np.nan, -np.inf]))
    assert codes.tolist() == [0, 127, 254, 255, 255]
    assert colours.difference_scale([np.zeros(3)]).codes(np.zeros(2)).tolist() == [127, 127]
    assert colours.attention_scale([np.array([np.nan])]).codes(np.array([np.nan, 1.0])).tolist() == [255, 254]
    assert colours.attention_scale([np.array([-1.0, 3.0])]).codes(np.array([1.0])).tolist() == [127]


def test_a_deep_or_repeated_path_makes_no_deep_tree() -> None:
    paths = ["a." * deep + "end" for deep in range(1, 400)]

    def depth(branch: Branch) -> int:
        return 1 + max((depth(each) for each in branch.members if isinstance(each, Branch)), default=0)

    tree = grown(paths)
    assert depth(tree) < 10
    assert tree.places == tuple(range(len(paths)))
    again = grown(["x.1", "x.2", "y", "x.1", "x.2"])
    assert [each.label if isinstance(each, Branch) else each for each in again.members] == ["x.", (2, "y"), "x."]
