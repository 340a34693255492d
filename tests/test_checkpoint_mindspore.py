"""MindSpore's .ckpt without protobuf: real files, the same bytes as MindSpore writes, and files that are not right."""

from __future__ import annotations

import os
import pathlib
import re
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mhabridge.checkpoint.conversion import convert_checkpoint
from mhabridge.checkpoint.fingerprints import fingerprint
from mhabridge.checkpoint.formats import mindspore_ckpt, mindspore_writing
from mhabridge.checkpoint.formats.mindspore_entries import TYPES, head_of, varint
from mhabridge.checkpoint.storage.stored import StoredObject
from mhabridge.checkpoint.storage.writing import Outgoing, passed_through
from mhabridge.errors import CheckpointError
from tests.checkpoint_files import GOLDEN, assert_holds, outgoing, written
from tests.golden.make_golden_mindspore import APPENDED, LONG, PLAIN, SLICED, SPLIT

FILES = GOLDEN / "mindspore"
CONTENT = {
    **{f"of.{dtype}": (dtype, np.arange(15).reshape(3, 5) % 2) for dtype in TYPES.values()},
    "scalar": ("float32", np.array(2.5)),
    "one": ("bool", np.array([1])),
    "naïve 模型": ("bfloat16", np.arange(3)),
}
TENSORS = [outgoing(name, dtype, values) for name, (dtype, values) in CONTENT.items()]


def entry(tag="a", dims=(2,), kind="Int8", data=b"12") -> bytes:
    return head_of(tag, dims, kind, len(data)) + data


def field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def value(*fields: bytes) -> bytes:
    return field(1, b"".join(fields))


def opened(path: pathlib.Path, content: bytes, **options):
    path.write_bytes(content)
    return mindspore_ckpt.read(path, **options)


# -- real files --------------------------------------------------------------------------------------------------------


def test_a_real_file_of_all_dtypes():
    with mindspore_ckpt.read(FILES / "plain.ckpt") as file:
        scalars = {"epoch_num": ("int64", np.array(3)), "done": ("bool", np.array(1))}
        assert_holds(file, {**PLAIN, **scalars})
        assert list(file) == [*PLAIN, *scalars]
        assert [(found.name, found.value) for found in file.objects] == [("name", APPENDED["name"]), ("empty", "")]
        assert file.notes == ()


def test_real_slices_are_put_together():
    with mindspore_ckpt.read(FILES / "sliced.ckpt") as file:
        assert_holds(file, LONG)
        assert [extent.length for extent in file[SLICED].extents] == [1024, 1024, 952]
    with mindspore_ckpt.read(FILES / "split.ckpt") as file:
        assert_holds(file, SPLIT)
        assert len(file[SLICED].extents) == 3
    assert (FILES / "split.ckpt").read_bytes().count(SLICED.encode()) == 6  # three of them are empty


def test_a_real_checksum_is_compared_on_request(tmp_path):
    with mindspore_ckpt.read(FILES / "crc.ckpt", verify=True) as file:
        assert_holds(file, SPLIT)
    content = bytearray((FILES / "crc.ckpt").read_bytes())
    assert content[-17:-10] == b"crc_num"
    content[-18] ^= 1
    opened(tmp_path / "a", bytes(content)).close()
    with pytest.raises(CheckpointError, match="its CRC-32 is"):
        opened(tmp_path / "a", bytes(content), verify=True)


def test_a_real_encrypted_file_is_named_as_such():
    with pytest.raises(CheckpointError, match=r"an encrypted file \(AES-GCM\).*dec_key"):
        mindspore_ckpt.read(FILES / "encrypted.ckpt")


@pytest.mark.parametrize("magic", [b"\xd9\x5e\x3a\x7f", b"\xda\x5e\x3a\x7f"])
def test_the_other_ciphers_are_named_too(tmp_path, magic):
    with pytest.raises(CheckpointError, match=r"an encrypted file \((AES|SM4)-CBC\)"):
        opened(tmp_path / "a", magic + bytes(60))


# -- writing -----------------------------------------------------------------------------------------------------------


def test_all_dtypes_and_shapes_come_back(tmp_path):
    objects = [StoredObject("epoch", "3", 3), StoredObject("name", "naïve", "naïve"), StoredObject("lr", "0.1", 0.1)]
    file = written(tmp_path / "a", mindspore_writing, TENSORS, objects)
    scalars = {"epoch": ("int64", np.array(3)), "lr": ("float64", np.array(0.1))}
    with mindspore_ckpt.read(file) as found:
        assert_holds(found, {**CONTENT, **scalars})
        assert found.objects == (objects[1],)


