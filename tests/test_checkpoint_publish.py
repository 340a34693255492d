"""A target appears whole and right, or not at all: what verification catches, and law 5 from end to end."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mhabridge.checkpoint import conversion, publishing
from mhabridge.checkpoint.conversion import ConversionReport, convert_checkpoint
from mhabridge.checkpoint.formats import safetensors_file, sharded, torch_writer
from mhabridge.checkpoint.formats.known import open_checkpoint
from mhabridge.checkpoint.storage import checking, views
from mhabridge.checkpoint.storage.packed import Deflated
from mhabridge.checkpoint.storage.stored import Extent, StoredFile, StoredObject, StoredTensor
from mhabridge.checkpoint.storage.writing import Outgoing, Sink, passed_through
from mhabridge.errors import CheckpointError
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights
from tests.checkpoint_files import written

SPEC = MHASpec(16, 2, k_bias=False)
ENDINGS = [".safetensors", ".safetensors.index.json", ".pth", ".ckpt", ".pkl", ".npz"]


def source_of(folder: Path) -> Path:
    named = MHAWeights.random(SPEC).to_layout("whisper", SPEC, prefix="attn")
    np.savez(folder / "source.npz", **named, **{"fc.weight": np.arange(30, dtype="f4").reshape(5, 6)})
    return folder / "source.npz"


def convert(source: Path, target: Path, force: bool = True) -> ConversionReport:
    return convert_checkpoint(source, target, to="megengine", num_heads=2, force=force, shard_size=1000)


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# -- what verification catches -----------------------------------------------------------------------------------------


class Flipped(Sink):
    """A sink that changes one bit of the first long piece of tensor data that reaches it."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        changed = bytearray(data)
        if len(changed) >= 64 and b"fc.weight" not in changed and b"attn" not in changed:
            changed[33] ^= 1
        super().write(changed)

    def copy(self, source: int, offset: int, length: int) -> None:
        self.write(os.pread(source, length, offset))


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_flipped_bit_is_never_published(ending: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source, target = source_of(tmp_path), tmp_path / f"a{ending}"
    monkeypatch.setattr(sharded if "index" in ending else publishing, "Sink", Flipped)
    before = bytes_in(tmp_path)
    report = convert(source, target)
    assert (report.ok, report.verified, report.target) == (False, False, None)
    assert report.notes[-1].startswith("Not written: ")
    assert bytes_in(tmp_path) == before
    monkeypatch.undo()
    assert convert(source, target).verified


SPOILT: dict[str, Callable[[list[Outgoing]], list[Outgoing]]] = {
    "lost": lambda tensors: tensors[1:],
    "more": lambda tensors: [*tensors, Outgoing("more", "uint8", (1,), lambda sink: sink.write(b"1"))],
    "other name": lambda tensors: [replace(tensors[0], name="other"), *tensors[1:]],
    "other shape": lambda tensors: [replace(tensors[0], shape=(1, *tensors[0].shape)), *tensors[1:]],
    "other dtype": lambda tensors: [replace(tensors[0], dtype="int32"), *tensors[1:]],
    "zeros": lambda tensors: [views.zeros(tensors[0].name, "float32", tensors[0].shape), *tensors[1:]],
    "of the other": lambda tensors: [tensors[0], views.zeros(tensors[1].name, "float32", tensors[1].shape)],
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("change", SPOILT)
def test_a_wrong_tensor_is_never_published(
    change: str, ending: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source, target = source_of(tmp_path), tmp_path / f"a{ending}"
    format, by_size = conversion._format_of(target), sharded.by_size
    spoil = SPOILT[change]

    def write(sink: Sink, tensors: Sequence[Outgoing], *more: object) -> None:
        assert format.write is not None
        format.write(sink, spoil(list(tensors)), *more)

    monkeypatch.setattr(conversion, "_format_of", lambda target: replace(format, write=write))
    monkeypatch.setattr(sharded, "by_size", lambda tensors, limit: by_size(spoil(list(tensors)), limit))
    before = bytes_in(tmp_path)
    report = convert(source, target)
    assert (report.ok, report.verified) == (False, False)
    assert bytes_in(tmp_path) == before


def test_a_damaged_source_is_not_called_right(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    with open_checkpoint(source) as file:
        place = next(file["fc.weight"].plain_extents()).offset
    content = bytearray(source.read_bytes())
    content[place] ^= 1
    source.write_bytes(content)
    with pytest.raises(CheckpointError, match="CRC-32"):
        convert(source, tmp_path / "a.pkl")
    assert not (tmp_path / "a.pkl").exists()


# -- law 5 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_existing_target_is_kept_without_force(ending: str, tmp_path: Path) -> None:
    source, target = source_of(tmp_path), tmp_path / f"a{ending}"
    convert(source, target, force=False)
    before = bytes_in(tmp_path)
    with pytest.raises(CheckpointError, match="--force"):
        convert(source, target, force=False)
    assert bytes_in(tmp_path) == before


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_exception_leaves_everything_as_it_was(ending: str, tmp_path: Path) -> None:
    source, target = source_of(tmp_path), tmp_path / f"a{ending}"
    convert(source, target)
    before = bytes_in(tmp_path)

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, target, to="torch", force=True, progress=stop, shard_size=1000)
    assert bytes_in(tmp_path) == before


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_full_disk_leaves_everything_as_it_was(ending: str, tmp_path: Path) -> None:
    source, target = source_of(tmp_path), tmp_path / f"a{ending}"
    convert(source, target)
    before = bytes_in(tmp_path)
    with pytest.raises(CheckpointError, match="room for the whole file"):
        limited(700, lambda: convert_checkpoint(source, target, to="torch", force=True, shard_size=1000))
    assert bytes_in(tmp_path) == before


def limited(size: int, job: Callable[[], object]) -> None:
    """Run something with a limit on the size of files, beyond which writing fails as on a full disk."""
    old_limit, old_signal = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old_limit[1]))
    try:
        job()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
        signal.signal(signal.SIGXFSZ, old_signal)


KILLED = """
import os, signal, sys
from mhabridge.checkpoint.conversion import convert_checkpoint
def stop(done, total):
    if done > total // 2:
        os.kill(os.getpid(), signal.SIGKILL)
convert_checkpoint(sys.argv[1], sys.argv[2], to="torch", force=True, progress=stop, shard_size=1000)
"""


@pytest.mark.parametrize("ending", [".pkl", ".safetensors.index.json"])
def test_a_kill_leaves_everything_as_it_was(ending: str, tmp_path: Path) -> None:
    source, target = source_of(tmp_path), tmp_path / f"a{ending}"
    convert(source, target)
    before = bytes_in(tmp_path)
    done = subprocess.run([sys.executable, "-c", KILLED, source, target], capture_output=True, timeout=100)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert bytes_in(tmp_path) == before


def test_a_file_can_be_converted_onto_itself(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    with open_checkpoint(source) as file:
        before = {name: file.read(name).tobytes() for name in file}
    assert convert(source, source).verified
    assert convert_checkpoint(source, source, to="torch", layout="whisper", force=True).verified
    with open_checkpoint(source) as file:
        assert {name: file.read(name).tobytes() for name in file} == before
    assert sorted(bytes_in(tmp_path)) == ["source.npz", "source.npz.mhabridge.json"]


def test_shards_can_be_converted_onto_themselves(tmp_path: Path) -> None:
    target = tmp_path / "a.safetensors.index.json"
    convert(source_of(tmp_path), target)
    assert convert(target, target).verified


def shards_in(folder: Path) -> tuple[Path, Path, Path]:
    """An index and its two shards, of which the first holds a part of the tensors only."""
    np.savez(
        folder / "all.npz", **{f"fc{n}.{part}": np.full(40, n, "f4") for n in (1, 2) for part in ("weight", "bias")}
    )
    index = folder / "a.safetensors.index.json"
    convert_checkpoint(folder / "all.npz", index, shard_size=320)
    first, second = sorted(folder.glob("a-*"))
    return index, first, second


@pytest.mark.parametrize("drop", [(), ("*bias",)])
@pytest.mark.parametrize(("source", "target"), [(0, 1), (0, 2), (1, 0), (2, 0)])
def test_no_part_of_the_source_is_written_over_or_removed(
    source: int, target: int, drop: tuple[str, ...], tmp_path: Path
) -> None:
    files = shards_in(tmp_path)
    before = bytes_in(tmp_path)
    for dry_run in (True, False):
        with pytest.raises(CheckpointError, match=r"a-0000\d-of-00002.safetensors.*, which the source is read from"):
            convert_checkpoint(files[source], files[target], drop=drop, force=True, dry_run=dry_run)
    assert bytes_in(tmp_path) == before


def test_shards_lose_nothing_by_being_converted_onto_themselves(tmp_path: Path) -> None:
    index, *_ = shards_in(tmp_path)
    before = bytes_in(tmp_path)
    with pytest.raises(CheckpointError, match=r"the source itself, without fc\d.bias"):
        convert_checkpoint(index, index, drop="*bias", force=True)
    assert bytes_in(tmp_path) == before
    assert convert_checkpoint(index, index, force=True).verified


# -- a dry run refuses what the conversion refuses ---------------------------------------------------------------------

FLOAT8 = Outgoing("w", "float8_e4m3fn", (4,), lambda sink: sink.write(bytes(4)))
REFUSED: dict[str, tuple[list[Outgoing], list[StoredObject], str]] = {
    "empty": ([views.zeros("w", "float32", (0, 3)), views.zeros("v", "float32", (1,))], [], ".ckpt"),
    "float8 to npz": ([FLOAT8], [], ".npz"),
    "float8 to pkl": ([FLOAT8], [], ".pkl"),
    "complex": ([views.zeros("w", "complex128", (2,))], [], ".safetensors"),
    "complex, sharded": ([views.zeros("w", "complex128", (2,))], [], ".safetensors.index.json"),
    "a long text": ([views.zeros("w", "float32", (2,))], [StoredObject("log", "long", "x" * 70_000)], ".pth"),
    "a taken name": ([views.zeros("__metadata__", "float32", (2,))], [], ".safetensors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_dry_run_refuses_what_has_no_place_in_the_format(case: str, tmp_path: Path) -> None:
    tensors, objects, ending = REFUSED[case]
    pickled = "complex" in case or "taken" in case
    source = tmp_path / ("a.pth" if pickled else "a.safetensors")
    written(source, torch_writer if pickled else safetensors_file, tensors, objects)
    told = []
    for dry_run in (True, False):
        with pytest.raises(CheckpointError) as caught:
            convert_checkpoint(source, tmp_path / f"b{ending}", dry_run=dry_run)
        told.append(str(caught.value))
    assert told[0] == told[1]
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_dry_run_refuses_a_target_that_is_there(ending: str, tmp_path: Path) -> None:
    source, target = source_of(tmp_path), tmp_path / f"a{ending}"
    assert convert_checkpoint(source, target, to="megengine", num_heads=2, dry_run=True).ok
    convert(source, target)
    before = bytes_in(tmp_path)
    with pytest.raises(CheckpointError, match="--force"):
        convert_checkpoint(source, target, to="megengine", num_heads=2, dry_run=True, shard_size=1000)
    assert convert_checkpoint(source, target, to="megengine", num_heads=2, dry_run=True, force=True).ok
    assert bytes_in(tmp_path) == before
    with pytest.raises(CheckpointError, match="a folder that does not exist"):
        convert_checkpoint(source, tmp_path / "none" / f"a{ending}", dry_run=True)
    (tmp_path / f"folder{ending}").mkdir()
    with pytest.raises(CheckpointError, match="given a folder"):
        convert_checkpoint(source, tmp_path / f"folder{ending}", dry_run=True, force=True)


def test_a_dry_run_refuses_a_ckpt_without_anything(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing to write"):
        convert_checkpoint(source_of(tmp_path), tmp_path / "empty.ckpt", drop=["*"], dry_run=True)


@pytest.mark.parametrize("name", ["a", "a.txt", "a.json", "a.tar"])
def test_an_ending_that_says_no_format(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="The target's ending says its format"):
        convert(source_of(tmp_path), tmp_path / name)


# -- what could not be read back, or is not there any more -------------------------------------------------------------


@pytest.mark.parametrize("ending", ENDINGS)
def test_more_than_our_readers_take_is_refused_before_it_is_written(
    ending: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source, reported = source_of(tmp_path), []
    before = bytes_in(tmp_path)
    monkeypatch.setattr(checking, "MOST_TENSORS", 3)
    with pytest.raises(CheckpointError, match=r"names of \d+ letters together; expected at most 3"):
        convert_checkpoint(
            source, tmp_path / f"a{ending}", progress=lambda done, total: reported.append(done), verify=False
        )
    assert not reported
    assert bytes_in(tmp_path) == before


def test_a_text_that_pickles_are_not_read_with_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "a.safetensors"
    with source.open("wb") as file:
        objects = [StoredObject("log", "long", "x" * 70_000)]
        safetensors_file.write(Sink(file.fileno()), [views.zeros("w", "float32", (2,))], objects)
    assert convert_checkpoint(source, tmp_path / "b.safetensors").verified
    for ending in ("pkl", "pt"):
        with pytest.raises(CheckpointError, match="a text of 70000 bytes"):
            convert_checkpoint(source, tmp_path / f"b.{ending}")


def test_a_ckpt_without_anything_is_refused_early_with_its_name(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    for name in (".safetensors", ".pt", ".pkl", ".npz"):
        assert convert_checkpoint(source, tmp_path / f"empty{name}", drop=["*"]).verified
    with pytest.raises(CheckpointError, match=r"empty\.ckpt: given nothing to write.*--drop") as caught:
        convert_checkpoint(source, tmp_path / "empty.ckpt", drop=["*"])
    assert "/proc" not in str(caught.value)
    assert not (tmp_path / "empty.ckpt").exists()


@pytest.mark.parametrize("nested", [(), ("state_dict",)])
@pytest.mark.parametrize("dry_run", [True, False])
def test_entries_without_a_tensor_are_refused_where_no_reader_takes_them(
    tmp_path: Path, nested: tuple[str, ...], dry_run: bool
) -> None:
    tensors, objects = [views.zeros("w", "float32", (2,))], [StoredObject("epoch", "3", 3)]
    for kept in (objects, []):
        source = written(tmp_path / "a.pt", torch_writer, tensors, kept, nested=nested)
        for ending in (".pt", ".pkl"):
            target = tmp_path / f"b{ending}"
            if not kept and not nested:
                assert convert_checkpoint(source, target, drop=["w"], dry_run=dry_run, force=True).ok
                continue
            with pytest.raises(CheckpointError, match=rf"b\{ending}: given no tensor to write; .*--drop"):
                convert_checkpoint(source, target, drop=["w"], dry_run=dry_run)
        assert convert_checkpoint(source, tmp_path / "b.npz", drop=["w"], dry_run=dry_run, force=True).ok


def test_what_cannot_be_read_back_is_called_by_the_targets_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    format = conversion._format_of(tmp_path / "a.npz")
    broken = replace(format, write=lambda sink, *more: sink.write(b"PK\3\4" + bytes(100)))
    monkeypatch.setattr(conversion, "_format_of", lambda target: broken)
    report = convert_checkpoint(source_of(tmp_path), tmp_path / "a.npz")
    assert not report.ok
    assert f"it cannot be read back: {tmp_path / 'a.npz'}: " in report.notes[-1]
    assert "/proc/self" not in report.notes[-1]


def shards_of(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("a-*"))


def test_files_that_the_new_index_does_not_name_are_gone(tmp_path: Path) -> None:
    source, target = source_of(tmp_path), tmp_path / "a.safetensors.index.json"
    for mine in ("a-00001-of-00009.safetensors", "b-00001-of-00002.safetensors", "a.safetensors", "other.txt"):
        (tmp_path / mine).write_bytes(b"mine")
    convert_checkpoint(source, target, shard_size=300)
    many = shards_of(tmp_path)
    assert len(many) > 4
    report = convert_checkpoint(source, target, shard_size=1 << 20, force=True)
    assert shards_of(tmp_path) == ["a-00001-of-00001.safetensors", "a-00001-of-00009.safetensors"]
    assert "removed" in report.notes[-1]
    assert many[0] in report.notes[-1]
    for mine in ("a-00001-of-00009.safetensors", "b-00001-of-00002.safetensors", "a.safetensors", "other.txt"):
        assert (tmp_path / mine).read_bytes() == b"mine"
    with open_checkpoint(target) as file:
        assert "fc.weight" in file


def test_only_what_we_name_so_is_removed_with_an_old_index(tmp_path: Path) -> None:
    source, target = source_of(tmp_path), tmp_path / "a.safetensors.index.json"
    folder = tmp_path / "deeper"
    folder.mkdir()
    kept = ["model.safetensors", "deeper/a-00001-of-00002.safetensors", "a-00001-of-00002.safetensors.old"]
    for name in kept:
        (tmp_path / name).write_bytes(b"mine")
    (tmp_path / "a-00007-of-00008.safetensors").symlink_to(tmp_path / "model.safetensors")
    outside = ["../a-00001-of-00002.safetensors", str(tmp_path / "model.safetensors")]
    named = [*kept, *outside, "a-00007-of-00008.safetensors", "a-00003-of-00008.safetensors"]
    target.write_text(json.dumps({"weight_map": {f"w{number}": name for number, name in enumerate(named)}}))
    assert convert_checkpoint(source, target, force=True).verified
    assert all((tmp_path / name).read_bytes() == b"mine" for name in kept)
    assert (tmp_path / "a-00007-of-00008.safetensors").is_symlink()
    target.write_text("no index")
    assert convert_checkpoint(source, target, force=True).verified


def test_a_conversion_that_fails_removes_no_old_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source, target = source_of(tmp_path), tmp_path / "a.safetensors.index.json"
    convert_checkpoint(source, target, shard_size=300)
    before = bytes_in(tmp_path)
    monkeypatch.setattr(sharded, "Sink", Flipped)
    assert not convert(source, target).ok
    assert bytes_in(tmp_path) == before


def test_a_source_that_became_shorter_is_named(tmp_path: Path) -> None:
    source = tmp_path / "a.safetensors"
    convert_checkpoint(source_of(tmp_path), source)
    with open_checkpoint(source) as file, (tmp_path / "b").open("wb") as target:
        os.truncate(source, 200)
        with pytest.raises(CheckpointError, match=r"a\.safetensors: given a file that became shorter"):
            passed_through(file, file["fc.weight"], "w").write_to(Sink(target.fileno()))


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    os.mkfifo(path)
    tensor = StoredTensor("w", "uint8", (1,), (Extent(0, 0, 1),), "w")
    with pytest.raises(CheckpointError, match=r"a\.npz: given no regular file"):
        StoredFile(path, "test", [tensor])
    with pytest.raises(CheckpointError, match=r"a\.npz: given no regular file"):
        Deflated(path, "w", 0, 10, 10, 0).head(5)
    with pytest.raises(CheckpointError, match=r"a\.npz: given no regular file"):
        Deflated(path, "w", 0, 10, 10, 0).unpack()


# -- one file of a checkpoint in several -------------------------------------------------------------------------------


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize("which", [0, 1])
def test_one_of_several_files_is_not_written_over(which: int, dry_run: bool, tmp_path: Path) -> None:
    """Neither by itself in another framework's names nor by another one: the index would say what is no longer so."""
    index = tmp_path / "a.safetensors.index.json"
    convert(source_of(tmp_path), index)
    shards = sorted(tmp_path.glob("a-*.safetensors"))
    assert len(shards) > 1
    before = bytes_in(tmp_path)
    with pytest.raises(CheckpointError, match=r"a file that a\.safetensors\.index\.json lists.*expected another file"):
        convert_checkpoint(shards[0], shards[which], force=True, dry_run=dry_run)
    assert bytes_in(tmp_path) == before
    assert convert_checkpoint(shards[0], tmp_path / "b.safetensors").verified
    (tmp_path / "broken.index.json").write_text("{")
    assert convert_checkpoint(shards[0], tmp_path / "b.safetensors", force=True).verified
    assert convert(source_of(tmp_path), index).verified  # its own files are replaced together
