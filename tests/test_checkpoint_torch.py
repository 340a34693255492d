"""PyTorch's checkpoints: files of two real PyTorchs, round trips through both, and damaged or hostile archives."""

from __future__ import annotations

import collections
import os
import pickle
import struct
import warnings
import zipfile
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mhabridge.checkpoint.conversion import convert_checkpoint
from mhabridge.checkpoint.formats import torch_legacy, torch_writer, torch_zip, zip_writer, zips
from mhabridge.checkpoint.formats.known import open_checkpoint
from mhabridge.checkpoint.inspection import inspect_checkpoint
from mhabridge.checkpoint.pickled import emitting
from mhabridge.checkpoint.storage.stored import StoredObject
from mhabridge.checkpoint.storage.writing import Outgoing, Sink, passed_through
from mhabridge.errors import CheckpointError
from tests.checkpoint_files import GOLDEN, PRINT_ARRAYS, assert_holds, assert_shown, outgoing, run_in, written
from tests.golden import expected

VERSIONS = ("1.8.1", "2.13.0")
DTYPES = ("float32", "float64", "float16", "bfloat16", "int8", "int16", "int32", "int64", "uint8", "bool")


@pytest.fixture(scope="session")
def torch():
    return pytest.importorskip("torch", reason="PyTorch is not installed here")


def read(path, nested=None):
    with path.open("rb") as file:
        module = torch_legacy if torch_legacy.sniff(file.read(512)) else torch_zip
    return module.read(path, nested)


# ---- golden files


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("form", ["state", "legacy"])
def test_state_dicts_of_real_pytorchs(version, form):
    with read(GOLDEN / f"torch{version}-{form}.pt") as file:
        assert_holds(file, expected.STATE)
        assert {name for name in file if file[name].storage == file["weight"].storage} == set(expected.TIES)
        assert (file["transposed"].strides, file["rows"].start, file["rows"].strides) == ((1, 4), 4, None)
        assert file.objects == ()
        assert file.nested == ()


@pytest.mark.parametrize("version", VERSIONS)
def test_nested_checkpoints_of_real_pytorchs(version):
    with read(GOLDEN / f"torch{version}-nested.pt") as file:
        assert_holds(file, expected.NESTED)
        assert file.nested == ("state_dict",)
        found = {entry.name: entry for entry in file.objects}
        plain = {name: entry.value for name, entry in found.items() if entry.value is not None}
        assert plain == {"epoch": expected.EPOCH, "best": expected.BEST, "betas": expected.BETAS, "run": expected.RUN}
        assert "tensors" in found["optimizer"].text
        assert found["random_state"].text == "a uint8 tensor of shape (8,)"
        assert not any(entry.inert for entry in file.objects)


@pytest.mark.parametrize("version", VERSIONS)
def test_an_unknown_object_beside_the_tensors_is_listed_with_its_name(version):
    with read(GOLDEN / f"torch{version}-namespace.pt") as file:
        assert_holds(file, expected.NESTED)
        assert [entry.inert for entry in file.objects if entry.inert] == [("argparse.Namespace",)]


@pytest.mark.parametrize("version", VERSIONS)
def test_whole_modules_of_real_pytorchs(version):
    with read(GOLDEN / f"torch{version}-module.pt") as file:
        assert "norm.num_batches_tracked" in file
        assert "transient" not in file
        table = {name: file[name] for name in expected.MODULE}
        assert sorted(set(file) - set(table)) == ["norm.num_batches_tracked", "norm.running_var"]
        for name, (_, values) in expected.MODULE.items():
            np.testing.assert_array_equal(file.read(name), values)
        assert file.objects[0].inert[0] == "__main__.Net"
        assert "as a whole" in file.notes[0]


def test_tensors_in_untyped_storages():
    with read(GOLDEN / "torch2.13.0-untyped.pt") as file:
        assert file.read("uint16").tolist() == [0, 1, 2]
        assert file["float8"].dtype == "float8_e5m2"
        assert file.words(file["float8"]).tolist() == [0x3C, 0x3C]


# ---- round trips


