"""A target appears whole and right, or not at all: what verification catches, and law 5 from end to end."""

from __future__ import annotations

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
from mhabridge.checkpoint.formats import sharded
from mhabridge.checkpoint.formats.known import open_checkpoint
from mhabridge.checkpoint.storage import views
from mhabridge.checkpoint.storage.writing import Outgoing, Sink
from mhabridge.errors import CheckpointError
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights

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


@pytest.mark.parametrize("name", ["a", "a.txt", "a.json", "a.tar"])
def test_an_ending_that_says_no_format(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="The target's ending says its format"):
        convert(source_of(tmp_path), tmp_path / name)