@pytest.mark.parametrize("name", ["plain", "sliced"])
def test_a_real_file_is_written_again_byte_for_byte(tmp_path, name):
    with mindspore_ckpt.read(FILES / f"{name}.ckpt") as file:
        tensors = [passed_through(file, tensor, name) for name, tensor in file.items()]
        again = written(tmp_path / "a", mindspore_writing, tensors, file.objects, slice_size=1024)
    assert again.read_bytes() == (FILES / f"{name}.ckpt").read_bytes()


@pytest.mark.frameworks
def test_mindspore_writes_the_same_bytes_and_reads_ours(tmp_path):
    ms = pytest.importorskip("mindspore", reason="MindSpore is not importable here")
    tensors = []
    for name, (dtype, values) in CONTENT.items():
        tensor = ms.Tensor(np.asarray(values).astype("float32" if dtype == "bfloat16" else dtype))
        tensors.append({"name": name, "data": tensor.astype(ms.bfloat16) if dtype == "bfloat16" else tensor})
    objects = [StoredObject("epoch", "3", 3), StoredObject("name", "naïve", "naïve"), StoredObject("on", "True", True)]
    appended = {found.name: found.value for found in objects}
    ms.save_checkpoint(tensors, str(tmp_path / "theirs.ckpt"), append_dict=appended)
    ours = written(tmp_path / "ours.ckpt", mindspore_writing, TENSORS, objects)
    assert ours.read_bytes() == (tmp_path / "theirs.ckpt").read_bytes()
    found = ms.load_checkpoint(str(ours))
    assert found["name"] == "naïve"
    assert found["of.float64"].asnumpy().tolist() == CONTENT["of.float64"][1].tolist()
    written(tmp_path / "sliced.ckpt", mindspore_writing, TENSORS, slice_size=7)
    again = ms.load_checkpoint(str(tmp_path / "sliced.ckpt"))
    assert all(again[name].asnumpy().tobytes() == found[name].asnumpy().tobytes() for name in CONTENT)


@pytest.mark.parametrize("size", [1, 7, 60, 1000])
def test_slices_of_any_size_are_cut_and_joined(tmp_path, size):
    file = written(tmp_path / "a", mindspore_writing, TENSORS, slice_size=size)
    with mindspore_ckpt.read(file) as found:
        assert_holds(found, CONTENT)
        assert len(found["of.float32"].extents) == -(-60 // size)
        # From a file, where the kernel copies, as well as from memory.
        tensors = [passed_through(found, tensor, name) for name, tensor in found.items()]
        again = written(tmp_path / "b", mindspore_writing, tensors, slice_size=size + 1)
    with mindspore_ckpt.read(again) as found:
        assert_holds(found, CONTENT)


def test_the_mode_is_the_umasks_not_mindspores(tmp_path):
    file = written(tmp_path / "a", mindspore_writing, TENSORS)
    assert os.stat(file).st_mode & 0o200


def test_empty_tensors_are_refused_or_kept_on_request(tmp_path):
    empty = outgoing("none", "float32", np.zeros((2, 0)))
    with pytest.raises(CheckpointError, match=r"none: given an empty tensor of shape \(2, 0\).*safetensors"):
        written(tmp_path / "a", mindspore_writing, [*TENSORS, empty])
    assert (tmp_path / "a").read_bytes() == b""
    file = written(tmp_path / "a", mindspore_writing, [empty, *TENSORS], keep_empty=True)
    with mindspore_ckpt.read(file) as found:
        assert_holds(found, {"none": ("float32", np.zeros((2, 0))), **CONTENT})
    with pytest.raises(CheckpointError, match=r"of shape \(0,\)"):
        written(tmp_path / "a", mindspore_writing, [outgoing("n", "int8", np.zeros(0))], keep_empty=True)


@pytest.mark.frameworks
def test_mindspore_reads_the_empty_tensors_that_we_keep(tmp_path):
    ms = pytest.importorskip("mindspore", reason="MindSpore is not importable here")
    tensors = [outgoing("none", "float32", np.zeros((2, 0, 3))), *TENSORS]
    found = ms.load_checkpoint(str(written(tmp_path / "a.ckpt", mindspore_writing, tensors, keep_empty=True)))
    assert found["none"].shape == (2, 0, 3)


@pytest.mark.parametrize(
    ("tensors", "objects", "message"),
    [
        ([("a", "complex64", np.zeros(2))], [], "a: given dtype complex64, which MindSpore cannot load"),
        ([("a", "int8", np.zeros(2)), ("a", "int8", np.zeros(2))], [], "a: given two entries"),
        ([("a", "int8", np.zeros(2))], [StoredObject("a", "x", "x")], "a: given two entries"),
        ([("\ud800", "int8", np.zeros(2))], [], "given no text"),
        ([], [StoredObject("betas", "a list", [1, 2])], r"betas: .*--drop"),
        ([], [StoredObject("big", "x", 2**63)], r"big: .*--drop"),
        ([], [StoredObject("text", "x", "x\0")], r"text: .*--drop"),
        ([], [StoredObject("text", "x", "\ud800")], r"text: .*--drop"),
    ],
)
def test_what_has_no_place_is_refused_before_anything_is_written(tmp_path, tensors, objects, message):
    with pytest.raises(CheckpointError, match=message):
        written(tmp_path / "a", mindspore_writing, [outgoing(*one) for one in tensors], objects)
    assert (tmp_path / "a").read_bytes() == b""


def test_float8_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="a: given dtype float8_e5m2"):
        written(tmp_path / "a", mindspore_writing, [Outgoing("a", "float8_e5m2", (1,), lambda sink: sink.write(b"1"))])