def state(torch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = collections.OrderedDict()
    for number, dtype in enumerate(DTYPES):
        values = torch.randint(-100, 100, (number + 1, 3), generator=generator).to(getattr(torch, dtype))
        found[f"layer.{dtype}"] = values
        found[f"layer.{dtype}.t"] = values.t()
    return found


def bits(tensor):
    """A tensor's bits, which NumPy may not know, in C order."""
    torch = pytest.importorskip("torch")
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_equals_torch(file, tensors):
    assert list(file) == list(tensors)
    for name, tensor in tensors.items():
        assert file[name].dtype == str(tensor.dtype).removeprefix("torch.")
        assert file[name].shape == tuple(tensor.shape)
        assert file.words(file[name]).tobytes() == bits(tensor), name


TENSORS = st.tuples(
    st.sampled_from([*DTYPES, "uint16", "uint32", "uint64", "complex64", "complex128"]),
    st.lists(st.integers(0, 4), max_size=4),
    st.sampled_from(["plain", "transposed", "sliced", "parameter", "tied"]),
)


@pytest.mark.frameworks
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(
    kinds=st.lists(TENSORS, max_size=5), zipped=st.booleans(), nested=st.booleans(), protocol=st.sampled_from([2, 4])
)
def test_we_read_what_torch_load_reads(torch, tmp_path, kinds, zipped, nested, protocol):
    tensors = {}
    for number, (dtype, shape, how) in enumerate(kinds):
        if dtype.startswith("uint") and not zipped:
            dtype = "uint8"  # torch.load cannot read its own files of the others in this form (2.13)
        tensor = torch.arange(int(np.prod(shape)) * 2).reshape([*shape, 2]).to(getattr(torch, dtype))
        if how == "transposed":
            tensor = tensor.transpose(0, -1)
        elif how == "sliced":
            tensor = tensor[..., 1:]
        elif how == "parameter":
            tensor = torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
        elif how == "tied" and tensors:
            tensor = next(iter(tensors.values()))
        tensors[f"t{number}"] = tensor
    content = {"state_dict": tensors, "epoch": 1} if nested and tensors else tensors
    path = tmp_path / "file.pt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    loaded = torch.load(path, weights_only=protocol == 2)
    with read(path) as file:
        assert_equals_torch(file, loaded["state_dict"] if content is not tensors else loaded)


@pytest.mark.frameworks
@pytest.mark.parametrize("nested", [(), ("state_dict",), ("a", "b")])
def test_torch_loads_what_we_write(torch, tmp_path, nested):
    torch.save(state(torch), tmp_path / "source.pt")
    beside = "".join(f"{key}." for key in nested)
    objects = [StoredObject(f"{beside}step", "7", 7)] if nested else []
    objects += [StoredObject("epoch", "3", 3), StoredObject("deep", "", {"a": [1.5, None, True], "b": -(2**50)})]
    with read(tmp_path / "source.pt") as file:
        tensors = [passed_through(file, file[name], name) for name in file]
        written(tmp_path / "target.pt", torch_zip, tensors, objects, None, nested)
    with read(tmp_path / "target.pt", nested) as file:
        assert_equals_torch(file, state(torch))
    for how in ({}, {"mmap": True}):
        loaded = torch.load(tmp_path / "target.pt", weights_only=True, **how)
        assert (loaded.pop("epoch"), loaded.pop("deep")) == (3, {"a": [1.5, None, True], "b": -(2**50)})
        for key in nested:
            loaded = loaded[key]
        assert loaded.pop("step", 7) == 7
        assert list(loaded) == list(state(torch))
        assert all(torch.equal(loaded[name], tensor) for name, tensor in state(torch).items())


@pytest.mark.frameworks
def test_torch_finds_the_storages_by_computing(torch, tmp_path, monkeypatch):
    """``calculate_storage_offsets`` relies on the padding and the descriptors; with this variable it checks itself."""
    monkeypatch.setenv("TORCH_SERIALIZATION_DEBUG", "1")
    tensors = [outgoing(f"w{n}", "float32", np.arange(float(n))) for n in (3, 1, 0, 64, 5)]
    path = written(tmp_path / "file.pt", torch_zip, tensors)
    for mmap in (True, False):
        with torch.utils.serialization.config.patch({"load.calculate_storage_offsets": True}):
            loaded = torch.load(path, weights_only=True, mmap=mmap)
        assert [tensor.tolist() for tensor in loaded.values()] == [list(range(n)) for n in (3, 1, 0, 64, 5)]


@pytest.mark.frameworks
def test_tied_tensors_share_a_storage(torch, tmp_path):
    tensors = [outgoing("a", "float32", expected.matrix(), "x"), outgoing("b", "float32", expected.matrix(), "x")]
    tensors += [
        outgoing("c", "float32", expected.matrix().reshape(12), "x"),
        outgoing("d", "float32", expected.matrix()),
    ]
    loaded = torch.load(written(tmp_path / "file.pt", torch_zip, tensors), weights_only=True)
    pointers = [loaded[name].data_ptr() for name in "abcd"]
    assert len({*pointers[:3]}) == 1
    assert pointers[3] != pointers[0]
    with read(tmp_path / "file.pt") as file:
        assert len({file[name].storage for name in "abc"}) == 1


@pytest.mark.frameworks
def test_untyped_dtypes_are_written_for_new_pytorchs(torch, tmp_path):
    with read(GOLDEN / "torch2.13.0-untyped.pt") as file:
        path = written(tmp_path / "file.pt", torch_zip, [passed_through(file, file[name], name) for name in file])
    loaded = torch.load(path, weights_only=True)
    assert loaded["uint16"].dtype == torch.uint16
    assert loaded["float8"].float().tolist() == [1.0, 1.0]


READ_181 = (
    PRINT_ARRAYS
    + """
import sys, torch
loaded = torch.load(sys.argv[1])
assert loaded["epoch"] == 3
state = loaded["state_dict"]
assert state["weight"].data_ptr() == state["tied"].data_ptr()
state["bfloat"] = state["bfloat"].float()
show({name: tensor.detach().numpy() for name, tensor in state.items()})
"""
)


@pytest.mark.frameworks
def test_pytorch_1_8_1_loads_what_we_write(tmp_path):
    with read(GOLDEN / "torch1.8.1-state.pt") as file:
        tensors = [passed_through(file, file[name], name) for name in file]
        path = written(tmp_path / "file.pt", torch_zip, tensors, [StoredObject("epoch", "3", 3)], None, ("state_dict",))
    table = {**expected.STATE, "bfloat": ("float32", expected.STATE["bfloat"][1])}
    assert_shown(run_in("torch@1.8.1", READ_181, path), table)


def test_python_reads_the_archive_and_finds_its_checksums_right(tmp_path):
    tensors = [outgoing("w", "float32", expected.matrix()), outgoing("e", "float32", np.zeros(0))]
    with zipfile.ZipFile(written(tmp_path / "file.pt", torch_zip, tensors)) as archive:
        assert archive.testzip() is None
        assert archive.read("archive/data/0") == expected.matrix().astype("f4").tobytes()
        assert archive.read("archive/version") == b"3\n"


@pytest.mark.parametrize("size", [0, 1, 2**32 - 2, 2**32 - 1, 2**32, 2**40])
@pytest.mark.parametrize("header", [0, 1000, 2**32 - 2, 2**32 - 1, 2**33 + 7])
def test_headers_beyond_4_gib(size, header):
    """Nothing is written: the header of a member says where its bytes would start, in 32 or in 64 bits."""
    found = zip_writer.local_header(b"archive/data/7", 0x808, size, header)
    assert (header + len(found)) % 64 == 0
    name, extra = struct.unpack_from("<2H", found, 26)
    assert 30 + name + extra == len(found)
    wide = found[30 + name : 30 + name + 4] if size >= 2**32 - 1 or header >= 2**32 - 1 else b""
    assert wide[:2] == (b"\1\0" if wide else b"")


class Hollow(Sink):
    """A sink that leaves a hole where large members would be."""

    def reserve(self, length: int) -> None:
        """The room is not wanted."""

    def hole(self, length: int) -> None:
        self._advance(length)


@pytest.mark.parametrize("sizes", [(2**32 + 8, 16), (2**31, 2**31, 2**31, 8)])
def test_an_archive_beyond_4_gib_is_read_by_us_and_by_python(tmp_path, sizes):
    """A sparse file: the holes take no room, so their checksums are not those of zeros."""
    path = tmp_path / "large.pt"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    sink = Hollow(descriptor)
    torch_zip.write(
        sink,
        [Outgoing(f"w{n}", "float32", (size // 4,), lambda s, size=size: s.hole(size)) for n, size in enumerate(sizes)],
    )
    os.close(descriptor)
    assert path.stat().st_blocks * 512 < 1 << 20
    with read(path) as file:
        assert [file[name].nbytes for name in file] == list(sizes)
        starts = [file[name].extents[0].offset for name in file]
    with zipfile.ZipFile(path) as archive:
        infos = [archive.getinfo(f"archive/data/{number}") for number in range(len(sizes))]
        assert [info.file_size for info in infos] == list(sizes)
        assert all(start % 64 == 0 and start > info.header_offset for start, info in zip(starts, infos, strict=True))


@pytest.mark.frameworks
def test_torch_maps_an_archive_beyond_4_gib(torch, tmp_path):
    descriptor = os.open(tmp_path / "large.pt", os.O_WRONLY | os.O_CREAT)
    large = Outgoing("large", "float32", (2**30 + 2,), lambda sink: sink.hole(2**32 + 8))
    torch_zip.write(Hollow(descriptor), [large, outgoing("small", "float32", expected.matrix())])
    os.close(descriptor)
    loaded = torch.load(tmp_path / "large.pt", weights_only=True, mmap=True)
    assert loaded["large"].shape == (2**30 + 2,)
    np.testing.assert_array_equal(loaded["small"].numpy(), expected.matrix())


def test_many_members_take_the_64_bit_index(tmp_path):
    path = archive_of([(f"archive/data/{number}", b"") for number in range(66_000)], tmp_path / "many.pt")
    with path.open("rb") as file:
        members = zips.Archive(file.fileno(), path).members
    with zipfile.ZipFile(path) as archive:
        assert list(members) == archive.namelist()
        assert len(members) == 66_000


# ---- what the writer refuses


def test_the_writer_refuses_what_would_be_lost(tmp_path):
    tensor = outgoing("w", "float32", expected.matrix())
    for tensors, objects in (
        ([tensor, tensor], []),
        ([tensor], [StoredObject("w", "3", 3)]),
        ([tensor], [StoredObject("optimizer", "a dict of 2 entries")]),
        ([tensor], [StoredObject("args", "an object", inert=("argparse.Namespace",))]),
    ):
        with pytest.raises(CheckpointError):
            written(tmp_path / "file.pt", torch_zip, tensors, objects)


# ---- kinds that are refused by what they are


@pytest.mark.frameworks
def test_tensors_that_are_no_plain_numbers_are_refused_by_name(torch, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kinds = {
            "sparse": torch.ones(2, 2).to_sparse(),
            "quantised": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
            "meta": torch.ones(2, device="meta"),
        }
    for word, tensor in kinds.items():
        torch.save({"w": torch.ones(1), "odd": tensor}, tmp_path / "file.pt")
        with pytest.raises(CheckpointError, match=rf"odd.*({word})"):
            read(tmp_path / "file.pt")


@pytest.mark.frameworks
def test_views_that_are_not_stored_as_they_are_read_can_be_left_out(torch, tmp_path):
    source, target = tmp_path / "file.pt", tmp_path / "file.safetensors"
    views = {
        r"conjugates or negates.*resolve_conj\(\)": torch.tensor([1 + 2j]).conj(),
        r"conjugates or negates.*resolve_neg\(\)": torch.tensor([1 + 2j]).conj().imag,
        "expanded view.*contiguous": torch.ones(1).expand(5 << 20),
    }
    for what, view in views.items():
        torch.save({"w": torch.ones(1), "odd": view}, source)
        with read(source) as file:
            assert file.read("w") == 1
            assert noted(source).startswith("odd: a")
            assert what.partition(".*")[0] in noted(source)
            with pytest.raises(CheckpointError, match=rf"file\.pt: odd: given .*{what}"):
                file.read("odd")
            with pytest.raises(CheckpointError, match="odd"):
                list(file.chunks(file["odd"]))
        with pytest.raises(CheckpointError, match=rf"odd: given .*{what}.*--drop"):
            convert_checkpoint(source, target)
        assert not target.exists()
        assert convert_checkpoint(source, target, drop=["odd"]).verified
        target.unlink()


def noted(path) -> str:
    return "\n".join(inspect_checkpoint(path).notes)


@pytest.mark.frameworks
@pytest.mark.parametrize("ending", [".pth", ".safetensors", ".ckpt", ".pkl", ".npz"])
def test_small_expanded_views_are_written_out(torch, tmp_path, ending):
    rows = torch.arange(3.0)
    state = {
        "rows": rows.expand(5, 3),
        "columns": rows.reshape(3, 1).expand(3, 4),
        "one": torch.tensor(7.0).expand(2, 3, 4),
        "windows": torch.arange(6.0).unfold(0, 4, 1).t(),
        "proj.weight": rows.expand(2, 3),
        "proj.bias": torch.ones(1).expand(2),
    }
    torch.save(state, tmp_path / "file.pt")
    for to in (None, "torch"):
        assert convert_checkpoint(tmp_path / "file.pt", tmp_path / f"a{ending}", to=to, force=True).verified
        with open_checkpoint(tmp_path / f"a{ending}") as file:
            for name, value in state.items():
                np.testing.assert_array_equal(file.read(name), value.numpy())
    assert "expanded" not in noted(tmp_path / "file.pt")


@pytest.mark.frameworks
def test_only_some_expanded_views_are_read(torch, tmp_path):
    rows = torch.arange(3.0)
    state = {f"w{n}": rows.expand(1 << 20, 3) for n in range(3)}  # 12 MiB each
    torch.save(state, tmp_path / "file.pt")
    assert "w1, w2: an expanded view" in noted(tmp_path / "file.pt")
    with read(tmp_path / "file.pt") as file:
        assert file.read("w0").shape == (1 << 20, 3)
        with pytest.raises(CheckpointError, match="w1: given an expanded view"):
            file.read("w1")


@pytest.mark.frameworks
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_the_versions_of_modules_are_kept_where_nothing_is_renamed(torch, tmp_path, nested, zipped):
    state = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)).state_dict()
    source, target = tmp_path / "a.pth", tmp_path / "b.pth"
    torch.save({"model": state, "epoch": 3} if nested else state, source, _use_new_zipfile_serialization=zipped)
    for to, goal in ((None, target), ("torch", target), (None, source)):
        report = convert_checkpoint(source, goal, to=to, force=True)
        assert report.verified
        assert not any("_metadata" in note for note in report.notes)
        found = torch.load(goal, weights_only=True)
        found = found["model"] if nested else found
        assert found._metadata == state._metadata
        assert found.keys() == state.keys()
    with read(source) as file:
        assert not file.notes


@pytest.mark.frameworks
def test_versions_of_modules_that_are_lost_are_told_and_never_in_place(torch, tmp_path):
    source = tmp_path / "a.pth"
    torch.save(torch.nn.BatchNorm1d(2).state_dict(), source)
    before = source.read_bytes()
    for name, options in (("b.npz", {}), ("b.pth", {"rename": "*=m.*"}), ("c.pth", {"to": "mindspore"}), ("b.pkl", {})):
        report = convert_checkpoint(source, tmp_path / name, **options)
        assert "The versions of module classes (PyTorch's _metadata) are not kept." in report.notes
        if name.endswith(".pth"):
            assert not hasattr(torch.load(tmp_path / name, weights_only=True), "_metadata")
            with pytest.raises(CheckpointError, match=r"the source itself, without .*_metadata"):
                convert_checkpoint(source, source, force=True, **options)
    assert source.read_bytes() == before
    torch.save({"a": torch.nn.BatchNorm1d(2).state_dict(), "b": torch.nn.BatchNorm1d(2).state_dict()}, source)
    with read(source, ()) as file:
        assert [note for note in file.notes if "_metadata) of a part" in note]
    torch.save({"w": torch.ones(1)}, source)
    assert not convert_checkpoint(source, tmp_path / "d.npz").notes


@pytest.mark.frameworks
def test_other_versions_are_noticed(torch, tmp_path, monkeypatch):
    torch.save(torch.nn.BatchNorm1d(2).state_dict(), tmp_path / "a.pth")
    monkeypatch.setattr(torch_writer.versions, "attribute", lambda text: b"")
    report = convert_checkpoint(tmp_path / "a.pth", tmp_path / "b.pth")
    assert not report.ok
    assert "other versions of module classes" in report.notes[-1]


@pytest.mark.frameworks
def test_tensors_and_parameters_with_attributes_are_read(torch, tmp_path):
    parameter, tensor = torch.nn.Parameter(torch.ones(2)), torch.arange(3.0)
    parameter.sharded, tensor.note = True, "x"
    torch.save({"p": parameter, "t": tensor}, tmp_path / "file.pt")
    with read(tmp_path / "file.pt") as file:
        assert_holds(file, {"p": ("float32", np.ones(2)), "t": ("float32", np.arange(3))})
        assert "attributes" in file.notes[0]


@pytest.mark.frameworks
def test_a_tensor_of_a_subclass_is_refused_by_name(torch, tmp_path, monkeypatch):
    odd = type("Odd", (torch.Tensor,), {"__module__": __name__})
    monkeypatch.setitem(globals(), "Odd", odd)  # where torch.save looks for it
    torch.save({"w": torch.ones(2), "odd": torch.ones(2).as_subclass(odd)}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=r"odd.*of the class .*Odd"):
        read(tmp_path / "file.pt")


@pytest.mark.frameworks
def test_programs_are_refused_by_what_they_are(torch, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
        torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),)), tmp_path / "program.pt2")
    for name, word in (("script.pt", "TorchScript"), ("program.pt2", r"torch\.export")):
        assert torch_zip.is_ours(tmp_path / name)
        with pytest.raises(CheckpointError, match=word):
            read(tmp_path / name)


