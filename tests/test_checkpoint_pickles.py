"""The inert reader of pickles: what it makes of honest ones, and that hostile ones neither run nor eat memory."""

from __future__ import annotations

import argparse
import collections
import os
import pathlib
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mhabridge.checkpoint.formats import megengine, torch_legacy, torch_zip
from mhabridge.checkpoint.pickled import emitting, pickles
from mhabridge.checkpoint.pickled.inert import Made, Name, Persistent, Slice, Table
from mhabridge.checkpoint.storage.streams import BLOCK, ByteStream
from mhabridge.errors import CheckpointError
from tests.checkpoint_files import GOLDEN, array_of, assert_holds, assert_same, outgoing, written
from tests.golden import expected


def load(data: bytes, path: pathlib.Path) -> pickles.Loaded:
    path.write_bytes(data)
    with path.open("rb") as file:
        return pickles.load(ByteStream(file.fileno(), path))


def read(data: bytes, path: pathlib.Path, nested=None):
    path.write_bytes(data)
    return megengine.read(path, nested)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.pkl"


def plain(node, data):
    """A record of plain data as Python would have made it."""
    if isinstance(node, Table):
        return {plain(key, data): plain(value, data) for key, value in node.pairs}
    if isinstance(node, (list, tuple)):
        return type(node)(plain(item, data) for item in node)
    if isinstance(node, Slice):
        found = data[node.offset : node.offset + node.length]
        return found.decode(node.encoding) if node.encoding else found
    if isinstance(node, Made):
        items = node.items or (node.args[0] if node.args else [])
        return {"builtins.set": set, "builtins.frozenset": frozenset}[node.known_as](plain(items, data))
    return node


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text()
    | st.just("x" * 300),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=20,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(value=VALUES, protocol=st.integers(0, 5))
@example(value={"a": [1, (2, 3, 4, 5)], "b": ()}, protocol=0)
@example(value="\U0001f600" * 40_000, protocol=4)
def test_plain_data_is_what_pickle_wrote(path, value, protocol):
    data = pickle.dumps(value, protocol)
    assert plain(load(data, path).root, data) == value


