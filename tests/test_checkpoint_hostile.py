"""Files made to hurt: what an attacker would try on the readers, the conversion and the folder that it writes to.

Each is refused with a CheckpointError or read for what it is; nothing runs, nothing takes much time or memory, and
nothing outside the target is written. ``tests/fuzz/readers.py`` looks for more of them.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest

from mhabridge.checkpoint.conversion import convert_checkpoint
from mhabridge.checkpoint.fingerprints import fingerprint
from mhabridge.checkpoint.formats.known import FORMATS, open_checkpoint
from mhabridge.checkpoint.formats.mindspore_entries import head_of
from mhabridge.checkpoint.inspection import inspect_checkpoint
from mhabridge.checkpoint.storage.stored import StoredFile
from mhabridge.checkpoint.storage.writing import Outgoing, Sink
from mhabridge.errors import CheckpointError, MHABridgeError

NUMBERS = np.arange(16, dtype="<f4").tobytes()
ESCAPES = "\x1b[2J\x1b]0;title\x07\n\0\u202e"


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def whole(number: int) -> bytes:
    return b"\x8a\x09" + number.to_bytes(9, "little", signed=True)


def tensor(shape, strides, numel=16, start=0, key="0", kind="FloatStorage") -> bytes:
    """A pickled tensor of PyTorch, with whatever is to be wrong in it."""
    storage = text("storage") + b"ctorch\n%s\n" % kind.encode() + text(key) + text("cpu") + whole(numel)
    sizes = b"".join(b"(" + b"".join(map(whole, numbers)) + b"t" for numbers in (shape, strides))
    empty = b"\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n((" + storage + b"tQ" + whole(start) + sizes + empty + b"tR"


HONEST = tensor((4, 4), (4, 1))


def state_dict(*tensors: bytes, names=None) -> bytes:
    named = zip(names or [f"w{number}" for number in range(len(tensors))], tensors, strict=True)
    return b"\x80\x02}(" + b"".join(text(name) + made for name, made in named) + b"u."


def archive(data: bytes, storage: bytes = NUMBERS, **more: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in {"archive/data.pkl": data, "archive/data/0": storage, **more}.items():
            file.writestr(name, content)
    return buffer.getvalue()


def safetensors(header: object, body: bytes = b"") -> bytes:
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + body


def at(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def made(folder, name: str, data: bytes):
    path = folder / name
    path.write_bytes(data)
    return path


def refused(path, match: str) -> str:
    with pytest.raises(CheckpointError, match=match) as caught:
        open_checkpoint(path).close()
    assert len(str(caught.value)) < 20_000
    return str(caught.value)


# ---- zip archives


def test_the_archive_that_the_others_are_made_of_is_honest(tmp_path):
    path = made(tmp_path, "a.pt", archive(state_dict(HONEST)))
    with open_checkpoint(path, verify=True) as file:
        assert file.read("w0").tobytes() == NUMBERS


@pytest.mark.parametrize("what", ["index", "archive", "comment"])
def test_two_indices_in_one_archive(tmp_path, what):
    """Which of the two counts, readers of zip archives do not agree about."""
    honest, end = archive(state_dict(HONEST)), 22
    commented = honest[:-2] + struct.pack("<H", end) + honest[-end:]
    data = {"index": honest + honest[-end:], "archive": honest + honest, "comment": commented}[what]
    refused(made(tmp_path, "a.pt", data), "index")


def test_members_that_name_files_elsewhere_write_none(tmp_path):
    more = {"../../evil": b"x", "/tmp/evil": b"x", "archive/d\u0430ta.pkl": b"x", "archive/data/\uff10": b"x"}
    path = made(tmp_path, "a.pt", archive(state_dict(HONEST), **more))
    assert convert_checkpoint(path, tmp_path / "a.safetensors").ok
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.pt", "a.safetensors"]


# ---- pickles


@pytest.mark.parametrize(
    "lie",
    [
        tensor((4, 4), (4, 1), numel=17),
        tensor((4, 4), (4, 1), numel=8),
        tensor((4, 4), (4, 1), start=10),
        tensor((4,), (-1,), start=15),
        tensor((4,), (1,), start=-1),
        tensor((-4, -4), (4, 1)),
        tensor((2, 2), (2**61, 2**61)),
        tensor((4, 4), (4, 1), kind="DoubleStorage"),
        tensor((4, 4), (4, 1), key="../0"),
    ],
)
def test_a_tensor_that_is_not_in_its_storage(tmp_path, lie):
    refused(made(tmp_path, "a.pt", archive(state_dict(lie))), "w0|no member")


@pytest.mark.parametrize("name", ["w0", "attn.in_proj_weight"])
def test_a_view_that_would_take_any_memory(tmp_path, name):
    names = [name, "attn.out_proj.weight"]
    for shape in ((10**6, 10**6), (3 * 2**29, 2**29), (2**30, 2**30)):
        path = made(tmp_path, "a.pt", archive(state_dict(tensor(shape, (0, 0)), HONEST, names=names)))
        for to, heads in ((None, None), ("megengine", 4)):
            with pytest.raises(MHABridgeError, match=r"w0|attn"):
                convert_checkpoint(path, tmp_path / "b.pkl", to=to, num_heads=heads)
        with open_checkpoint(path) as file, pytest.raises(CheckpointError, match=f"{name}: given an expanded view"):
            file.read(name)


PEAK = r"""
import pathlib, re, sys
from mhabridge.checkpoint.formats.known import open_checkpoint
from mhabridge.errors import CheckpointError

