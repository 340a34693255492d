"""NumPy's .npz without NumPy's reader: numbers in place, what NumPy writes and reads, and damaged archives."""

from __future__ import annotations

import io
import re
import struct
import zipfile
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mhabridge import dtypes
from mhabridge.checkpoint.formats import npz, npz_writing
from mhabridge.checkpoint.formats.known import open_checkpoint
from mhabridge.checkpoint.formats.npy_header import parse
from mhabridge.checkpoint.storage.packed import Deflated
from mhabridge.checkpoint.storage.stored import ITEM_SIZES, NOT_IN_NUMPY, StoredObject
from mhabridge.checkpoint.storage.writing import Outgoing, passed_through
from mhabridge.errors import CheckpointError
from tests.checkpoint_files import array_of, assert_holds, outgoing, written

DTYPES = [name for name in ITEM_SIZES if name not in NOT_IN_NUMPY]
CONTENT = {
    **{f"of/{dtype}": (dtype, np.arange(15).reshape(3, 5) % 2) for dtype in DTYPES},
    "scalar": ("float32", np.array(2.5)),
    "empty": ("int64", np.zeros((0, 3))),
    "one": ("bool", np.array([1])),
    "naïve 模型": ("float16", np.arange(3)),
}
ARRAYS = {name: dtypes.to_words(array_of(*pair)) for name, pair in CONTENT.items()}
TENSORS = [outgoing(name, dtype, values) for name, (dtype, values) in CONTENT.items()]
SAVES = [np.savez, np.savez_compressed]


