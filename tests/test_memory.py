"""Memory that files are read into: where it lies, and whether two pieces of it are the same."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhabridge.checkpoint.reading import open_checkpoint
from mhabridge.checkpoint.storage.memory import Scratch, from_a_page_on, same
from mhabridge.checkpoint.storage.stored import Extent, StoredTensor


@given(st.binary(max_size=40), st.binary(max_size=40))
def test_same_is_what_bytes_say(first: bytes, second: bytes) -> None:
    assert same(memoryview(first), memoryview(second)) == (first == second)
    assert same(memoryview(first), memoryview(bytes(first)))


@pytest.mark.parametrize("size", [1, 4095, 1 << 20, (1 << 20) + 3])
def test_one_other_byte_anywhere_is_seen(size: int) -> None:
    one, other = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
    for place in {0, size // 2, size - 1}:
        other[place] = 1
        assert not same(one, other)
        other[place] = 0
    assert same(one, other)


def test_the_bits_count_not_the_numbers() -> None:
    assert not same(np.float32([0.0]), np.float32([-0.0]))
    assert same(np.float32([np.nan]), np.float32([np.nan]))
    assert not same(np.zeros(2, np.float32), np.zeros(1, np.float32))


def place_in_page(array: np.ndarray | memoryview) -> int:
    return int(np.asarray(array).__array_interface__["data"][0]) % 4096


def test_what_is_read_starts_with_a_page(tmp_path) -> None:
    np.savez(tmp_path / "a.npz", w=np.arange(1 << 18, dtype=np.float32), small=np.arange(3))
    with open_checkpoint(tmp_path / "a.npz") as file:
        assert place_in_page(file.read("w")) == 0
        assert all(place_in_page(piece) == 0 for piece in file.chunks(file["w"]))
        assert file.read("small").tolist() == [0, 1, 2]
    scratch = Scratch()
    assert [place_in_page(scratch.take(size)) for size in (1 << 16, 1 << 20, 1 << 17)] == [0, 0, 0]
    assert from_a_page_on(1 << 20).flags.writeable


def test_a_part_is_the_same_tensor_but_for_its_view() -> None:
    kept = {"big_endian": True, "checksum": (1, 2), "unreadable": ("given", "advice")}
    whole = StoredTensor("a", "float32", (4, 4), (Extent(0, 64, 64),), "s", 3, (1, 4), **kept)
    assert whole.part((2,), 5, None) == dataclasses.replace(whole, shape=(2,), start=5, strides=None)
