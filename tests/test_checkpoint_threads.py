"""Writing and comparing on several threads: the same bytes as on one, and no error or progress is lost."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mhabridge import MHASpec, MHAWeights
from mhabridge.checkpoint import publishing
from mhabridge.checkpoint.conversion import convert_checkpoint
from mhabridge.checkpoint.formats.known import open_checkpoint
from mhabridge.checkpoint.planning import verifying
from mhabridge.checkpoint.storage import memory, parallel, reserving
from mhabridge.checkpoint.storage.parallel import WORTH_A_THREAD, Workers
from mhabridge.checkpoint.storage.stored import StoredFile
from mhabridge.checkpoint.storage.writing import Sink
from mhabridge.errors import CheckpointError
from tests.checkpoint_files import outgoing

ENDINGS = ["safetensors", "safetensors.index.json", "pt", "ckpt", "pkl", "npz"]
SPEC = MHASpec(600, 4)  # each matrix is worth a thread


def source_of(folder: Path, ending: str = "npz") -> Path:
    named = MHAWeights.random(SPEC).to_layout("torch", SPEC, prefix="attn")
    np.savez(folder / "first.npz", **named, **{"fc.weight": np.arange(600_000, dtype="f4").reshape(1000, 600)})
    target = folder / f"source.{ending}"
    convert_checkpoint(folder / "first.npz", target)
    return target


def contents(folder: Path, stem: str) -> dict[str, bytes]:
    return {file.name.removeprefix(stem): file.read_bytes() for file in folder.glob(f"{stem}*")}


@pytest.mark.parametrize(
    ("ending", "size"), [*((one, 4 << 20) for one in ENDINGS), ("safetensors.index.json", 1 << 20)]
)
def test_two_threads_write_what_one_writes(tmp_path: Path, ending: str, size: int) -> None:
    """Of few shards both write each; of many, each writes its own."""
    source = source_of(tmp_path)
    for workers in (1, 2):
        target = tmp_path / f"a{workers}.{ending}"
        options = {"to": "megengine", "num_heads": 4, "shard_size": size}
        assert convert_checkpoint(source, target, workers=workers, **options).verified  # type: ignore[arg-type]
    one, two = contents(tmp_path, "a1"), contents(tmp_path, "a2")
    if "index" in ending:  # it names the files
        one, two = ({name: data.replace(b"a2-", b"a1-") for name, data in all.items()} for all in (one, two))
    assert one == two


def test_the_bytes_of_a_part_lie_where_there_was_room(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "a", os.O_RDWR | os.O_CREAT)
    length, wait = WORTH_A_THREAD, threading.Event()

    def slow(sink: Sink) -> None:
        assert wait.wait(30)
        sink.write(b"1" * length)

    with Workers(2) as workers:
        sink = Sink(descriptor, None, workers)
        sink.write(b"0")
        sink.later(length, slow)
        sink.later(3, lambda part: part.write(b"222"))  # at once: it is short
        sink.later(length, lambda part: part.write(b"3" * length))
        assert sink.position == 4 + 2 * length
        wait.set()
    assert (tmp_path / "a").read_bytes() == b"0" + b"1" * length + b"222" + b"3" * length
    os.close(descriptor)


@pytest.mark.parametrize("count", [1, 2])
def test_jobs_that_are_given_together_are_all_done(count: int) -> None:
    done: list[int] = []
    with Workers(count) as workers:
        workers.give_all([functools.partial(done.append, number) for number in range(100)])
        workers.wait()
        assert sorted(done) == list(range(100))


def test_jobs_that_are_given_together_begin_together(monkeypatch: pytest.MonkeyPatch) -> None:
    given, begun = [], []
    with Workers(2) as workers:
        give = workers.give

        def slowly(job: Callable[[], None]) -> None:
            give(job)
            time.sleep(0.05)
            given.append(len(begun))

        monkeypatch.setattr(workers, "give", slowly)
        workers.give_all([lambda: begun.append(1)] * 3)
        workers.wait()
    assert given == [0, 0, 0]
    assert len(begun) == 3


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("count", [WORTH_A_THREAD - 1, WORTH_A_THREAD + 1])
def test_a_part_of_another_length_is_an_error(tmp_path: Path, workers: int, count: int) -> None:
    descriptor = os.open(tmp_path / "a", os.O_RDWR | os.O_CREAT)
    with (
        pytest.raises(CheckpointError, match=f"given {count} bytes; expected {WORTH_A_THREAD}"),
        Workers(workers) as some,
    ):
        Sink(descriptor, None, some).later(WORTH_A_THREAD, lambda part: part.write(bytes(count)))
    os.close(descriptor)


def test_the_first_error_is_raised_and_ends_the_others(tmp_path: Path) -> None:
    descriptor, ended = os.open(tmp_path / "a", os.O_RDWR | os.O_CREAT), []

    def endless(sink: Sink) -> None:
        try:
            for _ in range(3000):
                sink.write(b"x" * 100)
                time.sleep(0.01)
        except parallel.Stopped:
            ended.append(True)
            raise

    def failing(sink: Sink) -> None:
        raise ValueError("no")

    def both(workers: Workers) -> None:
        sink = Sink(descriptor, None, workers)
        sink.later(WORTH_A_THREAD, failing)
        sink.later(WORTH_A_THREAD, endless)

    with pytest.raises(ValueError, match="no"), Workers(2) as workers:
        both(workers)
    assert ended in ([True], [])  # nothing was waited for to its end
    assert os.fstat(descriptor).st_size < 2 * WORTH_A_THREAD
    os.close(descriptor)


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_error_in_a_thread_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    source = source_of(tmp_path)
    before = sorted(file.name for file in tmp_path.iterdir())
    write = Sink.write

    def failing(sink: Sink, data: bytes) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise OSError(errno.ENOSPC, "No space left on device")
        write(sink, data)

    monkeypatch.setattr(Sink, "write", failing)
    with pytest.raises(CheckpointError, match="room for the whole file"):
        convert_checkpoint(source, tmp_path / f"a.{ending}", to="megengine", num_heads=4, workers=2)
    assert sorted(file.name for file in tmp_path.iterdir()) == before


@pytest.mark.parametrize("ending", ["safetensors", "pt", "pkl"])
def test_a_wrong_bit_in_a_large_tensor_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    class Flipped(Sink):
        def write(self, data: bytes | bytearray | memoryview) -> None:
            changed = bytearray(data)
            if len(changed) > 1000 and self.position > (2 << 20):
                changed[-1] ^= 1
            super().write(changed)

    source = source_of(tmp_path)
    monkeypatch.setattr(publishing, "Sink", Flipped)
    report = convert_checkpoint(source, tmp_path / f"a.{ending}", to="megengine", num_heads=4, workers=2)
    assert (report.verified, report.target) == (False, None)
    assert "other numbers than the source's" in report.notes[-1]


def test_files_are_not_closed_before_the_last_comparison_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    roles, both_began = iter(["finds a difference", "is not done yet"]), threading.Event()

    def compared(*given: Any) -> bool:
        view, watch = given[1], given[5]
        if view.nbytes < WORTH_A_THREAD:
            return True
        if next(roles) == "finds a difference":
            assert both_began.wait(30)
            return False
        both_began.set()
        try:
            for _ in range(3000):
                watch(memoryview(b""))
                time.sleep(0.01)
        finally:
            time.sleep(0.05)
            happened.append("ended")
        return True

    @contextlib.contextmanager
    def opened(*given: Any) -> Iterator[StoredFile]:
        with open_checkpoint(*given) as file:
            yield file
        happened.append("closed")

    source = source_of(tmp_path, "safetensors")  # has no checksums, which would be told first
    monkeypatch.setattr(verifying, "same_bits", compared)
    monkeypatch.setattr(publishing, "open_checkpoint", opened)
    report = convert_checkpoint(source, tmp_path / "a.pkl", to="megengine", num_heads=4, workers=2)
    assert (report.verified, happened) == (False, ["ended", "closed"])


def test_who_wrote_compares_in_the_same_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, taken = source_of(tmp_path), []
    made = memory.from_a_page_on

    def counted(size: int) -> np.ndarray:
        taken.append((threading.get_ident(), size))
        return made(size)

    monkeypatch.setattr(memory, "from_a_page_on", counted)
    for workers in (1, 2):
        target = tmp_path / f"a{workers}.pkl"
        assert convert_checkpoint(source, target, to="megengine", num_heads=4, workers=workers).verified
        sheets = [one for one in taken if one[1] > 2 * SPEC.embed_dim**2 * 4]  # a matrix as it is read, and turned
        assert 0 < len(sheets) == len(set(sheets)) <= workers
        taken.clear()


@pytest.mark.parametrize("ending", ["pt", "npz"])
@pytest.mark.parametrize("name", ["fc.weight", "attn.in_proj_weight"])
def test_a_damaged_source_is_noticed_while_it_is_compared(tmp_path: Path, ending: str, name: str) -> None:
    """One of the two is summed up on the way, the other in a job of its own, since it is compared in parts."""
    source = source_of(tmp_path, ending)
    with open_checkpoint(source) as file:
        place = next(file[name].plain_extents()).offset + 500_000
    content = bytearray(source.read_bytes())
    content[place] ^= 1
    source.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"source\.{ending}: {name}: .*CRC-32"):
        convert_checkpoint(source, tmp_path / "a.ckpt", to="mindspore", num_heads=4, workers=2)
    assert not (tmp_path / "a.ckpt").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_verification_reports_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    seen: list[tuple[int, int]] = []
    compared: list[int] = []
    source = source_of(tmp_path)
    fault = verifying.fault
    monkeypatch.setattr(verifying, "fault", lambda *given: (compared.append(len(seen)), fault(*given))[1])
    report = convert_checkpoint(
        source, tmp_path / "a.pkl", workers=workers, progress=lambda done, total: seen.append((done, total))
    )
    assert {total for _, total in seen} == {2 * report.bytes}
    assert seen == sorted(seen)
    assert report.bytes <= seen[compared[0] - 1][0] < 1.01 * report.bytes  # with what is beside the numbers
    assert seen[-1][0] == 2 * report.bytes
    assert len(seen) > compared[0] + 4  # several tensors, each compared in pieces of 4 MiB


def test_there_is_room_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    source, target = source_of(tmp_path), tmp_path / "a.safetensors"
    target.write_bytes(b"old")
    monkeypatch.setattr(reserving, "reserve", full)
    with pytest.raises(CheckpointError, match="room for the whole file"):
        convert_checkpoint(source, target, force=True)
    assert target.read_bytes() == b"old"


def test_room_is_reserved_and_no_length_is_changed(tmp_path: Path) -> None:
    with (tmp_path / "a").open("wb") as file:
        reserving.reserve(file.fileno(), 8 << 20)
        found = os.fstat(file.fileno())
        assert found.st_size == 0
        if not found.st_blocks:
            pytest.skip("this file system reserves nothing")
        assert found.st_blocks * 512 >= 8 << 20
    with (tmp_path / "a").open("rb") as file:
        reserving.reserve(file.fileno(), 8 << 20)  # what cannot be is not an error
    with pytest.raises(OSError, match=r"large|space"), (tmp_path / "a").open("wb") as file:
        reserving.reserve(file.fileno(), 2**62)


def test_tensors_of_any_size_are_given_to_the_same_files(tmp_path: Path) -> None:
    """Small tensors are written by the caller while large ones are still in the making."""
    from mhabridge.checkpoint.formats import megengine

    sizes = [10, 600_000, 3, 300_000, 0, 262_144, 1]
    tensors = [outgoing(f"w{size}", "float32", np.full(size, size)) for size in sizes]
    descriptor = os.open(tmp_path / "a.pkl", os.O_RDWR | os.O_CREAT)
    with Workers(2) as workers:
        megengine.write(Sink(descriptor, None, workers), tensors)
    os.close(descriptor)
    with open_checkpoint(tmp_path / "a.pkl") as file:
        for size in sizes:
            assert np.array_equal(file.read(f"w{size}"), np.full(size, size, "f4"))
