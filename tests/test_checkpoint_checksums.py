"""A damaged source is never converted, and the comparison that follows a conversion sees a single wrong bit."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from mhabridge import MHASpec, MHAWeights
from mhabridge.checkpoint.conversion import convert_checkpoint
from mhabridge.checkpoint.storage import checksums, crc
from mhabridge.checkpoint.storage.comparing import same_bits
from mhabridge.checkpoint.storage.stored import Extent, StoredFile, StoredTensor
from mhabridge.errors import CheckpointError

SPEC = MHASpec(32, 4)


def saved(path: Path, seed: int = 0) -> Path:
    """Attention layers of PyTorch in a file of any format."""
    arrays = {}
    for layer in range(3):
        weights = MHAWeights.random(SPEC, seed=seed + layer)
        arrays.update(weights.to_layout("torch", SPEC, prefix=f"layers.{layer}.attn"))
    np.savez(path.with_suffix(".npz"), **arrays)
    if path.suffix != ".npz":
        convert_checkpoint(path.with_suffix(".npz"), path)
    return path


def with_one_bit_flipped(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def refused(file: Path, folder: Path, to: str = "megengine") -> None:
    """With verification a damaged source leads to no target; without, its damage goes through."""
    with pytest.raises(CheckpointError, match=r"CRC-32 is"):
        convert_checkpoint(file, folder / "b.pkl", to=to, num_heads=4)
    assert not list(folder.glob("b.pkl*"))
    assert convert_checkpoint(file, folder / "b.pkl", to=to, num_heads=4, verify=False).verified is None


@pytest.mark.parametrize("name", ["a.pt", "a.npz"])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_flipped_bit_in_a_source_does_not_go_through(tmp_path: Path, name: str, part: int) -> None:
    """It may be in q, k or v, which are compared one after another and have one checksum."""
    file = saved(tmp_path / name)
    assert convert_checkpoint(file, tmp_path / "whole.pkl", to="megengine", num_heads=4).verified
    weight = np.load(tmp_path / "a.npz")["layers.1.attn.in_proj_weight"].tobytes()
    with_one_bit_flipped(file, file.read_bytes().index(weight) + (2 * part + 1) * len(weight) // 6)
    refused(file, tmp_path)


def test_what_is_compared_is_not_read_again_for_its_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr(checksums, "require", lambda file, checksum, scratch=None: read.append(checksum.of))
    assert convert_checkpoint(saved(tmp_path / "a.pt"), tmp_path / "b.pkl", to="megengine", num_heads=4).verified
    assert read == []
    tied = np.arange(12.0, dtype="f4")
    np.savez(tmp_path / "c.npz", a=tied, b=tied)
    assert convert_checkpoint(tmp_path / "c.npz", tmp_path / "c.pt", rename={"a": "x"}).verified
    assert read == []


def test_so_does_one_in_a_shard(tmp_path: Path) -> None:
    saved(tmp_path / "x.pt")
    saved(tmp_path / "y.pt", seed=9)
    with np.load(tmp_path / "x.npz") as arrays:
        names = list(arrays)
        convert_checkpoint(tmp_path / "y.npz", tmp_path / "y2.pt", rename={name: f"more.{name}" for name in names})
    shards = {**dict.fromkeys(names, "x.pt"), **{f"more.{name}": "y2.pt" for name in names}}
    index = tmp_path / "model.index.json"
    index.write_text(json.dumps({"weight_map": shards}), encoding="utf-8")
    assert convert_checkpoint(index, tmp_path / "whole.pkl", to="megengine", num_heads=4).verified
    weight = np.load(tmp_path / "y.npz")["layers.2.attn.out_proj.weight"].tobytes()
    with_one_bit_flipped(tmp_path / "y2.pt", (tmp_path / "y2.pt").read_bytes().index(weight) + 7)
    refused(index, tmp_path)


@pytest.mark.parametrize("name", ["crc.ckpt", "crc.safetensors"])
def test_mindspores_own_checksums_are_compared(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(next(Path(__file__).parent.rglob(name)).read_bytes())
    assert convert_checkpoint(file, tmp_path / "whole.npz").verified
    with_one_bit_flipped(file, file.stat().st_size - 19)
    with pytest.raises(CheckpointError, match=r"CRC-32 is"):
        convert_checkpoint(file, tmp_path / "b.npz")
    assert not (tmp_path / "b.npz").exists()


# -- the comparison ----------------------------------------------------------------------------------------------------


def stored(path: Path, array: np.ndarray, **fields: object) -> StoredFile:
    path.write_bytes(b"???" + array.tobytes())
    extents = (Extent(0, 3, array.nbytes),)
    kept = {"shape": array.shape, "dtype": array.dtype.name, "extents": extents, "storage": "s", **fields}
    return StoredFile(path, "test", [StoredTensor("a", **kept)])  # type: ignore[arg-type]


MATRIX = np.arange(300 * 257, dtype=np.float32).reshape(300, 257)
WIDE = np.concatenate([MATRIX, MATRIX], axis=1)
FORMS = {
    "as it is": (MATRIX, {}),
    "transposed": (MATRIX.T.copy(), {"shape": (300, 257), "strides": (1, 300)}),
    "columns": (WIDE, {"shape": (300, 257), "strides": (514, 1)}),
    "columns, transposed": (
        np.concatenate([MATRIX, MATRIX]).T.copy(),
        {"shape": (300, 257), "strides": (1, 600), "start": 300},
    ),
    "big-endian": (MATRIX.byteswap(), {"big_endian": True}),
    "wrong checksum": (MATRIX, {"checksum": (0, 1)}),
}


@pytest.mark.parametrize("second", FORMS)
@pytest.mark.parametrize("first", FORMS)
def test_equal_bits_are_equal_however_they_lie(tmp_path: Path, first: str, second: str) -> None:
    (array, fields), (other, other_fields) = FORMS[first], FORMS[second]
    with stored(tmp_path / "x", array, **fields) as mine, stored(tmp_path / "y", other, **other_fields) as theirs:
        assert same_bits(mine, mine["a"], theirs, theirs["a"])


@pytest.mark.parametrize("second", FORMS)
@pytest.mark.parametrize("first", FORMS)
@pytest.mark.parametrize(("row", "column"), [(0, 0), (150, 130), (299, 256)])
def test_one_wrong_bit_is_seen(tmp_path: Path, first: str, second: str, row: int, column: int) -> None:
    (array, fields), (other, other_fields) = FORMS[first], FORMS[second]
    with stored(tmp_path / "x", array, **fields) as mine, stored(tmp_path / "y", other, **other_fields) as theirs:
        tensor = theirs["a"]
        steps = tensor.strides or (257, 1)
        place = 3 + 4 * (tensor.start + row * steps[0] + column * steps[1])
        with_one_bit_flipped(tmp_path / "y", place)
        assert not same_bits(mine, mine["a"], theirs, tensor)
        assert not same_bits(theirs, tensor, mine, mine["a"])


def test_a_forgotten_transpose_is_seen(tmp_path: Path) -> None:
    square = np.arange(64 * 64, dtype=np.float32).reshape(64, 64)
    with stored(tmp_path / "x", square) as mine, stored(tmp_path / "y", square, strides=(1, 64)) as theirs:
        assert not same_bits(mine, mine["a"], theirs, theirs["a"])
        assert not same_bits(theirs, theirs["a"], mine, mine["a"])


def test_both_libraries_add_up_alike() -> None:
    """The fast one is what is installed here; without it zlib does the same, only more slowly."""
    assert crc.crc32.__module__ == "isal.isal_zlib"
    without = "import sys, zlib; sys.modules['isal'] = None; from mhabridge.checkpoint.storage.crc import crc32"
    subprocess.run([sys.executable, "-c", f"{without}; assert crc32 is zlib.crc32"], check=True)
    data = np.random.default_rng(0).bytes(100_001)
    found = 0
    for start, stop in itertools.pairwise([0, 1, 7, 4096, 99_999, len(data)]):
        found = crc.crc32(memoryview(data)[start:stop], found)
    assert found == zlib.crc32(data)