def repacked(path, change):
    """The members of a golden archive, packed again by Python after a change."""
    with zipfile.ZipFile(GOLDEN / "torch2.13.0-state.pt") as source:
        members = {name: source.read(name) for name in source.namelist()}
    method = change(members) or zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", method) as target:
        for name, data in members.items():
            target.writestr(name, data)
    return path


PREFIX = "torch2.13.0-state/"


def test_an_archive_packed_again_is_read(tmp_path):
    with read(repacked(tmp_path / "file.pt", lambda members: None)) as file:
        assert_holds(file, expected.STATE)


def test_a_folder_of_any_name_or_none(tmp_path):
    def rename(members):
        for name in list(members):
            members[name.removeprefix(PREFIX)] = members.pop(name)

    with read(repacked(tmp_path / "file.pt", rename)) as file:
        assert_holds(file, expected.STATE)


def test_big_endian_storages(tmp_path):
    def swap(members):
        members[PREFIX + "byteorder"] = b"big"
        weight = np.frombuffer(members[PREFIX + "data/0"], "<f4")
        members[PREFIX + "data/0"] = weight.astype(">f4").tobytes()

    with read(repacked(tmp_path / "file.pt", swap)) as file:
        for name in expected.TIES:
            np.testing.assert_array_equal(file.read(name), expected.STATE[name][1].astype("f4"))
            pieces = b"".join(bytes(piece) for piece in file.chunks(file[name]))
            assert pieces == expected.STATE[name][1].astype("<f4").tobytes()


