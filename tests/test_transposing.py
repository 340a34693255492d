"""Parts, joins and transposed matrices on their way from file to file: bit for bit, in bounded memory."""

from __future__ import annotations

import itertools
import os
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhabridge.checkpoint import blocks, transposing
from mhabridge.checkpoint.stored import Extent, StoredFile, StoredTensor
from mhabridge.checkpoint.transposing import joined, part, rows, transposed
from mhabridge.checkpoint.writing import Outgoing, Sink, passed_through

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
@pytest.mark.parametrize("most", [4096, transposing._RESULT_BYTES])
def test_a_matrix_is_written_transposed(tmp_path, monkeypatch, dtype, shape, most):
    monkeypatch.setattr(transposing, "_RESULT_BYTES", most)
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
    count, length = data.draw(st.integers(0, 300)), data.draw(st.integers(0, 300))
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


# -- parts and joins ---------------------------------------------------------------------------------------------------


def test_rows_and_parts_lie_where_they_were(tmp_path):
    array = matrix("float32", 12, 5)
    with stored(tmp_path / "a", array, cuts=(7, 130)) as file:
        tensor = file["a"]
        key = rows(tensor, 4, 8, "k_proj.weight")
        assert (key.name, key.shape) == ("k_proj.weight", (4, 5))
        assert file.words(key).tobytes() == array[4:8].tobytes()
        assert file.words(rows(key, 1, 2)).tobytes() == array[5].tobytes()
        assert file.words(part(tensor, 7, (2, 3))).tobytes() == array.reshape(-1)[7:13].tobytes()
        assert bytes_of(transposed(file, key, "b"), tmp_path / "b") == array[4:8].T.tobytes()
        assert bytes_of(passed_through(file, key, "b"), tmp_path / "b") == array[4:8].tobytes()
        assert file.words(rows(tensor, 12, 12)).size == 0
        for wrong in ((-1, 2), (3, 13), (5, 4)):
            with pytest.raises(ValueError, match=r"rows -?\d+ to \d+ of a"):
                rows(tensor, *wrong)
        with pytest.raises(ValueError, match="elements 59 to 61"):
            part(tensor, 59, (2,))


def test_a_part_of_a_storage_with_a_checksum_is_not_compared_with_it(tmp_path):
    with stored(tmp_path / "a", matrix("int8", 4, 4), checksum=(0, 1)) as file:
        assert file.words(rows(file["a"], 1, 2)).tolist() == [[4, 5, 6, 7]]
        with pytest.raises(Exception, match="Bad CRC-32"):
            file.words(file["a"])


def test_a_view_has_no_parts(tmp_path):
    with (
        stored(tmp_path / "a", matrix("int8", 4, 4), strides=(1, 4)) as file,
        pytest.raises(ValueError, match="strides"),
    ):
        part(file["a"], 0, (2,))


def test_parts_are_joined_in_order(tmp_path):
    array = matrix("float16", 4, 6)
    with stored(tmp_path / "a", array) as file:
        pieces = [transposed(file, rows(file["a"], 2, 4), "x"), passed_through(file, rows(file["a"], 0, 2), "y")]
        one = joined(pieces, "packed", (1, 24))
        assert (one.name, one.dtype, one.shape) == ("packed", "float16", (1, 24))
        assert bytes_of(one, tmp_path / "b") == array[2:].T.tobytes() + array[:2].tobytes()
        assert one.tied is not None
        assert one.tied != joined(pieces[::-1], "packed", (1, 24)).tied
        with pytest.raises(ValueError, match="cannot be joined"):
            joined(pieces, "packed", (25,))
    with pytest.raises(ValueError, match="cannot be joined from nothing"):
        joined([], "packed", (0,))
    other = Outgoing("z", "float32", (12,), lambda sink: None)
    with pytest.raises(ValueError, match="cannot be joined from x float16"):
        joined([pieces[0], other], "packed", (24,))


def test_equal_transposes_are_tied_and_others_not(tmp_path):
    with stored(tmp_path / "a", matrix("int8", 4, 4)) as file:
        ties = [transposed(file, tensor, "x").tied for tensor in (file["a"], file["a"], rows(file["a"], 0, 2))]
        assert ties[0] == ties[1] != ties[2]
        assert passed_through(file, file["a"], "x").tied != ties[0]