def archive_of(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def member_of(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version)
    return stream.getvalue()


def with_header(text: str, data: bytes = b"", version: int = 1) -> bytes:
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text.encode("utf-8") + data


# -- whole files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", SAVES)
def test_what_numpy_writes_is_read(tmp_path, save):
    save(tmp_path / "a.npz", **ARRAYS)
    with npz.read(tmp_path / "a.npz", verify=True) as file:
        assert_holds(file, CONTENT)
        assert file.objects == file.notes == ()


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("dtype", [">i2", ">u8", ">f4", ">f8", ">c8", ">c16", "<c8"])
def test_other_orders_of_bytes_and_axes_are_read(tmp_path, save, dtype):
    values = (np.arange(24).reshape(2, 3, 4) - 5) * (1 + 2j if "c" in dtype else 1)
    arrays = {"c": values.astype(dtype), "f": np.asfortranarray(values.astype(dtype)), "t": values[0].astype(dtype).T}
    save(tmp_path / "a.npz", **arrays)
    name = np.dtype(dtype).name
    with npz.read(tmp_path / "a.npz") as file:
        assert_holds(file, {"c": (name, values), "f": (name, values), "t": (name, values[0].T)})


def test_numbers_that_are_not_compressed_are_read_in_place(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.arange(5.0))
    with npz.read(tmp_path / "a.npz") as file:
        (extent,) = file["a"].extents
        content = (tmp_path / "a.npz").read_bytes()
        assert content[extent.offset : extent.offset + extent.length] == np.arange(5.0).tobytes()


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_all_versions_of_npy_are_read(tmp_path, version):
    (tmp_path / "a").write_bytes(archive_of({"a.npy": member_of(np.arange(3.0), version)}))
    with npz.read(tmp_path / "a") as file:
        assert_holds(file, {"a": ("float64", np.arange(3))})


def test_other_ways_to_write_a_header_are_read():
    head = with_header("{ 'descr' :'<f4','fortran_order':True, 'shape' : ( 3 ,2, ) }\n")
    header = parse(lambda count: head[:count])
    assert (header.dtype, header.shape, header.fortran_order, header.length) == ("float32", (3, 2), True, len(head))


def test_numpy_reads_what_we_write(tmp_path):
    objects = [StoredObject("epoch", "3", 3), StoredObject("name", "naïve", "naïve"), StoredObject("note", "", "")]
    file = written(tmp_path / "a.npz", npz_writing, TENSORS, objects)
    with np.load(file) as found:
        assert set(found) == {*ARRAYS, "epoch", "name", "note"}
        for name, array in ARRAYS.items():
            assert found[name].dtype == array.dtype
            assert found[name].shape == array.shape
            assert found[name].tobytes() == array.tobytes()
        assert (int(found["epoch"]), str(found["name"]), str(found["note"])) == (3, "naïve", "")
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
    with npz.read(file, verify=True) as opened:
        assert_holds(opened, {**CONTENT, "epoch": ("int64", np.array(3))})
        assert list(opened.objects) == objects[1:]


def test_a_member_is_what_numpy_writes(tmp_path):
    file = written(tmp_path / "a.npz", npz_writing, TENSORS)
    with zipfile.ZipFile(file) as archive:
        for name, array in ARRAYS.items():
            assert archive.read(f"{name}.npy") == member_of(array)


def test_an_empty_archive_is_written_and_read(tmp_path):
    with npz.read(written(tmp_path / "a", npz_writing, [])) as file:
        assert len(file) == 0


def test_what_is_no_number_is_listed(tmp_path):
    arrays = {"texts": np.array(["a", "bc"]), "day": np.array(["2020-01-01"], "M8[D]"), "bytes": np.array(b"abc")}
    np.savez(tmp_path / "a.npz", text=np.array("naïve"), **arrays)
    with npz.read(tmp_path / "a.npz") as file:
        assert len(file) == 0
        found = {entry.name: (entry.text, entry.value) for entry in file.objects}
    assert found["text"] == ("naïve", "naïve")
    assert found["texts"] == ("an array of dtype text and shape (2,)", None)
    assert found["day"][0] == "an array of dtype datetime64[D] and shape (1,)"
    assert found["bytes"][1] is None


@pytest.mark.parametrize(
    ("tensors", "objects", "message"),
    [
        (
            [Outgoing("a", "float8_e5m2", (1,), lambda sink: sink.write(b"1"))],
            [],
            "a: given dtype float8_e5m2.*safetensors",
        ),
        ([outgoing("a", "int8", np.zeros(2))] * 2, [], "a: given two entries"),
        ([outgoing("a\0b", "int8", np.zeros(2))], [], "no name for a member"),
        ([outgoing("a" * 70_000, "int8", np.zeros(2))], [], r"aaa\.\.\.: given a name of 70000 bytes"),
        ([], [StoredObject("betas", "a list", [1, 2])], r"betas: .*--drop"),
    ],
)
def test_what_has_no_place_is_refused_before_anything_is_written(tmp_path, tensors, objects, message):
    with pytest.raises(CheckpointError, match=message):
        written(tmp_path / "a", npz_writing, tensors, objects)
    assert (tmp_path / "a").read_bytes() == b""


# -- files that are not right ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", SAVES)
def test_a_wrong_number_is_seen_by_all_that_read_it(tmp_path, save):
    save(tmp_path / "a.npz", a=np.arange(600.0))
    content = (tmp_path / "a.npz").read_bytes()
    checksum = struct.pack("<I", zlib.crc32(member_of(np.arange(600.0))))
    assert checksum in content
    (tmp_path / "a.npz").write_bytes(content.replace(checksum, b"\1\2\3\4"))
    with npz.read(tmp_path / "a.npz") as file:
        with pytest.raises(CheckpointError, match="Bad CRC-32"):
            file.read("a")
        with pytest.raises(CheckpointError, match="Bad CRC-32"):
            list(file.chunks(file["a"]))
    with pytest.raises(CheckpointError, match="Bad CRC-32"):
        npz.read(tmp_path / "a.npz", verify=True)


def test_a_wrong_character_of_a_text_is_seen(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.array("text"))
    content = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(content.replace("text".encode("utf-32-le"), "best".encode("utf-32-le")))
    with pytest.raises(CheckpointError, match="Bad CRC-32"):
        npz.read(tmp_path / "a.npz")


HEADERS = {
    "no end": ("{'descr': '<f4', 'fortran_order': False, 'shape': (1,)", "the .npy header"),
    "a call": ("{'descr': exit(), 'fortran_order': False, 'shape': (1,)}", "the .npy header"),
    "a key too many": ("{'descr': '<f4', 'fortran_order': False, 'shape': (1,), 'x': 1}", "the .npy header"),
    "a key too few": ("{'descr': '<f4', 'shape': (1,)}", "the .npy header"),
    "an unknown dtype": ("{'descr': '<f7', 'fortran_order': False, 'shape': (1,)}", "dtype <f7"),
    "no dtype": ("{'descr': 'float', 'fortran_order': False, 'shape': (1,)}", "dtype float"),
    "objects": ("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", "Python objects"),
    "objects in records": ("{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (1,)}", "Python objects"),
    "records": ("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,)}", "does not keep bfloat16"),
    "nameless bytes": ("{'descr': '|V2', 'fortran_order': False, 'shape': (1,)}", "does not keep bfloat16"),
    "too many bytes": ("{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}", "4 bytes of numbers"),
    "a negative length": ("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}", re.escape("the shape (-1,)")),
    "a sum": ("{'descr': '<f4', 'fortran_order': False, 'shape': (1+0,)}", "the shape"),
    "no tuple": ("{'descr': '<f4', 'fortran_order': False, 'shape': (1)}", "the shape"),
    "a length beyond any file": (
        "{'descr': '<f4', 'fortran_order': False, 'shape': (9223372036854775807, 0)}",
        "the shape",
    ),
    "nothing": ("", "a .npy header of 0 bytes"),
    "too long": (" " * 10_001, "a .npy header of 10001 bytes"),
}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("what", HEADERS)
def test_wrong_headers_are_refused_with_the_reason(tmp_path, what, method):
    text, message = HEADERS[what]
    (tmp_path / "a").write_bytes(archive_of({"a.npy": with_header(text, b"1234")}, method))
    with pytest.raises(CheckpointError, match=rf"a\.npy has .*{message}"):
        npz.read(tmp_path / "a")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (archive_of({"a.npy": b"\x93NUMPY\x04\x00" + bytes(20)}), "no .npy of version 1 to 3"),
        (archive_of({"a.npy": b"short"}), "no .npy of version 1 to 3"),
        (archive_of({"a.npy": with_header("x" * 50)[:20]}), "a .npy header of 50 bytes"),
        (archive_of({"a.npy": member_of(np.zeros(2))}, zipfile.ZIP_BZIP2), "packed by method 12"),
        (archive_of({"a.txt": b""}), r"'a\.txt' in the archive, which is no \.npy"),
        (b"PK\x05\x06" + bytes(17), "no end of a zip archive's index"),
        (b"", "zip archive"),
    ],
)
def test_wrong_archives_are_refused_with_the_reason(tmp_path, content, message):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        npz.read(tmp_path / "a")