REFUSED = {
    "compressed": lambda members: zipfile.ZIP_DEFLATED,
    "no member": lambda members: members.pop(PREFIX + "data/3"),
    "should have": lambda members: members.update({PREFIX + "data/0": b"\0" * 44}),
    "0 members called data.pkl": lambda members: members.pop(PREFIX + "data.pkl"),
    "2 members called data.pkl": lambda members: members.update({"other/data.pkl": b"N."}),
    "after the pickle's end": lambda members: members.update(
        {PREFIX + "data.pkl": members[PREFIX + "data.pkl"] + b"N."}
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_archives_that_are_not_as_torch_writes_them(tmp_path, reason):
    def change(members):
        method = REFUSED[reason](members)
        return method if method == zipfile.ZIP_DEFLATED else None

    with pytest.raises(CheckpointError, match=reason):
        read(repacked(tmp_path / "file.pt", change))


def test_a_wrong_checksum_is_found_when_the_tensor_is_read_or_at_once(tmp_path):
    data = bytearray(written(tmp_path / "a.pt", torch_zip, [outgoing("w", "float32", expected.matrix())]).read_bytes())
    data[data.index(expected.matrix().astype("f4").tobytes()) + 5] ^= 1
    (tmp_path / "b.pt").write_bytes(data)
    with torch_zip.read(tmp_path / "b.pt") as file, pytest.raises(CheckpointError, match="CRC"):
        file.read("w")
    with pytest.raises(CheckpointError, match="CRC"):
        torch_zip.read(tmp_path / "b.pt", verify=True)
    with torch_zip.read(tmp_path / "a.pt", verify=True) as file:
        assert_holds(file, {"w": ("float32", expected.matrix())})


# ---- hostile archives


def archive_of(members, path):
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    writer = zip_writer.ZipWriter(Sink(descriptor))
    for name, data in members:
        writer.add(name, data)
    writer.finish()
    os.close(descriptor)
    return path


def test_members_that_overlap_or_hide_each_other_are_refused(tmp_path):
    path = tmp_path / "file.pt"
    archive_of([("archive/data.pkl", b"N."), ("archive/data.pkl", b"K\1.")], path)
    with pytest.raises(CheckpointError, match="two members"):
        read(path)
    data = bytearray(archive_of([("archive/data.pkl", b"}."), ("archive/data/0", b"\0" * 64)], path).read_bytes())
    second = data.rindex(zips.CENTRAL_MAGIC)
    data[second + 42 : second + 46] = (0).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"running into|no header"):
        read(path)


@pytest.mark.parametrize("nbytes", [2**20, 2**31])
def test_members_larger_than_the_file_are_refused(tmp_path, nbytes):
    path = archive_of([("archive/data.pkl", b"}."), ("archive/data/0", b"\0" * 64)], tmp_path / "file.pt")
    data = bytearray(path.read_bytes())
    second = data.rindex(zips.CENTRAL_MAGIC)
    data[second + 20 : second + 28] = struct.pack("<2I", nbytes, nbytes)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="running into"):
        read(path)


