"""Files that appear whole or not at all: after an error, a kill, on a full disk, and several that belong together."""

from __future__ import annotations

import errno
import os
import pathlib
import signal
import stat
import subprocess
import sys
import time

import pytest

from mhabridge.checkpoint.storage import atomic
from mhabridge.checkpoint.storage.atomic import replacing, replacing_all
from mhabridge.errors import CheckpointError

# Both ways of keeping the new content apart: a file without a name, and one with a temporary name.
KINDS = ["unnamed", "named"]


@pytest.fixture(params=KINDS)
def kind(request, monkeypatch):
    if request.param == "named":
        monkeypatch.setattr(atomic, "_CAN_BE_NAMED", False)
    return request.param


def put(path, content=b"new", meanwhile=lambda: None, **options):
    with replacing(path, **options) as descriptor:
        os.write(descriptor, content)
        meanwhile()


def raiser(error):
    """A function that raises this."""

    def fail():
        raise error

    return fail


def names(folder: pathlib.Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_file_appears_when_it_is_whole(tmp_path, kind):
    target = tmp_path / "a.ckpt"
    with replacing(target) as descriptor:
        os.write(descriptor, b"half")
        assert not target.exists()
        assert bool(names(tmp_path)) == (kind == "named")
        os.write(descriptor, b" and half")
    assert target.read_bytes() == b"half and half"
    assert names(tmp_path) == ["a.ckpt"]


def test_an_old_file_stays_until_then(tmp_path, kind):
    target = tmp_path / "a.ckpt"
    target.write_bytes(b"old")
    reader = os.open(target, os.O_RDONLY)
    with replacing(target, force=True) as descriptor:
        os.write(descriptor, b"new")
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"
    assert os.read(reader, 10) == b"old"  # whoever reads it goes on reading the old one: the source may be the target
    os.close(reader)
    assert names(tmp_path) == ["a.ckpt"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(3)])
def test_an_error_leaves_everything_as_it_was(tmp_path, kind, error):
    for target, force in ((tmp_path / "new", False), (tmp_path / "old", True)):
        if force:
            target.write_bytes(b"old")
        with pytest.raises(type(error)):
            put(target, force=force, meanwhile=raiser(error))
    assert names(tmp_path) == ["old"]
    assert (tmp_path / "old").read_bytes() == b"old"


def test_without_force_nothing_is_replaced(tmp_path, kind):
    put(tmp_path / "a", b"old")
    with pytest.raises(CheckpointError, match=r"given a file that exists.*--force"):
        put(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_file_that_appears_meanwhile_is_not_replaced_either(tmp_path, kind):
    with pytest.raises(CheckpointError, match="something else made meanwhile"):
        put(tmp_path / "a", meanwhile=lambda: (tmp_path / "a").write_bytes(b"theirs"))
    assert (tmp_path / "a").read_bytes() == b"theirs"
    assert names(tmp_path) == ["a"]


def test_with_force_it_is(tmp_path, kind):
    put(tmp_path / "a", force=True, meanwhile=lambda: (tmp_path / "a").write_bytes(b"theirs"))
    assert (tmp_path / "a").read_bytes() == b"new"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_the_umask_gives_the_mode_of_a_new_file(tmp_path, kind, mask):
    usual = os.umask(mask)
    try:
        put(tmp_path / "a")
    finally:
        os.umask(usual)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~mask


def test_an_old_file_gives_its_mode(tmp_path, kind):
    (tmp_path / "a").write_bytes(b"old")
    (tmp_path / "a").chmod(0o640)
    put(tmp_path / "a", force=True)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@pytest.mark.parametrize("force", [False, True])
def test_what_is_no_regular_file_is_never_replaced(tmp_path, force):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"shared")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = names(tmp_path)
    for name, what in (("folder", "a folder"), ("pipe", "no regular file"), ("link", "a link"), ("dangling", "a link")):
        with pytest.raises(CheckpointError, match=f"given {what}"):
            put(tmp_path / name, force=force)
    with pytest.raises(CheckpointError, match="given no regular file"):
        put("/dev/null", force=force)
    assert names(tmp_path) == before
    assert (tmp_path / "file").read_bytes() == b"shared"


def test_a_missing_folder_is_not_made(tmp_path):
    with pytest.raises(CheckpointError, match="a folder that does not exist"):
        put(tmp_path / "no" / "a")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match="a folder that is none"):
        put(tmp_path / "file" / "a")
    with pytest.raises(CheckpointError, match="File name too long"):
        put(tmp_path / ("a" * 300))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="a folder that can be written to"):
        put(tmp_path / "a")


