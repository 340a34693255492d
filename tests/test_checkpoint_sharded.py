"""Checkpoints in several files: written, read as one, and indexes that say something else than the files do."""

from __future__ import annotations

import dataclasses
import json
import os
import time

import numpy as np
import pytest

from mhabridge.checkpoint.formats import npz_writing, safetensors_file, sharded
from mhabridge.checkpoint.formats.known import open_checkpoint
from mhabridge.checkpoint.storage.stored import StoredObject
from mhabridge.checkpoint.storage.writing import Outgoing
from mhabridge.errors import CheckpointError
from tests.checkpoint_files import assert_holds, outgoing, written

CONTENT = {f"layer.{number}": ("float32", np.arange(number * 6).reshape(number, 6)) for number in range(1, 6)}
TENSORS = [outgoing(name, dtype, values) for name, (dtype, values) in CONTENT.items()]
INDEX = "model.safetensors.index.json"


@pytest.fixture
def index(tmp_path):
    sharded.write(tmp_path / INDEX, sharded.by_size(TENSORS, 150), (), {"format": "pt"})
    return tmp_path / INDEX


def change(index, **fields):
    content = json.loads(index.read_text())
    content.update(fields)
    index.write_text(json.dumps(content))


def moved(index, name, shard):
    """Have the index say that a tensor is in another file."""
    weight_map = json.loads(index.read_text())["weight_map"]
    change(index, weight_map={**weight_map, name: shard})


def test_shards_are_written_and_read_as_one(index):
    names = sorted(path.name for path in index.parent.iterdir())
    assert names == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)] + [INDEX]
    with open_checkpoint(index) as opened:
        assert opened.format == "sharded"
        assert opened.metadata == {"format": "pt"}
        assert opened.notes == ()
        assert_holds(opened, CONTENT)
        assert len({tensor.extents[0].file for tensor in opened.values()}) == 3


def test_transformers_form_of_the_index(index):
    content = json.loads(index.read_text())
    assert content["metadata"] == {"total_size": sum(tensor.nbytes for tensor in TENSORS)}
    assert content["weight_map"]["layer.5"] == "model-00003-of-00003.safetensors"


def test_each_shard_is_a_whole_file(index):
    library = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed here")
    found = {}
    for file in sorted(index.parent.glob("*.safetensors")):
        found.update(library.load_file(file))
    assert {name: array.tolist() for name, array in found.items()} == {n: a.tolist() for n, (_, a) in CONTENT.items()}


def test_objects_are_kept_once(tmp_path):
    sharded.write(tmp_path / INDEX, sharded.by_size(TENSORS, 100), [StoredObject("epoch", "3", 3)])
    with open_checkpoint(tmp_path / INDEX) as opened:
        assert opened.objects == (StoredObject("epoch", "3", 3),)