def state_of(tensor: bytes) -> bytes:
    """A pickle of {"w": tensor}."""
    return emitting.start(2) + b"}" + emitting.value("w") + tensor + b"s."


def rebuilt(start=0, shape=(4,), strides=(1,), numel=16, kind=("torch", "FloatStorage"), key="0") -> bytes:
    """A tensor of the one storage."""
    identity = emitting.value("storage") + emitting.name(*kind) + b"".join(map(emitting.value, (key, "cpu", numel)))
    place = b"".join(map(emitting.value, (start, shape, strides)))
    function = emitting.name("torch._utils", "_rebuild_tensor_v2")
    return function + b"((" + identity + b"tQ" + place + b"\x89" + emitting.ORDERED_DICT + b"tR"


WRONG = {
    "beyond its storage": rebuilt(start=13),
    "strides beyond it": rebuilt(shape=(2, 2), strides=(100, 1)),
    "expanded": rebuilt(shape=(3000, 3000), strides=(0, 0)),
    "overlapping and larger": rebuilt(shape=(3, 2, 3000, 3000), strides=(1, 1, 0, 0)),
    "negative": rebuilt(start=-1),
    "negative strides": rebuilt(strides=(-1,)),
    "negative shape": rebuilt(shape=(-4,)),
    "huge": rebuilt(shape=(2**40, 2**40, 2**40), strides=(0, 0, 0)),
    "fewer strides": rebuilt(shape=(2, 2), strides=(1,)),
    "a shape of text": rebuilt(shape=("a",)),
    "true": rebuilt(shape=(True,)),
    "numel too large": rebuilt(numel=17),
    "numel too small": rebuilt(numel=1),
    "numel negative": rebuilt(numel=-16),
    "another storage": rebuilt(key="1"),
    "a way out": rebuilt(key="../../etc/passwd"),
    "a quantised storage": rebuilt(kind=("torch", "QInt8Storage")),
    "an evil storage": rebuilt(kind=("posix", "system")),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_tensors_that_are_not_inside_their_storage_are_refused(tmp_path, wrong):
    def file(tensor):
        members = [("archive/data.pkl", state_of(tensor)), ("archive/data/0", bytes(64))]
        return archive_of(members, tmp_path / "file.pt")

    with read(file(rebuilt())) as found:
        assert found["w"].shape == (4,)
    with pytest.raises(CheckpointError), read(file(WRONG[wrong])) as found:
        found.read("w")  # what is larger than its storage is refused when it is used


def test_views_that_overlap_inside_their_storage_are_read(tmp_path):
    members = [
        ("archive/data.pkl", state_of(rebuilt(shape=(3, 3), strides=(1, 1)))),
        ("archive/data/0", np.arange(16, dtype="f4").tobytes()),
    ]
    with read(archive_of(members, tmp_path / "file.pt")) as file:
        assert file.read("w").tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 4]]


