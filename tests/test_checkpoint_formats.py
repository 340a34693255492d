"""Opening any checkpoint by its content, and that large files take little memory whatever their format."""

from __future__ import annotations

import os
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest

from mhabridge.checkpoint.formats.known import FORMATS, by_name, open_checkpoint
from mhabridge.checkpoint.storage.stored import StoredObject
from mhabridge.checkpoint.storage.writing import Outgoing, passed_through
from mhabridge.errors import CheckpointError
from tests.checkpoint_files import assert_holds, outgoing, written

CONTENT = {"a.weight": ("float32", np.arange(6).reshape(2, 3)), "a.bias": ("float16", np.ones(2))}
TENSORS = [outgoing(name, dtype, values) for name, (dtype, values) in CONTENT.items()]
WRITERS = [found for found in FORMATS if found.write]


def file_of(folder: pathlib.Path, found, name: str | None = None, **options) -> pathlib.Path:
    return written(folder / (name or f"model{found.endings[0]}"), found, TENSORS, **options)


@pytest.mark.parametrize("found", WRITERS, ids=lambda found: found.name)
def test_each_format_is_opened_by_its_content(tmp_path, found):
    with open_checkpoint(file_of(tmp_path, found)) as opened:
        assert_holds(opened, CONTENT)
        assert not opened.notes
    for name in ("model", "model.txt"):
        with open_checkpoint(file_of(tmp_path, found, name)) as opened:
            assert_holds(opened, CONTENT)
            assert not opened.notes


@pytest.mark.parametrize("found", WRITERS, ids=lambda found: found.name)
@pytest.mark.parametrize("other", WRITERS, ids=lambda found: found.name)
def test_a_wrong_name_is_a_note(tmp_path, found, other):
    name = f"model{other.endings[0]}"
    with open_checkpoint(file_of(tmp_path, found, name)) as opened:
        assert_holds(opened, CONTENT)
        expected = () if found is other else (f"{name} is a {found.name} file by its content, whatever its name says.",)
        assert opened.notes == expected


@pytest.mark.parametrize("source", WRITERS, ids=lambda found: found.name)
@pytest.mark.parametrize("target", WRITERS, ids=lambda found: found.name)
def test_every_format_becomes_every_other(tmp_path, source, target):
    with open_checkpoint(file_of(tmp_path, source, "source")) as opened:
        tensors = [passed_through(opened, tensor, name) for name, tensor in opened.items()]
        with open_checkpoint(written(tmp_path / "target", target, tensors)) as again:
            assert_holds(again, CONTENT)


@pytest.mark.parametrize("found", WRITERS, ids=lambda found: found.name)
@pytest.mark.parametrize(
    "entry",
    [
        StoredObject("epoch", "3", 3),
        StoredObject("name", "x", "x"),
        StoredObject("none", "None"),
        StoredObject("betas", "a list of 1 entries", [1]),
        StoredObject("x", "a Point", inert=("shapes.Point",)),
        StoredObject("optimizer", "a dict of 2 entries"),
    ],
    ids=lambda entry: entry.name,
)
def test_a_format_writes_just_the_objects_that_it_says(tmp_path, found, entry):
    if not found.holds(entry):
        with pytest.raises(CheckpointError, match=entry.name):
            file_of(tmp_path, found, objects=[entry])
        return
    with open_checkpoint(file_of(tmp_path, found, objects=[entry])) as opened:
        if entry.name in opened:  # a number in a format of tensors only
            assert opened.read(entry.name) == entry.value
        else:
            assert [(kept.name, kept.value) for kept in opened.objects] == [(entry.name, entry.value)]


def test_names_say_the_format():
    assert by_name("a.safetensors").name == "safetensors"
    assert by_name("a.PT").name == by_name("pytorch_model.bin").name == by_name("a.pth.tar").name == "torch"
    assert by_name("a.index.json").name == "sharded"
    assert by_name("a.json") is None
    endings = [ending for found in FORMATS for ending in found.endings]
    assert len(set(endings)) == len(endings)