# -- other writers of the same message ---------------------------------------------------------------------------------


def test_packed_dims_and_other_orders_of_fields_are_read(tmp_path):
    packed = field(3, b"123456") + field(1, varint(2) + varint(3)) + field(2, b"UInt8")
    with opened(tmp_path / "a", value(field(2, packed), field(1, b"a"))) as file:
        assert_holds(file, {"a": ("uint8", np.frombuffer(b"123456", "u1").reshape(2, 3))})


def test_unknown_fields_are_passed_over_with_a_note(tmp_path):
    more = (
        varint(9 << 3) + varint(7) + varint(10 << 3 | 1) + bytes(8) + varint(11 << 3 | 5) + bytes(4) + field(12, b"x")
    )
    tensor = field(2, varint(8) + varint(1) + field(2, b"Int8") + more + field(3, b"1"))
    with opened(tmp_path / "a", value(field(1, b"a"), tensor) + field(2, b"more")) as file:
        assert_holds(file, {"a": ("int8", np.frombuffer(b"1", "i1"))})
        assert file.notes[0] == "Field 9 of TensorProto is not known here, and was passed over."
        assert len(file.notes) == 5


def test_dims_of_zero_are_a_scalar_or_nothing(tmp_path):
    with opened(tmp_path / "a", entry("one", (0,), "Int8", b"1") + entry("none", (0,), "Int8", b"")) as file:
        assert file["one"].shape == ()
        assert file["none"].shape == (0,)


def test_types_that_mindspore_only_saves_are_read(tmp_path):
    with opened(
        tmp_path / "a", entry("a", (1,), "Complex64", bytes(8)) + entry("b", (1,), "Complex128", bytes(16))
    ) as file:
        assert [tensor.dtype for tensor in file.values()] == ["complex64", "complex128"]


# -- files that are not right ------------------------------------------------------------------------------------------