# ---- the legacy form


def test_a_tar_archive_is_refused_by_what_it_is(tmp_path):
    import tarfile

    path = tmp_path / "old.pt"
    with tarfile.open(path, "w") as archive:
        archive.add(GOLDEN / "expected.py", "storages")
    assert torch_legacy.sniff(path.read_bytes()[:512])
    with pytest.raises(CheckpointError, match="tar archive"):
        torch_legacy.read(path)


@pytest.mark.parametrize("change", [b"", b"\0", b"more"])
def test_bytes_after_the_last_storage_are_refused(tmp_path, change):
    data = (GOLDEN / "torch2.13.0-legacy.pt").read_bytes()
    (tmp_path / "file.pt").write_bytes(data + change)
    if change:
        with pytest.raises(CheckpointError):
            read(tmp_path / "file.pt")
    else:
        with read(tmp_path / "file.pt") as file:
            assert len(file) == len(expected.STATE)


def test_a_part_of_a_storage_in_a_very_old_file(tmp_path):
    identity = emitting.value("storage") + emitting.name("torch", "FloatStorage")
    identity += b"".join(map(emitting.value, ("7", "cpu", 4, ("8", 1, 3))))
    function = emitting.name("torch._utils", "_rebuild_tensor")
    tensor = function + b"((" + identity + b"tQ" + b"".join(map(emitting.value, (1, (2,), (1,)))) + b"tR"
    head = b"".join(pickle.dumps(part, 2) for part in (torch_legacy.MAGIC, torch_legacy.PROTOCOL, {}))
    storage = struct.pack("<q", 4) + np.arange(4, dtype="f4").tobytes()
    (tmp_path / "file.pt").write_bytes(head + state_of(tensor) + pickle.dumps(["7"], 2) + storage)
    with read(tmp_path / "file.pt") as file:
        assert file.read("w").tolist() == [2, 3]


