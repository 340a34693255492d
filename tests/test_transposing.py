"""Parts, joins and transposed matrices on their way from file to file: bit for bit, in bounded memory."""

from __future__ import annotations

import dataclasses
import itertools
import os
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhabridge.checkpoint.storage import blocks, memory, transposing
from mhabridge.checkpoint.storage.stored import Extent, StoredFile, StoredTensor
from mhabridge.checkpoint.storage.transposing import transposed
from mhabridge.checkpoint.storage.writing import Outgoing, Sink, passed_through

DTYPES = ["uint8", "float16", "float32", "float64", "complex128"]
SHAPES = [(1, 1), (3, 5), (0, 4), (4, 0), (1, 300), (300, 1), (127, 129), (128, 128), (129, 257), (5, 5000)]


def matrix(dtype: str, count: int, length: int) -> np.ndarray:
    return (np.arange(count * length).reshape(count, length) % 251).astype(dtype)


def stored(path: pathlib.Path, array: np.ndarray, cuts=(), **fields) -> StoredFile:
    """A file with one tensor "a", whose bytes lie in several places, the first of them not aligned."""
    data, bounds = np.ascontiguousarray(array).tobytes(), [0, *cuts, array.nbytes]
    content, extents = b"???", []
    for start, stop in itertools.pairwise(bounds):
        extents.append(Extent(0, len(content), stop - start))
        content += data[start:stop] + b"?"
    path.write_bytes(content)
    fields = {"shape": array.shape, **fields}
    return StoredFile(
        path, "test", [StoredTensor("a", array.dtype.name, extents=tuple(extents), storage="s", **fields)]
    )


def bytes_of(outgoing: Outgoing, path: pathlib.Path) -> bytes:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        outgoing.write_to(Sink(descriptor))
        return os.pread(descriptor, 1 << 30, 0)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("most", [4096, transposing._SHEET_BYTES])
def test_a_matrix_is_written_transposed(tmp_path, monkeypatch, dtype, shape, most):
    monkeypatch.setattr(transposing, "_SHEET_BYTES", most)
    array = matrix(dtype, *shape)
    with stored(tmp_path / "a", array) as file:
        outgoing = transposed(file, file["a"], "b")
        assert (outgoing.name, outgoing.dtype, outgoing.shape) == ("b", dtype, shape[::-1])
        assert bytes_of(outgoing, tmp_path / "b") == array.T.tobytes()


@pytest.mark.parametrize("cuts", [(1,), (100, 100, 3000), (4096, 8192)])
def test_a_matrix_in_several_pieces(tmp_path, cuts):
    array = matrix("float32", 60, 50)
    with stored(tmp_path / "a", array, cuts) as file:
        assert bytes_of(transposed(file, file["a"], "b"), tmp_path / "b") == array.T.tobytes()


def test_views_and_other_orders_of_bytes(tmp_path):
    array = matrix("float32", 6, 8)
    with stored(tmp_path / "a", array, shape=(8, 6), strides=(1, 8)) as file:  # saved as array.T
        outgoing = transposed(file, file["a"], "b")
        assert bytes_of(outgoing, tmp_path / "b") == array.tobytes()
    with stored(tmp_path / "a", array, shape=(3, 4), strides=(16, 2), start=1) as file:
        assert bytes_of(transposed(file, file["a"], "b"), tmp_path / "b") == array[::2, 1::2].T.tobytes()
    with stored(tmp_path / "a", array.byteswap(), big_endian=True) as file:
        assert bytes_of(transposed(file, file["a"], "b"), tmp_path / "b") == array.T.tobytes()


def test_columns_of_a_larger_matrix(tmp_path):
    array = matrix("float32", 130, 40)
    with stored(tmp_path / "a", array, cuts=(7, 5000), shape=(130, 20), strides=(40, 1), start=10) as file:
        assert bytes_of(transposed(file, file["a"], "b"), tmp_path / "b") == array[:, 10:30].T.tobytes()
        turned = dataclasses.replace(file["a"], shape=(20, 130), strides=(1, 40))
        assert transposing.source_of(turned) == file["a"]
        assert transposing.source_of(file["a"]) is None