GOOD = field(2, varint(8) + varint(2) + field(2, b"Int8") + field(3, b"12"))
WRONG = {
    "4-bit integers": (entry(kind="Int4"), "a: given type 'Int4'"),
    "an unknown type": (entry(kind="Float31"), "a: given type 'Float31'"),
    "a map tensor": (value(field(1, b"table"), field(3, b"")), "table: given a map tensor"),
    "a tensor twice": (entry() + entry("b") + entry(), "a: given two tensors of this name"),
    "a tensor twice in a row": (entry() + entry(), "has 4 bytes, which is not what shape"),
    "too few bytes": (entry(data=b"1"), "has 1 bytes, which is not what shape"),
    "slices of different dims": (entry() + entry(dims=(4,)), "the slices of 'a' differ"),
    "slices of different types": (entry(data=b"1") + entry(kind="UInt8", data=b"2"), "the slices of 'a' differ"),
    "no tag": (value(GOOD), "no entry of one tag and one tensor"),
    "two tags": (value(field(1, b"a"), field(1, b"b"), GOOD), "no entry of one tag and one tensor"),
    "no tensor": (value(field(1, b"a")), "no entry of one tag and one tensor"),
    "two tensors": (value(field(1, b"a"), GOOD, GOOD), "no entry of one tag and one tensor"),
    "no type": (value(field(1, b"a"), field(2, field(3, b"12"))), "no tensor of one type and one content"),
    "no content": (value(field(1, b"a"), field(2, field(2, b"Int8"))), "no tensor of one type and one content"),
    "negative dims": (value(field(1, b"a"), field(2, b"\x08" + varint(2**64 - 1) + GOOD[2:])), "the dims"),
    "too many dims": (entry(dims=(1,) * 100, data=b"1"), "the dims"),
    "dims beyond any file": (entry(dims=(2**61, 2**61)), "the dims"),
    "a tag that is no text": (value(field(1, b"\xff"), GOOD), "a name that is no text"),
    "a tag that is too long": (value(field(1, b"a" * 70_000), GOOD), "a name of 70000 bytes"),
    "a number that does not end": (b"\x0a" + b"\xff" * 11, "no number before offset"),
    "a number of more than 64 bits": (b"\x0a" + b"\xff" * 9 + b"\x02", "no number before offset"),
    "a group": (b"\x0b", "no field begins with 11"),
    "field 0": (b"\x02\x00", "goes beyond its message"),
    "a message that is too short": (value(field(1, b"a"), varint(2 << 3 | 2) + varint(99)), "goes beyond its message"),
    "a length beyond the end": (b"\x0a" + varint(2**62), "goes beyond its message"),
    "a string that is none": (entry(kind="str", dims=(0,), data=b"\xff\xff\xff\xff"), "'a' is no text"),
    "nothing": (b"", "it is empty"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_files_are_refused_with_the_reason(tmp_path, what):
    content, message = WRONG[what]
    with pytest.raises(CheckpointError, match=message):
        opened(tmp_path / "a", content)


def test_what_the_wrong_ones_are_made_of_is_right(tmp_path):
    with opened(tmp_path / "a", value(field(1, b"a"), GOOD) + entry("b")) as file:
        assert {name: tensor.shape for name, tensor in file.items()} == {"a": (2,), "b": (2,)}


def test_a_file_that_ends_early_is_refused_unless_it_ends_between_tensors(tmp_path):
    content = written(tmp_path / "whole", mindspore_writing, TENSORS[:4]).read_bytes()
    ends = set()
    for length in range(len(content)):
        try:
            with opened(tmp_path / "a", content[:length]) as file:
                ends.add(len(file))
        except CheckpointError:
            continue
    assert ends == {1, 2, 3}  # the format does not say how many there should be


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_happens_to_a_file_only_our_error_comes_out(tmp_path, data):
    content = bytearray(entry("a.w", (2, 3), "Int16", bytes(12)) + entry("s", (0,), "str", b"a\0\0\0") + entry("b"))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    assert_bounded(tmp_path / "a", bytes(content))


messages = st.recursive(
    st.binary(max_size=12) | st.builds(entry, kind=st.sampled_from([*TYPES, "str", "Int4"])),
    lambda inner: st.lists(st.builds(field, st.integers(1, 4), inner), max_size=4).map(b"".join),
    max_leaves=10,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=messages)
def test_any_message_is_read_or_refused(tmp_path, content):
    assert_bounded(tmp_path / "a", content)


def assert_bounded(file: pathlib.Path, content: bytes) -> None:
    """Reading it raises nothing but our error, takes little memory, and gives no more than is in the file."""
    file.write_bytes(content)
    tracemalloc.start()
    try:
        with mindspore_ckpt.read(file) as found:
            assert sum(len(piece) for tensor in found.values() for piece in found.chunks(tensor)) <= len(content)
    except CheckpointError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4_000_000


@pytest.mark.frameworks
@pytest.mark.parametrize("optimizer", ["Adam", "Momentum", "SGD", "AdamWeightDecay"])
@pytest.mark.parametrize("bare", [False, True])
def test_an_optimizers_tensors_are_no_weights(bare: bool, optimizer: str, tmp_path: pathlib.Path) -> None:
    """A checkpoint of a network in training has them under the names of its parameters."""
    ms = pytest.importorskip("mindspore", reason="MindSpore is not importable here")
    attention = ms.nn.MultiheadAttention(8, 2)
    model = attention if bare else ms.nn.SequentialCell(attention, ms.nn.Dense(8, 8))
    more = {"momentum": 0.9} if optimizer == "Momentum" else {}
    update = getattr(ms.nn, optimizer)(model.trainable_params(), learning_rate=0.1, **more)
    ms.save_checkpoint(model, str(tmp_path / "model.ckpt"))
    both = {parameter.name: parameter for parameter in (*model.get_parameters(), *update.get_parameters())}
    ms.save_checkpoint([{"name": name, "data": one} for name, one in both.items()], str(tmp_path / "both.ckpt"))

    plain, whole = (fingerprint(tmp_path / f"{name}.ckpt") for name in ("model", "both"))
    assert whole.attention == plain.attention
    assert whole.all != plain.all
    report = convert_checkpoint(tmp_path / "both.ckpt", tmp_path / "both.pth", to="torch", num_heads=2)
    own = {entry.target for entry in report.entries if entry.rule == "unchanged: an optimizer's"}
    assert own == both.keys() - {parameter.name for parameter in model.get_parameters()}
    (note,) = [note for note in report.notes if "an optimizer's and stay" in note]
    patterns = re.findall("--drop '([^']*)'", note)
    assert "global_step" in patterns
    left = convert_checkpoint(tmp_path / "both.ckpt", tmp_path / "b.pth", to="torch", num_heads=2, drop=patterns)
    assert left.verified
    assert fingerprint(tmp_path / "b.pth") == plain
