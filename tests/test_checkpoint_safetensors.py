"""safetensors without its library: the bytes that the library writes, the tensors that it reads, and damaged files."""

from __future__ import annotations

import json
import pathlib
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mhabridge.checkpoint.formats import mindspore_metadata, safetensors_file
from mhabridge.checkpoint.formats.safetensors_header import DTYPES
from mhabridge.checkpoint.storage.stored import StoredObject
from mhabridge.checkpoint.storage.writing import Outgoing, passed_through
from mhabridge.errors import CheckpointError
from tests.checkpoint_files import GOLDEN, array_of, assert_holds, outgoing, written
from tests.golden.make_golden_mindspore import SPLIT

NUMERIC = [name for name in DTYPES.values() if not name.startswith("float8")]
FLOAT8 = [name for name in DTYPES.values() if name.startswith("float8")]
CONTENT = {
    **{f"of.{dtype}": (dtype, np.arange(15).reshape(3, 5) % 7) for dtype in NUMERIC},
    "scalar": ("float32", np.array(2.5)),
    "empty": ("int64", np.zeros((0, 3))),
    "odd": ("bool", np.array([1])),
    'naïve "模型"\n\\': ("float16", np.arange(3)),
}


@pytest.fixture(scope="module")
def library():
    return pytest.importorskip("safetensors.numpy", reason="safetensors is not installed here")


def all_outgoing(content=CONTENT):
    return [outgoing(name, dtype, values) for name, (dtype, values) in content.items()]


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


# -- whole files -------------------------------------------------------------------------------------------------------


def test_all_dtypes_and_shapes_come_back(tmp_path):
    file = written(tmp_path / "a.safetensors", safetensors_file, all_outgoing(), (), {"format": "pt"})
    with safetensors_file.read(file) as opened:
        assert_holds(opened, CONTENT)
        assert opened.metadata == {"format": "pt"}
        assert opened.objects == opened.notes == ()


@pytest.mark.parametrize("dtype", FLOAT8)
def test_float8_passes_through_bit_for_bit(tmp_path, dtype):
    bits = bytes(range(256))
    first = written(
        tmp_path / "a",
        safetensors_file,
        [Outgoing("a", dtype, (16, 16), lambda sink: sink.write(bits)), *all_outgoing()],
    )
    with safetensors_file.read(first) as opened:
        assert opened["a"].dtype == dtype
        second = written(tmp_path / "b", safetensors_file, [passed_through(opened, t, n) for n, t in opened.items()])
        with pytest.raises(CheckpointError, match=f"dtype {dtype}, which NumPy does not have"):
            opened.read("a")
    assert second.read_bytes() == first.read_bytes()


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_the_file_is_the_librarys_byte_for_byte(tmp_path, library, metadata):
    arrays = {name: array_of(*pair) for name, pair in CONTENT.items()}
    ours = written(tmp_path / "ours", safetensors_file, all_outgoing(), (), metadata)
    library.save_file(arrays, tmp_path / "theirs", metadata)
    assert ours.read_bytes() == (tmp_path / "theirs").read_bytes()


def test_the_library_reads_what_we_write(tmp_path, library):
    kept = {name: pair for name, pair in CONTENT.items() if pair[0] != "complex64"}
    file = written(tmp_path / "a", safetensors_file, all_outgoing(kept), [StoredObject("epoch", "3", 3)])
    found = library.load_file(file)
    assert set(found) == set(kept)
    assert np.array_equal(found["of.float32"], CONTENT["of.float32"][1].astype("float32"))
    torch = pytest.importorskip("torch", reason="PyTorch is not installed here")
    from safetensors.torch import load_file

    tensors = load_file(file)
    assert tensors["of.bfloat16"].dtype == torch.bfloat16
    assert torch.equal(tensors["of.int64"], torch.arange(15).reshape(3, 5) % 7)


@pytest.mark.frameworks
def test_mindspore_reads_what_we_write(tmp_path):
    ms = pytest.importorskip("mindspore", reason="MindSpore is not importable here")
    kept = {name: pair for name, pair in CONTENT.items() if pair[0] not in ("complex64",) and name != "empty"}
    file = tmp_path / "a.safetensors"
    written(file, safetensors_file, all_outgoing(kept), [StoredObject("epoch", "3", 3)], {"format": "ms"})
    found = ms.load_checkpoint(str(file), format="safetensors")
    assert set(found) == set(kept)
    assert found["of.float32"].asnumpy().tolist() == CONTENT["of.float32"][1].tolist()
    assert found["of.bfloat16"].dtype == ms.bfloat16


