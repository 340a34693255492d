"""Trees travel unchanged: every dtype, shape and memory order, inline, through files and in chunks."""

from __future__ import annotations

import collections
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mhabridge import dtypes
from mhabridge.backends import wire
from mhabridge.errors import ArgumentTypeError, BackendError

SIZES = {"inline": 8, "file": wire.INLINE_BYTES // 8 + 2, "mapped": wire.MAPPED_BYTES // 8}


def assert_same(found: Any, expected: Any, path: str = "tree") -> None:
    """Equal in type, dtype, shape and every bit."""
    assert type(found) is type(expected), f"{path}: {type(found)} is not {type(expected)}"
    if isinstance(expected, np.ndarray):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), path
        assert found.tobytes() == expected.tobytes(), path
    elif isinstance(expected, dict):
        assert list(found) == list(expected), path
        for key in expected:
            assert_same(found[key], expected[key], f"{path}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), path
        for index, value in enumerate(expected):
            assert_same(found[index], value, f"{path}[{index}]")
    else:
        assert found == expected or (found != found and expected != expected), path


def travel(tree: Any, outbox: wire.Outbox | None = None, public: bool = False) -> Any:
    items: collections.deque[Any] = collections.deque()
    wire.send(items.append, tree, outbox)
    received = wire.receive(items.popleft, public)
    assert not items, "something was left in the channel"
    return received


@pytest.fixture
def outbox(tmp_path: Path) -> wire.Outbox:
    return wire.Outbox([str(tmp_path)])


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (np.zeros(2), np.zeros(3)),
        (np.zeros(2), np.zeros(2, "f4")),
        (np.zeros(2), np.array([0.0, -0.0])),
        ((1, 2), [1, 2]),
        (1, True),
        ({"a": 1}, {"b": 1}),
        ([1], [1, 2]),
    ],
)
def test_the_comparator_finds_differences(found: Any, expected: Any) -> None:
    with pytest.raises(AssertionError):
        assert_same(found, expected)


arrays = hnp.arrays(
    st.sampled_from(["?", "u1", "i8", "<f2", "<f4", ">f8", "c16"]),
    hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3),
)
plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
trees = st.recursive(
    plain | arrays,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(deadline=None)
@given(trees)
def test_any_tree_arrives_unchanged(tree: Any) -> None:
    assert_same(travel(tree), tree)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("local", [True, False])
def test_every_way_gives_the_same_writable_array(size: str, local: bool, outbox: wire.Outbox) -> None:
    array = np.random.default_rng(0).standard_normal(SIZES[size])
    found = travel({"a": array, "b": [array[:5]]}, outbox if local else None)
    assert_same(found, {"a": array, "b": [array[:5]]})
    assert found["a"].flags.writeable


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("change", ["transpose", "step", "reverse", "fortran", "broadcast"])
def test_memory_order_does_not_matter(size: str, change: str, outbox: wire.Outbox) -> None:
    base = np.random.default_rng(0).standard_normal((2, SIZES[size])).astype("f4").reshape(2, -1, 2)
    changes = {
        "transpose": base.transpose(1, 2, 0),
        "step": base[:, ::2],
        "reverse": base[::-1, ::-1],
        "fortran": np.asfortranarray(base),
        "broadcast": np.broadcast_to(base[:1], (3, *base.shape[1:])),
    }
    assert_same(travel(changes[change], outbox), changes[change])


@pytest.mark.parametrize("size", SIZES)
def test_bfloat16_travels_as_words(size: str, outbox: wire.Outbox) -> None:
    array = np.arange(SIZES[size]).astype(ml_dtypes.bfloat16).reshape(2, -1)
    assert travel(array, outbox).dtype == dtypes.BFLOAT16_WORDS
    assert_same(travel(array, outbox, public=True), array)


@pytest.mark.parametrize("size", SIZES)
def test_an_array_stays_valid_after_the_next_message(size: str, outbox: wire.Outbox) -> None:
    first = np.full(SIZES[size], 1.0)
    kept = travel(first, outbox)
    travel(np.full(SIZES[size], 2.0), outbox)
    kept_copy = kept.copy()
    kept[0] = 7.0
    assert_same(kept_copy, first)
    assert_same(travel(first, outbox), first)


def test_large_files_are_gone_once_received_and_the_stream_is_one_file(outbox: wire.Outbox, tmp_path: Path) -> None:
    for count in (3, 1, 2):
        travel([np.zeros(SIZES["file"])] * count + [np.zeros(SIZES["mapped"])], outbox)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_large_stream_is_not_kept(outbox: wire.Outbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "KEPT_BYTES", wire.INLINE_BYTES * 4)
    travel([np.zeros(SIZES["file"])] * 8, outbox)
    travel([np.zeros(SIZES["file"])], outbox)
    assert [path.stat().st_size for path in tmp_path.iterdir()] == [SIZES["file"] * 8]


@pytest.mark.parametrize(
    ("tree", "path"),
    [
        ({"a": [1, object()]}, "payload['a'][1]"),
        ({"a": np.float64(1)}, "payload['a']"),
        ({1: 2}, "payload"),
        ({"a": np.array([object()])}, "payload['a']"),
        ({"a": np.zeros(2, [("x", "f4")])}, "payload['a']"),
        ([np.ma.masked_array([1.0], [True])], "payload[0]"),
        ({"a": {1, 2}}, "payload['a']"),
    ],
)
def test_anything_else_is_refused_by_path_and_nothing_is_sent(tree: Any, path: str) -> None:
    sent: list[Any] = []
    with pytest.raises(ArgumentTypeError) as raised:
        wire.send(sent.append, tree)
    assert raised.value.subject == path
    assert not sent


def test_the_next_place_is_used_when_one_is_missing(tmp_path: Path) -> None:
    array = np.arange(SIZES["mapped"], dtype="f8")
    assert_same(travel(array, wire.Outbox([str(tmp_path / "missing"), str(tmp_path)])), array)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a tiny file system; /dev/full stands in for one")
def test_no_room_is_an_error_that_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(prefix: str, dir: str) -> tuple[int, str]:
        path = os.path.join(dir, prefix)
        os.symlink("/dev/full", path)
        return os.open(path, os.O_WRONLY), path

    monkeypatch.setattr("tempfile.mkstemp", full)
    sent: list[Any] = []
    with pytest.raises(BackendError, match="No space left"):
        wire.send(sent.append, [np.zeros(SIZES["mapped"])], wire.Outbox([str(tmp_path)]))
    assert not sent
    assert not list(tmp_path.iterdir())
