"""MegEngine's checkpoints: files that it wrote, and files of ours that it loads."""

from __future__ import annotations

import os
import pickle
import struct

import numpy as np
import pytest

from mhabridge.checkpoint.formats import megengine, torch_zip
from mhabridge.checkpoint.planning import origins
from mhabridge.checkpoint.planning.origins import Dialect
from mhabridge.checkpoint.storage.stored import StoredObject
from mhabridge.checkpoint.storage.writing import Outgoing, Sink, passed_through
from mhabridge.errors import CheckpointError
from tests.checkpoint_files import GOLDEN, PRINT_ARRAYS, array_of, assert_holds, assert_shown, outgoing, run_in, written
from tests.golden import expected

PROTOCOLS = (2, 3, 4, 5)


def golden(what, protocol):
    return megengine.read(GOLDEN / f"megengine1.13.0-{what}-p{protocol}.pkl")


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("what", ["state", "parameters"])
def test_state_dicts_and_parameters(what, protocol):
    with golden(what, protocol) as file:
        assert_holds(file, expected.NESTED)
        assert (file.objects, file.nested, file.notes) == ((), (), ())


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_nested_checkpoints(protocol):
    with golden("nested", protocol) as file:
        assert_holds(file, expected.NESTED)
        assert file.nested == ("state_dict",)
        assert {entry.name: entry.value for entry in file.objects} == {
            "epoch": expected.EPOCH,
            "optimizer": None,
            "run": expected.RUN,
            "best": expected.BEST,
        }
        assert not any(entry.inert for entry in file.objects)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_whole_modules(protocol):
    with golden("module", protocol) as file:
        for name, (_, values) in expected.MODULE.items():
            np.testing.assert_array_equal(file.read(name), values)
        assert set(file) - set(expected.MODULE) == {"norm.running_var"}
        assert file.objects[0].inert[0] == "__main__.Net"
        assert "as a whole" in file.notes[0]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_bfloat16(protocol):
    with golden("bfloat", protocol) as file:
        assert_holds(file, {"array": expected.STATE["bfloat"], "tensor": expected.STATE["bfloat"]})


# ---- writing

WRITABLE = {name: found for name, found in expected.STATE.items() if found[0] != "bfloat16"}


def all_tensors(table=WRITABLE):
    return [outgoing(name, dtype, values) for name, (dtype, values) in table.items()]


def test_what_we_write_is_read_by_us_and_by_pickle(tmp_path):
    objects = [StoredObject("epoch", "3", 3), StoredObject("state_dict.step", "7", 7)]
    path = written(tmp_path / "file.pkl", megengine, all_tensors(), objects, None, ("state_dict",))
    with megengine.read(path) as file:
        assert_holds(file, WRITABLE)
        assert {entry.name: entry.value for entry in file.objects} == {"epoch": 3, "state_dict.step": 7}
    if np.__version__ < "2":
        loaded = pickle.loads(path.read_bytes())
        assert (loaded["epoch"], loaded["state_dict"].pop("step")) == (3, 7)
        for name, (dtype, values) in WRITABLE.items():
            found = loaded["state_dict"][name]
            assert (found.dtype, found.shape) == (np.dtype(dtype), values.shape)
            assert found.tobytes() == array_of(dtype, values).tobytes()


def test_bfloat16_is_written_as_megengine_does(tmp_path):
    tensors = [outgoing("array", *expected.STATE["bfloat"])]
    with megengine.read(written(tmp_path / "file.pkl", megengine, tensors)) as file:
        assert_holds(file, {"array": expected.STATE["bfloat"]})


def test_tied_tensors_stay_tied(tmp_path):
    matrix = expected.matrix()
    tensors = [outgoing("a", "float32", matrix, "x"), outgoing("b", "float32", matrix, "x")]
    tensors += [outgoing("flat", "float32", matrix.reshape(-1), "x"), outgoing("c", "float32", matrix, "y")]
    path = written(tmp_path / "file.pkl", megengine, tensors)
    with megengine.read(path) as file:
        assert_holds(file, {name: ("float32", matrix.reshape(-1) if name == "flat" else matrix) for name in file})
        assert file["a"].storage == file["b"].storage
        assert len({file[name].storage for name in ("a", "flat", "c")}) == 3
    if np.__version__ < "2":
        loaded = pickle.loads(path.read_bytes())
        assert loaded["a"] is loaded["b"]