def test_members_that_overlap_are_refused(tmp_path):
    content = bytearray(archive_of({"a.npy": member_of(np.zeros(8)), "b.npy": member_of(np.zeros(8))}))
    second = content.rindex(b"PK\x01\x02")
    content[second + 42 : second + 46] = struct.pack("<I", 0)  # where the first one lies
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(CheckpointError, match="running into what follows it"):
        npz.read(tmp_path / "a")


def test_an_encrypted_member_is_refused(tmp_path):
    content = bytearray(archive_of({"a.npy": member_of(np.zeros(8))}))
    content[content.rindex(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(CheckpointError, match="is encrypted"):
        npz.read(tmp_path / "a")


def test_bombs_are_refused_before_they_are_unpacked(tmp_path):
    content = bytearray(archive_of({"a.npy": member_of(np.zeros(1000))}, zipfile.ZIP_DEFLATED))
    entry = content.rindex(b"PK\x01\x02")
    content[entry + 24 : entry + 28] = struct.pack("<I", 2**31)
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(CheckpointError, match="claims 2147483648 bytes, more than can be in the archive"):
        npz.read(tmp_path / "a")


@pytest.mark.parametrize("size", [7999, 8001, 0])
def test_a_deflated_member_of_another_size_is_refused(tmp_path, size):
    squeeze = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    data = bytes(8000)
    stream = squeeze.compress(data) + squeeze.flush()
    (tmp_path / "a").write_bytes(stream)
    Deflated(tmp_path / "a", "a", 0, len(stream), 8000, zlib.crc32(data)).unpack()
    with pytest.raises(CheckpointError, match=r"a: given content that cannot be read \((it ends after|Bad CRC-32)"):
        Deflated(tmp_path / "a", "a", 0, len(stream), size, zlib.crc32(data)).unpack()


@pytest.mark.parametrize("save", SAVES)
def test_a_file_that_ends_early_is_refused_wherever_it_ends(tmp_path, save):
    save(tmp_path / "a.npz", a=np.arange(12.0), b=np.ones(3, "int8"))
    content = (tmp_path / "a.npz").read_bytes()
    for length in range(len(content)):
        (tmp_path / "a.npz").write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="opy or download it again"):
            npz.read(tmp_path / "a.npz")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text("'<>|=[](),{}:fiucOUSVM0123456789 descrfortran_ordershapeTrueFalse\n\\", max_size=60)
    | st.builds(
        "{{'descr': '{}{}{}', 'fortran_order': {}, 'shape': {}}}".format,
        st.sampled_from("<>|="),
        st.sampled_from("biufcOUSVMm"),
        st.integers(0, 20),
        st.sampled_from(["True", "False", "None"]),
        st.lists(st.integers(-1, 3), max_size=4).map(tuple),
    ),
    data=st.binary(max_size=40),
)
def test_any_header_is_read_or_refused(tmp_path, text, data):
    content = archive_of({"a.npy": with_header(text, data)})
    (tmp_path / "a").write_bytes(content)
    try:
        with npz.read(tmp_path / "a") as file:
            for name in file:
                assert file.read(name).nbytes == len(data)
    except CheckpointError:
        pass


def test_what_was_read_can_be_written_again(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", **ARRAYS)
    with npz.read(tmp_path / "a.npz") as file:
        again = [passed_through(file, tensor, name) for name, tensor in file.items()]
        with npz.read(written(tmp_path / "b.npz", npz_writing, again), verify=True) as copied:
            assert_holds(copied, CONTENT)


def test_an_archive_of_long_names_is_recognised(tmp_path):
    for length in (479, 500, 5000, 60_000 - 4):
        path = tmp_path / "a.data"
        with path.open("wb") as file:
            np.savez(file, **{"n" * length: np.ones(2)})
        with open_checkpoint(path) as found:
            assert (found.format, *found) == ("npz", "n" * length)