def test_the_folder_may_be_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    put(tmp_path / "link" / "a")
    assert (tmp_path / "real" / "a").read_bytes() == b"new"


def test_a_long_name_is_possible(tmp_path, kind):
    (tmp_path / ("a" * 250)).write_bytes(b"old")
    put(tmp_path / ("a" * 250), force=True)
    assert (tmp_path / ("a" * 250)).read_bytes() == b"new"


# -- no room -----------------------------------------------------------------------------------------------------------

LIMITED = """
import os, resource, signal, sys
from mhabridge.checkpoint.storage import atomic
from mhabridge.checkpoint.storage.writing import Sink
from mhabridge.errors import CheckpointError
atomic._CAN_BE_NAMED = sys.argv[2] == "unnamed"
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    with atomic.replacing(sys.argv[1], force=True) as descriptor:
        sink = Sink(descriptor)
        for _ in range(100):
            sink.write(bytes(1000))
except CheckpointError as error:
    print(error)
"""


def run(code: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_no_room_leaves_the_old_file(tmp_path, kind):
    (tmp_path / "a").write_bytes(b"old")
    said = run(LIMITED, tmp_path / "a", kind)
    assert "File too large" in said
    assert "an old file is as it was" in said
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_a_full_disk_is_our_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"a: given No space left.*expected room"):
        put(tmp_path / "a", meanwhile=raiser(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    with pytest.raises(FileNotFoundError):  # which is not about the target
        put(tmp_path / "a", meanwhile=(tmp_path / "the source").read_bytes)
    assert names(tmp_path) == []


# -- killed ------------------------------------------------------------------------------------------------------------

ENDLESS = """
import os, sys
from mhabridge.checkpoint.storage.atomic import replacing
with replacing(sys.argv[1], force=True) as descriptor:
    os.write(descriptor, bytes(100_000))
    print("writing", flush=True)
    while True:
        os.pwrite(descriptor, bytes(100_000), 0)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_kill_in_the_middle_leaves_the_old_file_and_no_other(tmp_path, number):
    (tmp_path / "a").write_bytes(b"old")
    child = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(tmp_path / "a")], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert child.stdout.readline() == b"writing\n"
    time.sleep(0.05)
    child.send_signal(number)
    child.wait(timeout=30)
    child.stdout.close()
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


# -- several files -----------------------------------------------------------------------------------------------------


def put_all(folder, content, force=False, meanwhile=lambda: None):
    targets = [folder / name for name in ("one", "two", "index")]
    with replacing_all(targets, force) as descriptors:
        for descriptor in descriptors:
            os.write(descriptor, content)
        meanwhile()


def test_several_files_appear_together(tmp_path, kind):
    put_all(tmp_path, b"1")
    put_all(tmp_path, b"2", force=True)
    assert names(tmp_path) == ["index", "one", "two"]
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"2"}


def test_one_that_exists_stops_all(tmp_path, kind):
    (tmp_path / "two").write_bytes(b"old")
    with pytest.raises(CheckpointError, match="two: given a file that exists"):
        put_all(tmp_path, b"1")
    assert names(tmp_path) == ["two"]


def test_one_that_appears_meanwhile_stops_all(tmp_path, kind):
    with pytest.raises(CheckpointError, match="meanwhile"):
        put_all(tmp_path, b"1", meanwhile=lambda: (tmp_path / "two").write_bytes(b"theirs"))
    assert names(tmp_path) == ["two"]


def test_the_index_is_never_older_than_what_it_leads_to(tmp_path, kind, monkeypatch):
    """Killed between two renames: whoever comes then finds no index, rather than an old one and new files."""
    put_all(tmp_path, b"old")
    renames = []

    def rename(source, target):
        renames.append((pathlib.Path(target).name, (tmp_path / "index").exists()))
        os.replace(source, target)

    monkeypatch.setattr(atomic.os, "rename", rename)
    put_all(tmp_path, b"new", force=True)
    assert renames == [("one", False), ("two", False), ("index", False)]


def test_the_same_target_twice_is_refused(tmp_path):
    with (
        pytest.raises(CheckpointError, match="one target twice"),
        replacing_all([tmp_path / "a", tmp_path / "." / "a"]),
    ):
        pass
    assert names(tmp_path) == []