def test_a_legacy_file_of_pytorch_under_any_name(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed here")
    for name in ("a.pt", "a.pkl", "a"):
        torch.save({"a": torch.ones(2)}, tmp_path / name, _use_new_zipfile_serialization=False)
        with open_checkpoint(tmp_path / name) as opened:
            assert opened.format == "torch-legacy"
            assert_holds(opened, {"a": ("float32", np.ones(2))})


def test_a_plain_pickle_is_megengines(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": np.arange(3, dtype="float32")}, protocol=4))
    with open_checkpoint(tmp_path / "a.pkl") as opened:
        assert_holds(opened, {"a": ("float32", np.arange(3))})


@pytest.mark.parametrize("content", [b"", b"nothing", bytes(600), b"\x89HDF\r\n\x1a\n"])
def test_other_content_without_a_known_name_is_refused(tmp_path, content):
    (tmp_path / "a.h5").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"named \.h5, whose content says nothing either"):
        open_checkpoint(tmp_path / "a.h5")


@pytest.mark.parametrize("content", [b"", b"nothing", bytes(600)])
@pytest.mark.parametrize("ending", [ending for found in FORMATS for ending in found.endings])
def test_other_content_with_a_known_name_is_refused(tmp_path, content, ending):
    (tmp_path / f"a{ending}").write_bytes(content)
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / f"a{ending}")


# -- memory ------------------------------------------------------------------------------------------------------------

# What it costs to open a file, to read it through and write it (to where nothing is kept), and to transpose a matrix.
PEAK = """
import os, sys
import numpy
from mhabridge.checkpoint.formats.known import FORMATS, open_checkpoint
from mhabridge.checkpoint.storage.transposing import transposed
from mhabridge.checkpoint.storage.writing import Sink, passed_through
def peak():  # getrusage would also count what the parent had when it started this process
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
before = peak()
nowhere = os.open("/dev/null", os.O_WRONLY)
(target,) = [found for found in FORMATS if found.name == sys.argv[2]]
with open_checkpoint(sys.argv[1]) as file:
    opened = peak()
    sink = Sink(nowhere)
    target.write(sink, [passed_through(file, tensor, name) for name, tensor in file.items()])
    total = sum(len(piece) for tensor in file.values() for piece in file.chunks(tensor))
    assert sink.position > total >= 2**28, (sink.position, total)
    read = peak()
    for name in sys.argv[3:]:
        transposed(file, file[name], name).write_to(Sink(nowhere))
print((opened - before) // 1024, (read - before) // 1024, (peak() - before) // 1024)
"""


def hole(sink, count: int) -> None:
    """Zeros that take no room on the disk."""
    os.ftruncate(sink.descriptor, sink.position + count)
    os.lseek(sink.descriptor, count, os.SEEK_CUR)
    sink.position += count


def zeros(sink, count: int) -> None:
    """Zeros for a format that sums up or cuts what it writes."""
    for _ in range(count >> 20):
        sink.write(bytes(1 << 20))


def large(name: str, shape: tuple[int, ...], emit) -> Outgoing:
    return Outgoing(name, "float32", shape, lambda sink: emit(sink, 4 * int(np.prod(shape))))


def peaks(file: pathlib.Path, *arguments: str) -> list[int]:
    """MiB above what the interpreter and its modules take."""
    code = [sys.executable, "-c", PEAK, str(file), *arguments]
    done = subprocess.run(code, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    return [int(part) for part in done.stdout.split()]


@pytest.mark.parametrize("found", WRITERS, ids=lambda found: found.name)
def test_a_large_file_is_opened_read_and_written_in_little_memory(tmp_path, found):
    looks_at_bytes = found.name in ("npz", "torch", "mindspore-ckpt")
    size, emit = (2**26, zeros) if looks_at_bytes else (2**28, hole)  # 256 MiB, or a GiB
    tensors = [large("a", (size // 2,), emit), large("b", (size // 4, 2), emit)]
    opened, read, _ = peaks(written(tmp_path / "a", found, tensors), found.name)
    assert opened < 8
    assert read < 16


def test_a_large_matrix_is_transposed_in_its_own_size_and_a_little_more(tmp_path):
    safetensors = FORMATS[0]
    tensors = [large("a", (2**27,), hole), large("b", (4096, 4096), hole)]
    *_, turned = peaks(written(tmp_path / "a", safetensors, tensors), safetensors.name, "b")
    assert 60 < turned < 64 + 16