@pytest.mark.parametrize("shift", range(10))
def test_an_operation_may_lie_across_what_is_read_at_a_time(path, shift):
    """Each of its bytes is once the first of a block."""
    value = ["x" * shift, *([n, 2**30 + n, 1.5 * n, f"name {n}"] for n in range(BLOCK // 10))]
    for protocol in (2, 4):
        data = pickle.dumps(value, protocol)
        assert len(data) > 2 * BLOCK
        assert plain(load(data, path).root, data) == value


def test_an_operation_that_is_cut_off_says_where(path):
    for data, where, more in ((b"", 0, 1), (b"\x80", 0, 2), (b"\x80\x02J\1\2", 2, 5), (b"\x80\x02K\1", 4, 1)):
        with pytest.raises(CheckpointError, match=f"bytes after offset {where}; expected {more} more"):
            load(data, path)


@pytest.mark.parametrize("protocol", [4, 5])
def test_sets_and_bytes_are_found(path, protocol):
    value = [{1, 2}, frozenset((3,)), b"bytes", b"x" * 100_000]
    data = pickle.dumps(value, protocol)
    assert plain(load(data, path).root, data) == value


def test_an_object_is_a_record_of_what_would_make_it(path):
    loaded = load(pickle.dumps(argparse.Namespace(lr=1), protocol=2), path)
    made = loaded.root
    assert isinstance(made, Made)
    assert (made.function, made.args) == (Name("argparse", "Namespace"), ())
    assert made.state.pairs == [("lr", 1)]
    assert loaded.names == (Name("argparse", "Namespace"),)


def test_large_bytes_stay_in_the_file(path):
    data = pickle.dumps(b"x" * 1000, protocol=4)
    found = load(data, path).root
    assert isinstance(found, Slice)
    assert data[found.offset : found.offset + found.length] == b"x" * 1000


def test_a_persistent_id_is_kept(path):
    assert load(b"\x80\x02K\x07Q.", path).ids[0].id == 7
    assert isinstance(load(b"Pkey\n.", path).root, Persistent)


def test_python_2_strings(path):
    assert load(b"\x80\x02U\x04name.", path).root == "name"
    assert load(b"T\x03\x00\x00\x00abc.", path).root == "abc"
    assert load(b"S'it\\x41'\n.", path).root == "itA"
    found = load(b"\x80\x02U\x02\xff\xfe.", path).root
    assert isinstance(found, Slice)


# ---- nothing runs


class Evil:
    """Pickled, it asks for a call that makes a marker file."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def evil_payloads(marker: pathlib.Path):
    code = f"open({str(marker)!r}, 'w')"
    weights = {"w": np.zeros(2, "float32")}
    for name, evil in (
        ("system", Evil(os.system, f"touch {marker}")),
        ("eval", Evil(eval, code)),
        ("exec", Evil(exec, code)),
    ):
        yield f"{name} alone", evil
        yield f"{name} beside", {**weights, "b": evil}
        yield f"{name} as state", collections.OrderedDict(weights, e=[evil])
        yield f"{name} nested", {"state_dict": {**weights, "deep": {"er": evil}}, "epoch": 1}


@pytest.mark.parametrize("protocol", range(6))
def test_no_payload_runs_and_each_is_named(tmp_path, protocol):
    marker = tmp_path / "marker"
    for label, evil in evil_payloads(marker):
        asked = "posix.system" if "system" in label else ".eval" if "eval" in label else ".exec"
        try:
            with read(pickle.dumps(evil, protocol), tmp_path / "evil.pkl") as file:
                inert = [name for entry in file.objects for name in entry.inert]
        except CheckpointError as error:
            inert = [str(error)]
        assert any(asked in name for name in inert), f"{label}: {inert}"
        assert not marker.exists(), label


# A payload that is thrown away, one in a tensor's arguments, one in a key, one in the state of a dict.
HIDDEN = {
    "popped": b"cposix\nsystem\n(Vtrue\ntR0",
    "popped to a mark": b"(cposix\nsystem\n(Vtrue\ntR1",
    "in the memo": b"cposix\nsystem\n(Vtrue\ntRp99\n0",
    "by instance": b"(Vtrue\niposix\nsystem\n0",
    "by object": b"(cposix\nsystem\nVtrue\no0",
    "on the stack": b"\x8c\x05posix\x8c\x06system\x93(\x8c\x04truet\x810",
}


@pytest.mark.parametrize("hidden", HIDDEN)
def test_a_hidden_payload_is_refused_by_name(path, hidden):
    honest = pickle.dumps({"w": np.zeros(2, "float32")}, protocol=2)
    with read(honest, path) as file:
        assert list(file) == ["w"]
    with pytest.raises(CheckpointError, match=r"posix\.system"):
        read(honest[:2] + HIDDEN[hidden] + honest[2:], path)


def test_a_payload_in_a_tensor_is_refused(path):
    evil = Evil(os.system, "true")
    array = (np.core if np.__version__ < "2" else np._core).multiarray._reconstruct

    class Array:
        def __reduce__(self):
            return array, (np.ndarray, (0,), b"b", evil), (1, (2,), np.dtype("f4"), False, b"\0" * 8)

    with pytest.raises(CheckpointError, match=r"posix\.system"):
        read(pickle.dumps({"w": Array()}, protocol=4), path)


# ---- damage


SMALL = ("megengine1.13.0-state-p2.pkl", "megengine1.13.0-nested-p5.pkl", "numpy1-p0.pkl", "numpy2-p4.pkl",
         "torch2.13.0-legacy.pt", "torch2.13.0-untyped.pt", "torch1.8.1-nested.pt")  # fmt: skip


def reader_of(name: str):
    if name.endswith(".pkl"):
        return megengine.read
    return torch_legacy.read if "legacy" in name else torch_zip.read


@pytest.mark.parametrize("name", SMALL)
def test_a_truncated_file_is_refused_at_every_byte(tmp_path, name):
    data = (GOLDEN / name).read_bytes()
    path = tmp_path / name
    for length in range(0, len(data), 1 if len(data) < 800 else 5):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            reader_of(name)(path)


def survives(name: str, data: bytes, path: pathlib.Path) -> None:
    """The reader answers or refuses; nothing else comes out."""
    path.write_bytes(data)
    try:
        with reader_of(name)(path) as file:
            for tensor in file.values():
                assert file.words(tensor).shape == tensor.shape
    except CheckpointError:
        pass


@pytest.mark.parametrize("name", SMALL)
def test_flipped_bits_never_crash(tmp_path, name):
    data = (GOLDEN / name).read_bytes()
    step = max(1, len(data) // 250)
    for position in range(0, len(data), step):
        for bit in (position % 8, (position + 3) % 8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            survives(name, bytes(flipped), tmp_path / "flipped")


EDITS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 3), st.binary(max_size=6)), max_size=6)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=100)
@given(name=st.sampled_from(SMALL), edits=EDITS)
def test_edited_files_never_crash(path, name, edits):
    data = (GOLDEN / name).read_bytes()
    for place, removed, inserted in edits:
        at = int(place * len(data))
        data = data[:at] + inserted + data[at + removed :]
    survives(name, data, path)


OPCODES = st.sampled_from([*pickles._OPERATIONS, *pickles._READING,
                           b"q\x00", b"h\x00", b"cnumpy\ndtype\n", b"ccollections\nOrderedDict\n",
                           b"cnumpy.core.multiarray\n_reconstruct\n", b"K\x01", b"\x8c\x01a", b"C\x02ab", b"\x8c\x02f4",
                           b"cmegengine.tensor\nParameter\n", b"(K\x01tR", b"}\x8c\x01ah\x00s"])  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
@given(parts=st.lists(OPCODES | st.binary(max_size=3), max_size=40))
def test_random_operations_never_crash(path, parts):
    survives("x.pkl", b"\x80\x04" + b"".join(parts) + b".", path)


# ---- bombs


def nested_tuples(depth: int) -> bytes:
    return b"\x80\x04)" + b"\x85" * depth + b"."


def doubled(levels: int, leaf: bytes = pickle.dumps(np.zeros(1, "float32"), 2)[2:-1]) -> bytes:
    """Each list has the one before twice in it: 2 ** levels in all."""
    return b"\x80\x04" + leaf + b"q\x000" + b"(h\x00h\x00lq\x000" * levels + b"h\x00."


def colliding(number: int) -> bytes:
    """A key whose hash is 0, as that of all multiples of this prime."""
    return b"\x8a\x0a" + (number * (2**61 - 1)).to_bytes(10, "little") + b"N"


BOMBS = {
    "a long of 2 GiB": b"\x80\x04\x8b\xff\xff\xff\x7f" + b"1" * 100,
    "a long of -1 bytes": b"\x80\x04\x8b\xff\xff\xff\xff.",
    "a long of 4 KiB": b"\x80\x04\x8b\x00\x10\x00\x00" + b"1" * 4096 + b".",
    "digits": b"I" + b"9" * 100_000 + b"\n.",
    "bytes beyond the file": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b".",
    "negative bytes": b"\x80\x04T\xff\xff\xff\xff.",
    "text beyond the file": b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b".",
    "a frame beyond the file": b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"N.",
    "marks": b"\x80\x04" + b"(" * 2_000_000 + b".",
    "operations": b"\x80\x04" + b"N" * 4_000_000 + b".",
    "deep tuples": nested_tuples(1_000_000),
    "deep lists": b"\x80\x04" + b"]" * 300_000 + b"a" * 299_999 + b".",
    "a dict with itself": b"\x80\x04}q\x00\x8c\x01ah\x00s.",
    "a list with itself": b"\x80\x04]q\x00h\x00a.",
    "a module with itself": b"\x80\x04cx\nNet\n)\x81q\x00}\x8c\x01ah\x00sb.",
    "a tensor with itself": b"\x80\x02}\x8c\x01actorch._utils\n_rebuild_parameter\n]q\x00\x85Rs.",
    "an array whose bytes are itself": b"\x80\x04}q\x00\x8c\x01acnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
    b")N\x87Rq\x01(K\x01)cnumpy\ndtype\n\x8c\x02f4\x85R\x89h\x01tbs.",
    "laughs": doubled(50),
    "laughs of numbers": doubled(50, leaf=b"K\x01"),
    "a memo far away": b"\x80\x04Nr\xff\xff\xff\xff.",
    "a memo of text": b"N" + b"p" + b"9" * 1000 + b"\n.",
    "colliding keys": b"\x80\x04}(" + b"".join(map(colliding, range(1, 30_000))) + b"u.",
    "two keys": emitting.start(2) + b"}(" + 2 * (emitting.value("a") + b"K\x01") + b"u.",
    "no end": b"\x80\x04N",
    "two values": b"\x80\x04NN.",
    "an unknown protocol": b"\x80\x06N.",
    "an extension": b"\x80\x02\x82\x01.",
    "an outside buffer": b"\x80\x05\x97.",
    "two pickles": pickle.dumps({"w": np.zeros(1, "f4")}) * 2,
    "empty": b"",
}  # fmt: skip


READ_ALL = """
import pathlib, resource, sys
sys.path.insert(0, sys.argv[1])
from mhabridge.checkpoint.formats import megengine
from mhabridge.errors import CheckpointError
used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (400 << 20),) * 2)
for path in sorted(pathlib.Path(sys.argv[2]).iterdir()):
    try:
        megengine.read(path)
        print("read:", path.name)
    except CheckpointError:
        pass
"""


def test_bombs_are_refused_in_little_memory(tmp_path):
    for bomb, data in BOMBS.items():
        (tmp_path / bomb).write_bytes(data)
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-I", "-c", READ_ALL, root, tmp_path], capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stdout, done.stderr[-2000:]) == (0, "", "")


LOOPS = ("laughs of numbers", "a dict with itself", "a list with itself", "deep and plain")


@pytest.mark.parametrize("bomb", LOOPS)
def test_plain_data_without_end_beside_tensors_is_listed_without_a_value(path, bomb):
    inner = BOMBS.get(bomb, b"\x80\x04" + b"]" * 200 + b"a" * 199 + b".")[2:-1]
    outer = b"\x80\x04}(" + emitting.value("w") + pickle.dumps(W, 2)[2:-1] + emitting.value("x") + inner + b"u."
    if bomb == "laughs of numbers":
        with pytest.raises(CheckpointError, match="too often"):
            read(outer, path)
        return
    with read(outer, path) as file:
        assert list(file) == ["w"]
        assert [entry.value for entry in file.objects] == [None]


def test_a_duplicate_key_is_an_error_everywhere(path):
    arrays = emitting.start(2) + b"}(" + emitting.value("w") + pickle.dumps(np.zeros(1, "f4"), 2)[2:-1]
    with pytest.raises(CheckpointError, match="twice"):
        read(arrays + emitting.value("w") + b"K\x01u.", path)
    with pytest.raises(CheckpointError, match="twice"):
        read(arrays + emitting.value("o") + b"}(" + 2 * (emitting.value("a") + b"K\x01") + b"uu.", path)


# ---- NumPy


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("major", [1, 2])
def test_pickles_of_both_numpys(major, protocol):
    table = {**expected.ARRAYS, "bfloat": expected.STATE["bfloat"]}
    with megengine.read(GOLDEN / f"numpy{major}-p{protocol}.pkl") as file:
        assert_holds(file, table)
        assert [(entry.name, entry.value) for entry in file.objects] == [("epoch", expected.EPOCH)]
        assert file["fortran"].strides == (1, 2)
        assert file["big"].big_endian


def test_the_comparison_can_fail():
    with megengine.read(GOLDEN / "numpy1-p4.pkl") as file, pytest.raises(AssertionError):
        assert_holds(file, {**expected.ARRAYS, "bfloat": ("bfloat16", expected.matrix(2, 3) + 1)})
    with pytest.raises(AssertionError):
        assert_same("x", np.zeros(1, "f4"), array_of("float32", np.array([-0.0])))


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_other_things_are_objects(path, protocol):
    arrays = {"w": np.ones(2, "f4"), "names": np.array(["a", "b"]), "any": np.array([1, "x"], object)}
    with read(pickle.dumps(arrays, protocol), path) as file:
        assert list(file) == ["w"]
        assert [(entry.name, entry.text) for entry in file.objects] == [
            ("names", "an array of U1"),
            ("any", "an array of O8"),
        ]


def test_a_long_text_payload_is_spilled_and_leaves_nothing_behind(path, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    array = np.arange(400_000, dtype="int32")
    for protocol in (0, 2):
        with read(pickle.dumps({"w": array, "again": array}, protocol), path) as file:
            assert_same("w", file.read("w"), array)
            assert file["w"].storage == file["again"].storage
        assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("shape", "data"),
    [((3,), b"\0" * 8), ((2,), b"\0" * 12), ((2**61, 2**61), b""), ((-1,), b"\0" * 4), ([2], b"\0" * 8)],
)
def test_an_array_of_the_wrong_size_is_refused(path, shape, data):
    function = (np.core if np.__version__ < "2" else np._core).multiarray._reconstruct

    class Array:
        def __reduce__(self):
            return function, (np.ndarray, (0,), b"b"), (1, shape, np.dtype("f4"), False, data)

    with pytest.raises(CheckpointError, match="w"):
        read(pickle.dumps({"w": Array()}, protocol=4), path)


# ---- nesting

W = np.ones((2, 2), "float32")


@pytest.mark.parametrize(
    ("content", "nested"),
    [
        ({"w": W}, ()),
        ({"state_dict": {"w": W}, "epoch": 1}, ("state_dict",)),
        ({"whatever": {"w": W}, "epoch": 1}, ("whatever",)),
        ({"model": {"w": W}, "random_state": W}, ("model",)),
        ({"model": {"w": W}, "optimizer": {"state": {0: {"m": W}}, "param_groups": []}}, ("model",)),
        ({"model": {"w": W}, "lr_scheduler": {"w": W}, "solver": {"param_groups": [W], "x": W}}, ("model",)),
        ({"state": {"model": {"w": W}}, "epoch": 1}, ("state", "model")),
        (collections.defaultdict(dict, w=W), ()),
    ],
)
def test_the_state_dict_is_found(path, content, nested):
    with read(pickle.dumps(content), path) as file:
        assert file.nested == nested
        assert list(file) == ["w"]
        beside = set(content) - {"w", *nested[:1]}
        assert {entry.name for entry in file.objects} == beside


@pytest.mark.parametrize(
    "content",
    [
        {"model": {"w": W}, "ema": {"w": W}},
        {"generator": {"w": W}, "discriminator": {"w": W}},
        {"w": W, "sub": {"w": W}},
    ],
)
def test_several_candidates_are_listed_and_one_can_be_chosen(path, content):
    data = pickle.dumps(content)
    last = list(content)[-1]
    with pytest.raises(CheckpointError, match=rf"more than one state dict: .*{last} \(1 tensor"):
        read(data, path)
    with read(data, path, nested=(last,)) as file:
        assert file.nested == (last,)
        assert list(file) == ["w"]
        assert len(file.objects) == len(content) - 1
    with read(data, path, nested=()) as file:
        names = {f"{key}.w" if isinstance(value, dict) else key for key, value in content.items()}
        assert set(file) == names


def test_a_part_that_is_not_there_is_refused(path):
    with pytest.raises(CheckpointError, match="state_dict"):
        read(pickle.dumps({"state_dict": {"w": W}}), path, nested=("model",))


def test_no_tensors_is_an_error_and_an_empty_state_dict_is_not(path):
    with pytest.raises(CheckpointError, match="no tensors"):
        read(pickle.dumps({"epoch": 3}), path)
    with read(pickle.dumps({}), path) as file:
        assert len(file) == 0


def test_objects_say_what_they_are(path):
    content = {
        "model": {"w": W, "step": 7},
        "optimizer": {"state": {0: {"m": W, "v": W + 1}}, "param_groups": [{"lr": 0.5}]},
        "args": argparse.Namespace(lr=1),
        "config": {"layers": [1, 2, (3, None)], "name": "x" * 200},
        "ids": {3: "a"},
        "loss": float("inf"),
        "nothing": None,
    }
    with read(pickle.dumps(content), path) as file:
        found = {entry.name: entry for entry in file.objects}
    assert found["model.step"].value == 7
    assert found["optimizer"].text == "a dict of 2 entries with 2 tensors"
    assert found["args"].inert == ("argparse.Namespace",)
    assert found["config"].value == {"layers": [1, 2, [3, None]], "name": "x" * 200}
    assert (found["ids"].value, found["ids"].text, found["ids"].inert) == (None, "a dict of 1 entries", ())
    assert found["loss"].value == float("inf")
    assert (found["nothing"].value, found["nothing"].text) == (None, "None")


def test_a_single_tensor_and_a_list(path):
    with read(pickle.dumps(W), path) as file:
        assert list(file) == ["tensor"]
        assert file.notes
    with read(pickle.dumps([W, {"b": W}]), path) as file:
        assert list(file) == ["0", "1.b"]


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        (("a", 1), r"\('a', 1\)"),
        (("a",), r"\('a',\)"),
        (b"w", "b'w'|1 bytes"),
        (b"\xff\0", r"b'.*'|2 bytes"),
        ("x" * 70_000, "a text of 70000 bytes"),
        (frozenset("a"), "an object of (__builtin__|builtins).frozenset"),
        ((1, 2, 3, 4, 5, 6), r"\(1, 2, 3, 4, \.\.\.\)"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_tensor_under_a_key_that_is_no_name_is_refused_with_the_key(path, key, shown, protocol):
    for content in ({key: W, "w": W}, {"m": {key: W, "w": W}}, {"w": W, key: {"w": W}}):
        with pytest.raises(CheckpointError, match=rf"given a tensor under the key ({shown}); expected a key that is"):
            read(pickle.dumps(content, protocol), path)
    with read(pickle.dumps({"w": W, key: 3, "n": None}, protocol), path) as file:
        assert list(file) == ["w"]
        listed, _ = file.objects
        assert listed.value is None
        assert listed.text == "3, under a key that is no name"
        assert "(the key " in listed.name


def test_two_of_such_keys_are_no_names_either(path):
    with pytest.raises(CheckpointError, match=r"under the key \('a', 1\)"):
        read(pickle.dumps({("a", 1): W, ("b", 1): W}), path)


def test_names_that_are_made_of_keys_are_told(path):
    for content, names, note in (
        ({0: W, "w": W}, ["0", "w"], "0 (int)"),
        ({"a": {1.5: W, None: W, True: W}}, ["1.5", "None", "True"], "1.5 (float), None (NoneType), True (bool)"),
        ({"w": W, 7: "epoch"}, ["w"], "7 (int)"),
        ([W, {"b": W}], ["0", "1.b"], "0 (int), 1 (int)"),
        (dict.fromkeys(range(9), W), [str(n) for n in range(9)], "0 (int), 1 (int), 2 (int), 3 (int) and 5 more"),
    ):
        with read(pickle.dumps(content), path) as file:
            assert list(file) == names
            assert file.notes == (f"Names are texts; these are made of other keys: {note}.",)
    with read(pickle.dumps({"model": {"w": W}, "optimizer": {"state": {0: {"m": W}}}}), path) as file:
        assert not file.notes


def test_no_entry_beside_the_chosen_part_is_lost(path):
    with read(pickle.dumps({"1": {"w": W}, 1: {"v": W}, "n": 3}), path, nested=("1",)) as file:
        assert list(file) == ["w"]
        assert [entry.name for entry in file.objects] == ["1", "n"]


def test_a_choice_is_told_as_the_command_line_takes_it(path):
    for content, said in (
        (
            {"model": {"w": W}, "ema": {"w": W}},
            r"nested=\('model',\) \(--nested model\), .* nested=\(\) \(--nested ''\)",
        ),
        ({"a": {"the net": {"w": W}, "x": {"w": W}}}, r"\(--nested a --nested 'the net'\), .*\(--nested a\)"),
    ):
        with pytest.raises(CheckpointError, match=said):
            read(pickle.dumps(content), path)
    with pytest.raises(CheckpointError, match=r"one of its keys: model.*on the command line --nested KEY"):
        read(pickle.dumps({"model": {"w": W}}), path, nested=("x",))


# ---- writing pickles


@settings(deadline=None)
@given(value=VALUES)
def test_plain_data_is_written_as_pickle_reads_it(value):
    data = emitting.start(2) + emitting.value(value) + emitting.STOP
    assert pickle.loads(data) == value


@pytest.mark.parametrize("module", [megengine, torch_zip])
def test_a_checkpoint_of_many_tensors_is_read(tmp_path, monkeypatch, module):
    """What we write ourselves has more bytes than the limit asks for, whatever the number of tensors."""
    tensors = [outgoing(str(number), "float32", np.zeros(0)) for number in range(400)]
    file = written(tmp_path / "a", module, tensors)
    monkeypatch.setattr(pickles, "ALWAYS_ALLOWED", 100)
    with module.read(file) as found:
        assert len(found) == 400


def test_many_operations_need_a_large_file(path, monkeypatch):
    empty = b"\x80\x02]" + b"(e" * 1000
    assert load(empty + b".", path).root == []
    monkeypatch.setattr(pickles, "ALWAYS_ALLOWED", 100)
    with pytest.raises(CheckpointError, match="a pickle of more than 501 operations"):
        load(empty + b".", path)
    longer = empty + b"X" + struct.pack("<I", 8000) + b"x" * 8000 + b"0."
    assert load(longer, path).root == []
    monkeypatch.setattr(pickles, "MAX_OPCODES", 150)
    with pytest.raises(CheckpointError, match="a pickle of more than 150 operations"):
        load(longer, path)


def test_one_name_is_one_record(path):
    root = load(pickle.dumps([print, len, print], 2), path).root
    again = load(b"\x80\x02](cos\nf\ncos\nf\ncos\ng\ne.", path).root
    assert root[0] is root[2]
    assert again[0] is again[1] is not again[2]
    assert again[0] == Name("os", "f")