def test_shards_of_other_formats_are_read_too(tmp_path):
    written(tmp_path / "a.npz", npz_writing, TENSORS[:2])
    written(tmp_path / "b.safetensors", safetensors_file, TENSORS[2:])
    weight_map = {tensor.name: "a.npz" if at < 2 else "b.safetensors" for at, tensor in enumerate(TENSORS)}
    (tmp_path / "x.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with open_checkpoint(tmp_path / "x.index.json") as opened:
        assert_holds(opened, CONTENT)


def test_an_existing_set_is_replaced_only_by_force(index):
    before = {path.name: path.read_bytes() for path in index.parent.iterdir()}
    with pytest.raises(CheckpointError, match="--force"):
        sharded.write(index, [TENSORS[:2], TENSORS[2:4], TENSORS[4:]])
    assert {path.name: path.read_bytes() for path in index.parent.iterdir()} == before
    sharded.write(index, [TENSORS[:1], TENSORS[1:4], TENSORS[4:]], force=True)
    with open_checkpoint(index) as opened:
        assert_holds(opened, CONTENT)


def test_an_error_in_one_shard_leaves_none(tmp_path):
    broken = dataclasses.replace(outgoing("bad", "int8", np.zeros(3)), shape=(4,))
    with pytest.raises(CheckpointError, match="bad: given 3 bytes"):
        sharded.write(tmp_path / INDEX, [TENSORS, [broken]])
    with pytest.raises(CheckpointError, match=r"layer.1: given two entries"):
        sharded.write(tmp_path / INDEX, [TENSORS, TENSORS[:1]])
    with pytest.raises(CheckpointError, match=r"expected one that ends in \.index\.json"):
        sharded.write(tmp_path / "model.safetensors", [TENSORS])
    assert list(tmp_path.iterdir()) == []


# -- indexes that are not right ----------------------------------------------------------------------------------------


def test_an_index_and_its_files_must_agree(index):
    moved(index, "layer.1", "model-00002-of-00003.safetensors")
    with pytest.raises(CheckpointError, match=r"layer.1 is not in model-00002-of-00003"):
        open_checkpoint(index)
    moved(index, "layer.1", "model-00001-of-00003.safetensors")
    moved(index, "extra", "model-00003-of-00003.safetensors")
    with pytest.raises(CheckpointError, match=r"extra is not in model-00003"):
        open_checkpoint(index)
    weight_map = json.loads(index.read_text())["weight_map"]
    change(index, weight_map={name: shard for name, shard in weight_map.items() if name not in ("extra", "layer.2")})
    with pytest.raises(CheckpointError, match=r"layer.2 is, against the index, in model-00001"):
        open_checkpoint(index)


def test_a_tensor_in_two_files_is_refused(index):
    first = index.parent / "model-00001-of-00003.safetensors"
    second = index.parent / "model-00002-of-00003.safetensors"
    with safetensors_file.read(second) as opened:
        names = set(opened)
    written(first, safetensors_file, TENSORS)
    weight_map = json.loads(index.read_text())["weight_map"]
    assert names & set(weight_map)
    with pytest.raises(CheckpointError, match="is, against the index, in model-00001"):
        open_checkpoint(index)


@pytest.mark.parametrize("shard", ["/etc/passwd", "../model.safetensors", "sub/../../x", "a\0b", "."])
def test_files_outside_the_folder_are_refused(index, shard):
    moved(index, "layer.1", shard)
    with pytest.raises(CheckpointError, match=r"which is not in its folder|the file name"):
        open_checkpoint(index)


def test_links_out_of_the_folder_are_refused(index, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shard = index.parent / "model-00001-of-00003.safetensors"
    shard.rename(elsewhere / "blob")
    shard.symlink_to(elsewhere / "blob")
    with pytest.raises(CheckpointError, match="which is not in its folder"):
        open_checkpoint(index)
    # Unless the index itself is a link to that folder: so Hugging Face's cache keeps a model.
    index.rename(elsewhere / "index-blob")
    index.symlink_to(elsewhere / "index-blob")
    with open_checkpoint(index) as opened:
        assert_holds(opened, CONTENT)


def test_circles_are_refused(index):
    moved(index, "layer.1", INDEX)
    with pytest.raises(CheckpointError, match="names itself"):
        open_checkpoint(index)
    other = index.with_name("other.index.json")
    other.write_text(json.dumps({"weight_map": {"layer.1": INDEX}}))
    moved(index, "layer.1", "other.index.json")
    with pytest.raises(CheckpointError, match="an index that names another"):
        open_checkpoint(index)
    os.symlink("loop", index.with_name("loop"))
    moved(index, "layer.1", "loop")
    with pytest.raises(CheckpointError):
        open_checkpoint(index)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no JSON"),
        ("{", "no JSON"),
        ("[]", "no weight_map"),
        ("{}", "no weight_map"),
        ('{"weight_map": 3}', "no weight_map"),
        ('{"weight_map": {"a": 3}}', "no weight_map"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "two entries are named 'a'"),
        ('{"weight_map": ' + "[" * 100_000, "nested too deep"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "given nothing there"),
        ("{" + '"a": "' + "é" * 10, "no JSON"),
    ],
)
def test_damaged_indexes_are_refused(tmp_path, content, message):
    (tmp_path / "a.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "a.index.json")


def test_thousands_of_files_are_refused(tmp_path):
    weight_map = {str(number): f"{number}.safetensors" for number in range(10_001)}
    (tmp_path / "a.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="it names 10001 files"):
        open_checkpoint(tmp_path / "a.index.json")


def test_a_wrong_total_size_is_a_note(index):
    change(index, metadata={"total_size": 7})
    with open_checkpoint(index) as opened:
        assert opened.notes == ("The index speaks of 7 bytes, and the tensors have 360.",)


def test_an_error_in_one_of_many_shards_ends_the_others_and_leaves_none(tmp_path):
    """Each is written by one thread."""
    whole = []

    def fails(sink):
        raise CheckpointError("x", given="what cannot be read", expected="a tensor")

    def slow(sink):
        for _ in range(200):
            time.sleep(0.005)
            sink.write(bytes(8))
        whole.append(sink)

    shards = [[Outgoing(str(number), "uint8", (1600,), fails if number == 1 else slow)] for number in range(6)]
    with pytest.raises(CheckpointError, match="what cannot be read"):
        sharded.write(tmp_path / "m.safetensors.index.json", shards, workers=2)
    assert not list(tmp_path.iterdir())
    assert whole == []