def test_a_torch_file_becomes_a_megengine_file(tmp_path):
    with torch_zip.read(GOLDEN / "torch2.13.0-state.pt") as source:
        tensors = [passed_through(source, source[name], name) for name in source]
        path = written(tmp_path / "file.pkl", megengine, tensors)
    with megengine.read(path) as file:
        assert_holds(file, expected.STATE)
        assert file["weight"].storage == file["tied"].storage


def test_dtypes_without_a_home_are_refused(tmp_path):
    tensor = Outgoing("w", "float8_e5m2", (1,), lambda sink: sink.write(b"\0"))
    with pytest.raises(CheckpointError, match="float8_e5m2"):
        written(tmp_path / "file.pkl", megengine, [tensor])


def test_odd_dtypes_are_noted():
    tensors = all_tensors()
    notes = " ".join(origins.notes_on_dtypes(Dialect("megengine"), [(each.name, each.dtype) for each in tensors]))
    assert "float64 (double)" in notes
    assert "int64 (int64)" in notes
    assert "float32 (" not in notes


class Hollow(Sink):
    """A sink that leaves a hole where a large array would be."""

    def reserve(self, length: int) -> None:
        """The room is not wanted."""

    def hole(self, length: int) -> None:
        self._advance(length)


@pytest.mark.parametrize("size", [2**32 - 4, 2**32, 2**33])
def test_arrays_beyond_4_gib(tmp_path, size):
    path = tmp_path / "large.pkl"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    large = Outgoing("large", "float32", (size // 4,), lambda sink: sink.hole(size))
    megengine.write(Hollow(descriptor), [large, outgoing("small", "float32", expected.matrix())])
    os.close(descriptor)
    assert path.stat().st_blocks * 512 < 1 << 20
    length = b"B" + struct.pack("<I", size) if size < 2**32 else b"\x8e" + struct.pack("<Q", size)
    with path.open("rb") as file:
        assert length in file.read(1000)
    with megengine.read(path) as file:
        assert file["large"].nbytes == size
        np.testing.assert_array_equal(file.read("small"), expected.matrix())


# ---- through MegEngine itself

LOAD = (
    PRINT_ARRAYS
    + """
import sys, megengine
loaded = megengine.load(sys.argv[1])
assert loaded["epoch"] == 3
show({name: array.astype("float32") if "bfloat16" in str(array.dtype) else array
      for name, array in loaded["state_dict"].items()})
"""
)

FILL = (
    PRINT_ARRAYS
    + """
import sys, numpy, megengine, megengine.module
class Net(megengine.module.Module):
    def __init__(self):
        super().__init__()
        self.fc = megengine.module.Linear(2, 3)
        self.mha = megengine.module.MultiHeadAttention(4, 2)
    def forward(self, inputs):
        return self.fc(inputs)
net = Net()
net.load_state_dict(megengine.load(sys.argv[1]))
found = dict(net.state_dict())
found["output"] = net(megengine.tensor(numpy.ones((1, 2), "float32"))).numpy()
show(found)
"""
)


@pytest.mark.frameworks
def test_megengine_loads_what_we_write(tmp_path):
    objects = [StoredObject("epoch", "3", 3)]
    tensors = all_tensors(expected.STATE)
    path = written(tmp_path / "file.pkl", megengine, tensors, objects, None, ("state_dict",))
    table = {**expected.STATE, "bfloat": ("float32", expected.STATE["bfloat"][1])}
    assert_shown(run_in("megengine", LOAD, path), table)


@pytest.mark.frameworks
def test_a_module_takes_what_we_write(tmp_path):
    vector = np.arange(80.0) / 16
    table = {**expected.NESTED, "mha.io_weight_bias": ("float32", vector.reshape(1, -1))}
    path = written(tmp_path / "file.pkl", megengine, all_tensors(table))
    weight, bias = (expected.NESTED[name][1] for name in ("fc.weight", "fc.bias"))
    output = np.ones((1, 2)) @ weight.T + bias
    assert_shown(run_in("megengine", FILL, path), {**table, "output": ("float32", output)})


# ---- quantised numbers


def test_quantised_arrays_are_refused_by_name(tmp_path):
    """MegEngine marks them by metadata on the dtype."""
    path = tmp_path / "file.pkl"
    dtype = np.dtype("i1", metadata={"mgb_dtype": {"name": "QuantizedS8", "scale": 0.5}})
    path.write_bytes(pickle.dumps({"w": np.ones(2, "float32"), "q": np.ones(2, "int8").astype(dtype)}, protocol=4))
    with pytest.raises(CheckpointError, match="q: given an array of i1 with metadata"):
        megengine.read(path)