def peak():  # not getrusage, which begins with what the parent has
    return int(re.search(r"VmHWM:\s*(\d+)", pathlib.Path("/proc/self/status").read_text())[1])

before = peak()
try:
    hold = bytearray(int(sys.argv[2])).replace(b"\0", b"1")
    open_checkpoint(sys.argv[1]).close()
except CheckpointError as error:
    print(error)
print(peak() - before >> 10)
"""


def mebibytes(path, more: int = 0) -> int:
    """How much memory opening a file takes, in a process of its own; it has to be refused."""
    command = [sys.executable, "-c", PEAK, path, str(more)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    *message, peak = done.stdout.splitlines()
    assert message
    return int(peak)


def test_memory_that_is_taken_is_seen(tmp_path):
    assert mebibytes(made(tmp_path, "a.pkl", b"\x80\x04."), more=310 << 20) > 300


@pytest.mark.parametrize("what", [b"\x8f", b"C\0", b"\x8c\4\xf0\x9f\x98\x80"], ids=["sets", "bytes", "texts"])
def test_a_pickle_of_millions_of_records(tmp_path, what):
    """A byte or two of the file make each of them."""
    assert mebibytes(made(tmp_path, "a.pkl", b"\x80\x04(" + what * 1_900_000 + b"t.")) < 300


def test_a_pickle_of_thousands_of_names(tmp_path):
    names = b"".join(b"cm%d\nn\n0" % number for number in range(30_000))
    refused(made(tmp_path, "a.pkl", b"\x80\x02" + names + b"}."), "names")


def test_a_name_of_thousands_of_characters_makes_no_such_message(tmp_path):
    data = b"\x80\x02c" + b"p" * 2000 + b"\n" + b"q" * 2000 + b"\n0}."
    honest = pickle.dumps({"w": np.zeros(2, "f4")}, 2)
    message = refused(made(tmp_path, "a.pkl", data[:-2] + honest[2:]), "asks for ppp")
    assert len(message) < 1000


def test_views_that_together_would_fill_a_disk(tmp_path):
    path = tmp_path / "a.pt"
    view = tensor((1 << 16,), (1,), numel=1 << 16)
    path.write_bytes(archive(state_dict(*[view] * 20_000), bytes(1 << 18)))
    refused(path, "together")


def test_wide_views_count_as_what_has_to_be_read_for_them(tmp_path):
    def views(count: int):
        data = state_dict(*[tensor((2,), (99_999,), numel=100_000)] * count)
        return made(tmp_path, "a.pt", archive(data, bytes(400_000)))

    with open_checkpoint(views(100)) as file:
        assert file.read("w99").tolist() == [0, 0]
    refused(views(11_000), "together")


def test_a_storage_is_summed_up_once_however_many_views_it_has(tmp_path, monkeypatch):
    views = [tensor((2,), (1000,), numel=1 << 18) for _ in range(50)]
    path = made(tmp_path, "a.pt", archive(state_dict(*views), bytes(1 << 20)))
    asked, fill = [], StoredFile.fill

    def counting(self, tensor, position, buffers):
        asked.append(sum(map(len, buffers)))
        fill(self, tensor, position, buffers)

    monkeypatch.setattr(StoredFile, "fill", counting)
    with open_checkpoint(path) as file:
        for name in file:
            file.read(name)
    assert 1 << 20 <= sum(asked) < 3 << 20


def test_many_tied_tensors_are_listed_in_linear_space(tmp_path):
    path = made(tmp_path, "a.pt", archive(state_dict(*[HONEST] * 3000)))
    info = inspect_checkpoint(path)
    assert len(info.tensors[0].tied) == 2999
    assert info.tensors[7].tied == ("w0",)
    assert len(info.to_json()) < 500_000
    report = convert_checkpoint(path, tmp_path / "a.safetensors")
    assert report.ok
    assert max(map(len, report.notes)) < 200


# ---- names


@pytest.mark.parametrize("name", [ESCAPES, "", "n" * 60_000, "../../etc/passwd", "/etc/passwd"])
@pytest.mark.parametrize("ending", ["safetensors", "ckpt", "pth", "pkl"])
def test_any_name_that_is_text_is_kept(tmp_path, name, ending):
    path = made(tmp_path, "a.pt", archive(state_dict(HONEST, names=[name])))
    target = tmp_path / f"b.{ending}"
    assert convert_checkpoint(path, target).ok
    with open_checkpoint(target) as file:
        assert list(file) == [name]
    assert fingerprint(target) == fingerprint(path)


# ---- safetensors


@pytest.mark.parametrize(
    "kept", ['{"x":' + "[" * 500 + "]" * 500 + "}", '{"x": "\\ud800"}', '{"\\ud800": 1}', '{"x": [{"\\udc00": 1}]}']
)
def test_objects_that_no_format_could_hold(tmp_path, kept):
    header = {"__metadata__": {"mhabridge.objects": kept}, "a": at([16], 0, 64)}
    refused(made(tmp_path, "a.safetensors", safetensors(header, NUMBERS)), "objects")


def test_metadata_that_is_no_text(tmp_path):
    header = b'{"__metadata__":{"x":"\\ud800"},"a":{"dtype":"F32","shape":[16],"data_offsets":[0,64]}}'
    refused(made(tmp_path, "a.safetensors", safetensors(header, NUMBERS)), "no text")


def test_a_checksum_of_thousands_of_digits(tmp_path):
    header = {"__metadata__": {"crc_num": "9" * 100_000}, "a": at([16], 0, 64)}
    with pytest.raises(CheckpointError):
        convert_checkpoint(made(tmp_path, "a.safetensors", safetensors(header, NUMBERS)), tmp_path / "b.npz")


def test_a_header_of_millions_of_lists(tmp_path):
    header = b'{"a":[' + b"[]," * 5_000_000 + b"[]]}"
    path = made(tmp_path, "a.safetensors", safetensors(header))
    refused(path, "values")
    assert mebibytes(path) < 100


# ---- .ckpt


def test_thousands_of_unknown_fields_make_few_notes(tmp_path):
    entry = head_of("a", (16,), "Float32", 64) + NUMBERS
    fields = b"".join(bytes([0x80 | (n & 15) << 3, 0x80 | n >> 4 & 0x7F, n >> 11, 1]) for n in range(1 << 11, 1 << 14))
    with open_checkpoint(made(tmp_path, "a.ckpt", entry + fields)) as file:
        assert list(file) == ["a"]
        assert 1 < len(file.notes) < 50


def test_a_type_of_thousands_of_characters_makes_no_such_message(tmp_path):
    message = refused(
        made(tmp_path, "a.ckpt", head_of("a", (16,), ESCAPES * 5000, 64) + NUMBERS), "dequantised|name of"
    )
    assert len(message) < 10_000


# ---- what lies beside


@pytest.fixture
def attention(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, **{"in_proj_weight": np.ones((12, 4), "f4"), "out_proj.weight": np.ones((4, 4), "f4")})
    return path


@pytest.mark.parametrize("name", ["config.json", "a.npz.mhabridge.json"])
@pytest.mark.parametrize(
    "content",
    [
        b"[" * 200_000,
        b"[" + b"[]," * 3_000_000 + b"[]]",
        b'{"a": ' + b"9" * 10_000 + b"}",
        b'{"x": "' + b"x" * (17 << 20) + b'"}',
        bytes(range(256)),
    ],
)
def test_a_hostile_file_beside_the_checkpoint(attention, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    # With the number of heads given, nobody needs a config.json, and a broken one is only spoken of.
    heads = None if name == "config.json" else 2
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        convert_checkpoint(attention, tmp_path / "b.ckpt", to="mindspore", num_heads=heads)
    info = inspect_checkpoint(attention)
    assert len(info.to_json()) < 10_000


@pytest.mark.parametrize("name", ["config.json", "a.npz.mhabridge.json"])
def test_no_file_beside_the_checkpoint(attention, tmp_path, name):
    """A pipe or a link to a device is not opened: it would never end."""
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path.name)):
        make(tmp_path / name)
        assert inspect_checkpoint(attention).blocks
        (tmp_path / name).unlink()


# ---- sources and targets that are no files


def test_sources_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    for source in (tmp_path / "pipe.pt", tmp_path, "/dev/zero", "/dev/null", "a\0b", "n" * 300, "", "/proc/self/mem"):
        for use in (inspect_checkpoint, fingerprint, lambda path: convert_checkpoint(path, tmp_path / "b.npz")):
            with pytest.raises(CheckpointError):
                use(source)
    assert not (tmp_path / "b.npz").exists()


@pytest.mark.parametrize("force", [False, True])
def test_targets_that_are_no_files(attention, tmp_path, force):
    (tmp_path / "real.pkl").write_bytes(b"old")
    (tmp_path / "link.pkl").symlink_to("real.pkl")
    (tmp_path / "dangling.pkl").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "folder.pkl").mkdir()
    os.mkfifo(tmp_path / "pipe.pkl")
    before = sorted(path.name for path in tmp_path.iterdir())
    names = ["link.pkl", "dangling.pkl", "folder.pkl", "pipe.pkl", "none/x.pkl", "a\0.pkl", "n" * 300 + ".pkl"]
    for target in (*(f"{tmp_path}/{name}" for name in names), "/dev/full", "/dev/full/x.pkl", "/proc/x.pkl", ""):
        with pytest.raises(CheckpointError):
            convert_checkpoint(attention, target, to="torch", force=force)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (tmp_path / "real.pkl").read_bytes() == b"old"


def test_a_link_where_what_travels_beside_would_lie(attention, tmp_path):
    """An old target's facts must not stay beside the new one; nor is a link followed to replace them."""
    (tmp_path / "b.pkl.mhabridge.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="a link"):
        convert_checkpoint(attention, tmp_path / "b.pkl", force=True)
    assert not (tmp_path / "elsewhere").exists()


@pytest.fixture
def source(tmp_path):
    header = {name: at([1 << 20], index << 22, (index + 1) << 22) for index, name in enumerate("ab")}
    return made(tmp_path, "a.safetensors", safetensors(header, np.arange(1 << 21, dtype="f4").tobytes()))


def test_a_source_that_shrinks_while_it_is_read(source, tmp_path):
    with pytest.raises(CheckpointError, match=r"shorter|ends too early"):
        convert_checkpoint(source, tmp_path / "b.npz", progress=lambda done, total: os.truncate(source, 1000))
    assert not (tmp_path / "b.npz").exists()


def test_a_source_that_changes_while_it_is_read(source, tmp_path):
    def disturb(done, total):
        with source.open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(os.urandom(4))

    assert convert_checkpoint(source, tmp_path / "b.npz", progress=disturb).verified is False
    assert not (tmp_path / "b.npz").exists()


@pytest.mark.parametrize(("ending", "most"), [("pkl", 1500), ("pt", 1800), ("safetensors", 880)])
def test_an_empty_tensor_takes_little_memory(tmp_path, ending, most):
    """A few bytes of a hostile file are a tensor: a quarter of a million of them must not fill the memory."""
    count, (module,) = 4000, [one for one in FORMATS if f".{ending}" in one.endings]
    tensors = [Outgoing(f"layer.{number}.weight", "float32", (0,), lambda sink: None) for number in range(count)]
    with (tmp_path / f"a.{ending}").open("wb") as file:
        module.write(Sink(file.fileno()), tensors)
    open_checkpoint(tmp_path / f"a.{ending}").close()
    tracemalloc.start()
    try:
        with open_checkpoint(tmp_path / f"a.{ending}") as file:
            assert len(file) == count
            assert tracemalloc.get_traced_memory()[1] / count < most
    finally:
        tracemalloc.stop()


def test_nothing_of_a_refused_file_stays_in_memory(tmp_path):
    """Names of 64 KiB, each of which is asked for once."""
    letters = "x" * 60_000
    asked = b"".join(pickle.dumps(f"{n}{letters}", 4)[11:-1] * 2 + b"\x93" for n in range(100))
    (tmp_path / "a.pkl").write_bytes(b"\x80\x04(" + asked + b"t.")
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        with pytest.raises(CheckpointError, match="asks for"):
            open_checkpoint(tmp_path / "a.pkl")
        assert tracemalloc.get_traced_memory()[0] - before < 1_000_000
    finally:
        tracemalloc.stop()