def test_sniffing_tells_the_forms_apart():
    for version in VERSIONS:
        legacy, zipped = ((GOLDEN / f"torch{version}-{form}.pt").read_bytes()[:512] for form in ("legacy", "state"))
        assert (torch_legacy.sniff(legacy), torch_legacy.sniff(zipped)) == (True, False)
        assert (torch_zip.sniff(legacy), torch_zip.sniff(zipped)) == (False, True)
    assert torch_zip.is_ours(GOLDEN / "torch1.8.1-state.pt")


def test_an_archive_of_other_things_is_not_ours(tmp_path):
    np.savez(tmp_path / "file.npz", a=np.ones(2))
    assert not torch_zip.is_ours(tmp_path / "file.npz")
    assert zlib.crc32(b"") == 0


@pytest.mark.frameworks
def test_a_trainer_s_checkpoint(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed here")
    content = {
        "state_dict": {"model.weight": torch.ones(2, 2)},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2, 2)}}, "param_groups": []}],
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(1.5)}},
        "epoch": 3,
    }
    torch.save(content, tmp_path / "last.ckpt.pt")
    for nested in (None, "state_dict", ("state_dict",)):
        with open_checkpoint(tmp_path / "last.ckpt.pt", nested) as file:
            assert list(file) == ["model.weight"]
            assert file.nested == ("state_dict",)
            assert {"optimizer_states", "callbacks", "epoch"} <= {entry.name for entry in file.objects}