def test_a_transposed_view_is_copied_without_being_turned(tmp_path):
    with stored(tmp_path / "a", matrix("int8", 6, 8), shape=(8, 6), strides=(1, 8)) as file:
        assert transposing._turned(file["a"]).plain


def test_only_matrices_are_transposed(tmp_path):
    with stored(tmp_path / "a", np.zeros((2, 3, 4), "int8")) as file, pytest.raises(ValueError, match="is no matrix"):
        transposed(file, file["a"], "b")


def test_a_missing_transpose_would_be_seen(tmp_path):
    array = matrix("float32", 16, 16)
    with stored(tmp_path / "a", array) as file:
        assert bytes_of(passed_through(file, file["a"], "b"), tmp_path / "b") != array.T.tobytes()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_blocks_of_any_size(data):
    count, length = data.draw(st.integers(0, 1100)), data.draw(st.integers(0, 300))
    array = matrix(data.draw(st.sampled_from(DTYPES)), count, length)
    out = np.empty((length, count), array.dtype)
    blocks.transpose_into(array, out)
    assert out.tobytes() == array.T.tobytes()
    assert blocks.contiguous(array.T).tobytes() == array.T.tobytes()


@pytest.mark.parametrize("length", [4095, 4097, 9000])
def test_rows_longer_than_a_block(length):
    for dtype in ("uint8", "complex128"):
        array = matrix(dtype, 130, length)
        out = np.empty((length, 130), dtype)
        blocks.transpose_into(array, out)
        assert out.tobytes() == array.T.tobytes()


@pytest.mark.parametrize(
    "array", [np.arange(6).reshape(2, 3), np.arange(24).reshape(2, 3, 4).T, np.array(3), np.ones(4)[::2]]
)
def test_contiguous_is_numpys(array):
    found = blocks.contiguous(array)
    assert found.flags.c_contiguous
    assert found.shape == array.shape
    assert found.tolist() == array.tolist()


def test_equal_transposes_are_tied_and_others_not(tmp_path):
    with stored(tmp_path / "a", matrix("int8", 4, 4)) as file:
        half = dataclasses.replace(file["a"], shape=(2, 4))
        ties = [transposed(file, tensor, "x").tied for tensor in (file["a"], file["a"], half)]
        assert ties[0] == ties[1] != ties[2]
        assert passed_through(file, file["a"], "x").tied != ties[0]


@pytest.mark.parametrize("most_lines", [16, 1 << 14])
def test_one_scratch_serves_matrices_of_any_shape(tmp_path, monkeypatch, most_lines):
    """Rows are kept from one matrix to the next, but only when they lie in the same places."""
    monkeypatch.setattr(memory, "_MOST_LINES", most_lines)
    monkeypatch.setattr(transposing, "_SHORT_ROW", 16)
    scratch = memory.Scratch()
    shapes = [("float32", 30, 40), ("float32", 30, 40), ("float32", 40, 30), ("float64", 30, 20), ("uint8", 300, 41)]
    for number, (dtype, count, length) in enumerate([*shapes, *reversed(shapes)]):
        array = matrix(dtype, count, length) + np.array(number, dtype)
        with stored(tmp_path / "a", array) as file:
            pieces = b"".join(bytes(piece) for piece in transposing.panels(file, file["a"], scratch))
        assert pieces == array.T.tobytes()


@pytest.mark.parametrize("further", range(-40, 40))
def test_panels_lie_where_writing_them_is_not_slow(tmp_path, further):
    """A copy is, to a place 1 to 31 bytes further into a page than where it comes from."""
    array, scratch = matrix("float32", 256, 512), memory.Scratch()
    with stored(tmp_path / "a", array) as file:
        place = address(next(transposing.panels(file, file["a"], scratch)))
        panels = transposing.panels(file, file["a"], scratch, place + further)
        first = next(panels)
        assert (place + further - address(first)) % 4096 not in range(1, 32)
        assert b"".join([bytes(first), *map(bytes, panels)]) == array.T.tobytes()


def address(piece: memoryview) -> int:
    return int(np.asarray(piece).__array_interface__["data"][0])