def test_objects_that_json_can_hold_come_back(tmp_path):
    objects = [
        StoredObject("epoch", "3", 3),
        StoredObject("name", "naïve", "naïve"),
        StoredObject("nothing", "None", None),
        StoredObject("betas", "a list of 2 entries", [0.9, 0.999]),
    ]
    file = written(tmp_path / "a", safetensors_file, all_outgoing(), objects, {"format": "pt"})
    with safetensors_file.read(file) as opened:
        assert list(opened.objects) == objects
        assert opened.metadata == {"format": "pt"}
        assert_holds(opened, CONTENT)
    lost = StoredObject("args", "a Namespace", inert=("argparse.Namespace",))
    with pytest.raises(CheckpointError, match=r"args: .*--drop"):
        written(tmp_path / "b", safetensors_file, [], [lost])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("a", "complex128", np.zeros(2))], "a: given dtype complex128"),
        ([("a", "int8", np.zeros(2)), ("a", "int8", np.zeros(2))], "a: given two entries of this name"),
        ([("__metadata__", "int8", np.zeros(2))], "__metadata__: given a name that is taken"),
        ([("\ud800", "int8", np.zeros(2))], "given no text"),
    ],
)
def test_what_has_no_place_is_refused_before_anything_is_written(tmp_path, tensors, message):
    with pytest.raises(CheckpointError, match=message):
        written(tmp_path / "a", safetensors_file, [outgoing(*one) for one in tensors])
    assert (tmp_path / "a").read_bytes() == b""


def test_an_emitter_that_writes_too_little_is_noticed(tmp_path):
    with pytest.raises(CheckpointError, match="a: given 3 bytes; expected 4"):
        written(tmp_path / "a", safetensors_file, [Outgoing("a", "int8", (4,), lambda sink: sink.write(b"abc"))])


# -- MindSpore's own ---------------------------------------------------------------------------------------------------


def test_mindspores_checksum_is_compared_on_request(tmp_path):
    golden = GOLDEN / "mindspore" / "crc.safetensors"
    with safetensors_file.read(golden, verify=True) as opened:
        assert_holds(opened, SPLIT)
        assert opened.metadata["format"] == "ms"
        again = [passed_through(opened, tensor, name) for name, tensor in opened.items()]
        with safetensors_file.read(written(tmp_path / "b", safetensors_file, again, (), opened.metadata)) as copied:
            assert copied.metadata == {"format": "ms"}  # crc_num is that of another file's bytes
    damaged = bytearray(golden.read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "a").write_bytes(damaged)
    safetensors_file.read(tmp_path / "a").close()
    with pytest.raises(CheckpointError, match="its CRC-32 is"):
        safetensors_file.read(tmp_path / "a", verify=True)
    crc = zlib.crc32(b"a\1\2", 0)
    (tmp_path / "c").write_bytes(raw({"__metadata__": {"crc_num": str(crc)}, "a": entry("U8", [2], [0, 2])}, b"\1\2"))
    safetensors_file.read(tmp_path / "c", verify=True).close()


def test_int4_and_partial_files_are_told(tmp_path):
    header = {"__metadata__": {"format": "ms", "q": "Int4"}, "q": entry("I8", [4], [0, 4])}
    (tmp_path / "a").write_bytes(raw(header, b"1234"))
    with pytest.raises(CheckpointError, match="q: given dtype Int4, of less than a byte"):
        safetensors_file.read(tmp_path / "a")
    (tmp_path / "b").write_bytes(raw({"__metadata__": {"remove_redundancy": "True"}}))
    with safetensors_file.read(tmp_path / "b") as opened:
        assert "another rank" in opened.notes[0]
    assert mindspore_metadata.notes({"remove_redundancy": "False"}) == ()


# -- files that are not right ------------------------------------------------------------------------------------------

