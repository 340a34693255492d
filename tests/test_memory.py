"""Memory that files are read into: where it lies, and whether two pieces of it are the same."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhabridge.checkpoint.reading import open_checkpoint
from mhabridge.checkpoint.storage import comparing
from mhabridge.checkpoint.storage.memory import Scratch, from_a_page_on, same, start_between
from mhabridge.checkpoint.storage.stored import Extent, StoredFile, StoredTensor
from mhabridge.checkpoint.storage.writing import Sink
from mhabridge.diff.checkpoints.streaming import Side


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
    assert [place_in_page(scratch.take(1 << 20, start)) for start in (64, 128, 0)] == [64, 128, 0]
    assert from_a_page_on(1 << 20).flags.writeable


def is_slow(source: int, target: int) -> bool:
    """Whether a copy goes to a place that is 1 to 31 bytes further into a page than where it comes from."""
    return (target - source) % 4096 in range(1, 32)


@given(st.integers(0, 1 << 40), st.none() | st.integers(0, 1 << 40))
def test_no_copy_through_memory_is_a_slow_one(source: int, target: int | None) -> None:
    start = start_between(source, target)
    assert not is_slow(source, start)
    assert target is None or not is_slow(start, target)


@pytest.mark.parametrize("offset", [0, 8, 4064, 4072, 4088, 4095, 3 * 4096 + 4090])
@pytest.mark.parametrize("position", [0, 8, 64, 72, 4088])
def test_files_are_copied_compared_and_measured_through_such_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offset: int, position: int
) -> None:
    size, places = 3 << 20, []
    content = bytes(offset) + np.arange(size // 4, dtype="<u4").tobytes()
    (tmp_path / "source").write_bytes(content)
    (tmp_path / "target").write_bytes(bytes(position))
    read = os.preadv

    def preadv(descriptor: int, buffers: Sequence[memoryview], at: int) -> int:
        places.append((at, place_in_page(buffers[0])))
        return read(descriptor, buffers, at)

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(Sink, "_copy_in_kernel", lambda *_: 0)
    with (tmp_path / "source").open("rb") as source, (tmp_path / "target").open("r+b") as target:
        sink = Sink(target.fileno())
        sink.position = position
        sink.copy(source.fileno(), offset, size)
        assert sink.position == position + size
    assert (tmp_path / "target").read_bytes() == bytes(position) + content[offset:]
    assert len(places) > 1
    assert not any(is_slow(*one) for one in places)
    assert not any(is_slow(place, position + at - offset) for at, place in places)
    places.clear()
    tensors = [
        StoredTensor("w", "uint8", (size,), (Extent(0, start, size),), name)
        for name, start in (("source", offset), ("target", position))
    ]
    with (
        StoredFile(tmp_path / "source", "", tensors[:1]) as mine,
        StoredFile(tmp_path / "target", "", tensors[1:]) as theirs,
    ):
        assert comparing.same_bits(mine, mine["w"], theirs, theirs["w"])
        compared = len(places)
        assert sum(piece.size for piece in Side(mine, mine["w"]).pieces()) == size
    assert 1 < compared < len(places)
    assert not any(is_slow(*one) for one in places)


def test_a_part_is_the_same_tensor_but_for_its_view() -> None:
    kept = {"big_endian": True, "checksum": (1, 2), "unreadable": ("given", "advice")}
    whole = StoredTensor("a", "float32", (4, 4), (Extent(0, 64, 64),), "s", 3, (1, 4), **kept)
    assert whole.part((2,), 5, None) == dataclasses.replace(whole, shape=(2,), start=5, strides=None)