WRONG = {
    "an overlap": (raw({"a": entry(), "b": entry(offsets=(2, 6))}, b"123456"), "an overlap at 'b'"),
    "the same bytes twice": (raw({"a": entry(), "b": entry()}, b"1234"), "an overlap at 'b'"),
    "a gap": (raw({"a": entry(), "b": entry(offsets=(8, 12))}, b"0" * 12), "a gap before 'b'"),
    "a gap at the start": (raw({"a": entry(offsets=(4, 8))}, b"0" * 8), "a gap before 'a'"),
    "bytes left over": (raw({"a": entry()}, b"12345"), "its header speaks of"),
    "bytes missing": (raw({"a": entry()}, b"123"), "its header speaks of"),
    "a wrong size": (raw({"a": entry(shape=[2])}, b"1234"), "not what shape"),
    "offsets backwards": (raw({"a": entry(offsets=(4, 0))}, b"1234"), "-4 bytes"),
    "a negative offset": (raw({"a": entry(offsets=(-4, 0))}, b"1234"), "data_offsets"),
    "an offset that is no integer": (raw({"a": entry(offsets=(0.0, 4.0))}, b"1234"), "data_offsets"),
    "an offset that is a bool": (raw({"a": entry("U8", [1], [False, True])}, b"1"), "data_offsets"),
    "three offsets": (raw({"a": entry(offsets=(0, 2, 4))}, b"1234"), "data_offsets"),
    "a negative length": (raw({"a": entry(shape=[-1])}, b"1234"), "has the shape"),
    "a shape beyond any file": (raw({"a": entry(shape=[2**62, 0], offsets=[0, 0])}), "has the shape"),
    "too many axes": (raw({"a": entry(shape=[1] * 100)}, b"1234"), "has the shape"),
    "a number of many digits": (raw(b'{"a":' + b"9" * 5000 + b"}"), "a number of 5000 digits"),
    "an unknown dtype": (raw({"a": entry("F31")}, b"1234"), "dtype 'F31', which no version"),
    "a dtype that is none": (raw({"a": entry(["F32"])}, b"1234"), "given dtype"),
    "a key too many": (raw({"a": {**entry(), "more": 1}}, b"1234"), "has not just dtype"),
    "no entry": (raw({"a": 3}), "has not just dtype"),
    "a name twice": (raw(b'{"a":{},"a":{}}'), "two entries are named 'a'"),
    "a name that is no text": (raw(b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), "is no text"),
    "metadata of numbers": (raw({"__metadata__": {"a": 1}}), "does not map strings to strings"),
    "no object": (raw([1]), "no JSON object"),
    "no JSON": (raw(b"{nonsense"), "is no JSON"),
    "no UTF-8": (raw(b'{"\xff":1}'), "is no JSON"),
    "deep nesting": (raw(b'{"a":' + b"[" * 200_000), "nested too deep"),
    "a huge header": (raw({}, length=2**62), "a header of 4611686018427387904 bytes"),
    "a header beyond the end": (raw({}, length=3), "a header of 3 bytes in a file of 10"),
    "nothing": (b"", "a header of 0 bytes in a file of 0"),
    "objects that are none": (
        raw({"__metadata__": {"mhabridge.objects": "[1]"}}),
        "mhabridge.objects is no JSON object",
    ),
    "objects that are no JSON": (raw({"__metadata__": {"mhabridge.objects": "["}}), "mhabridge.objects is no JSON"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_files_are_refused_with_the_reason(tmp_path, what):
    content, message = WRONG[what]
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        safetensors_file.read(tmp_path / "a")


@pytest.mark.parametrize("code", ["F4", "F6_E2M3", "F6_E3M2", "I4", "U4", "I2", "NF4", "int4"])
def test_items_of_less_than_a_byte_are_refused_by_name(tmp_path, code):
    (tmp_path / "a").write_bytes(raw({"a": entry(code, [8], [0, 4])}, b"1234"))
    with pytest.raises(CheckpointError, match=f"a: given dtype {code}, of less than a byte an element"):
        safetensors_file.read(tmp_path / "a")


def test_a_file_that_ends_early_is_refused_wherever_it_ends(tmp_path):
    content = written(tmp_path / "a", safetensors_file, all_outgoing()).read_bytes()
    for length in range(len(content)):
        (tmp_path / "a").write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="Copy or download it again"):
            safetensors_file.read(tmp_path / "a")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_happens_to_a_file_only_our_error_comes_out(tmp_path, data):
    content = bytearray(raw({"a.weight": entry("F16", [2, 3], [0, 12]), "b": entry("U8", [3], [12, 15])}, b"0" * 15))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    assert_bounded(tmp_path / "a", bytes(content))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "F4", "X"]) | json_values,
        "shape": st.lists(st.integers(-1, 2**63), max_size=4) | json_values,
        "data_offsets": st.lists(st.integers(-1, 20), min_size=2, max_size=2) | json_values,
    }
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.dictionaries(st.text(max_size=3), entries | json_values, max_size=3), data=st.binary(max_size=24))
def test_any_header_is_read_or_refused(tmp_path, header, data):
    assert_bounded(tmp_path / "a", raw(header, data))


def assert_bounded(file: pathlib.Path, content: bytes) -> None:
    """Reading it raises nothing but our error, takes little memory, and gives no more than is in the file."""
    file.write_bytes(content)
    tracemalloc.start()
    try:
        with safetensors_file.read(file) as opened:
            assert sum(len(piece) for tensor in opened.values() for piece in opened.chunks(tensor)) <= len(content)
    except CheckpointError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4_000_000
