"""Coverage-guided fuzzing of everything that reads a checkpoint, or what lies beside one.

Run by hand or with ``make fuzz``; it needs atheris (libFuzzer for Python: ``pip install atheris``)::

    python tests/fuzz/readers.py [TARGET...] [--seconds 60] [--keep FOLDER]

An input may give a clean read or a ``CheckpointError`` (whole conversions: any ``MHABridgeError``). A finding is any
other exception, more than 2 seconds, more than 300 MiB, or a file left behind; each is kept as an input that
``python tests/fuzz/readers.py TARGET --replay FILE`` runs again. Exit code 0: none; 1: some.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import pathlib
import re
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator

try:
    import atheris
except ImportError:
    sys.exit("Fuzzing needs atheris: pip install atheris (Python 3.11 or newer).")

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
with atheris.instrument_imports(include=["mhabridge.checkpoint"]):
    import numpy as np

    from mhabridge.checkpoint.conversion import convert_checkpoint
    from mhabridge.checkpoint.formats import megengine, mindspore_ckpt, npz, safetensors_file, torch_legacy, torch_zip
    from mhabridge.checkpoint.formats.known import open_checkpoint
    from mhabridge.checkpoint.inspection import inspect_checkpoint
    from mhabridge.checkpoint.pickled import values
    from mhabridge.checkpoint.planning import sidecar
    from mhabridge.checkpoint.planning.layers import find_blocks
    from mhabridge.checkpoint.storage.stored import NOT_IN_NUMPY, StoredFile
from mhabridge.errors import CheckpointError, MHABridgeError
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
SLOW = 2.0  # seconds
LARGE = 300 << 10  # KiB
LONGEST = 16 << 10  # bytes of an input

Feed = Callable[[pathlib.Path, bytes], None]


# ---- what is done with an input


def read_all(file: StoredFile) -> None:
    """Every number of every tensor, in pieces and at once."""
    with file:
        for name, tensor in file.items():
            for _ in file.chunks(tensor):
                pass
            if tensor.dtype not in NOT_IN_NUMPY:
                file.read(name)


def plain(read: Callable[..., StoredFile]) -> Feed:
    """The input is the file."""

    def feed(folder: pathlib.Path, data: bytes) -> None:
        path = folder / "input"
        path.write_bytes(data)
        try:
            read_all(read(path))
            read_all(read(path, None, True))
        except CheckpointError:
            pass

    return feed


def packed_pickle(folder: pathlib.Path, data: bytes) -> None:
    """The input is the pickle of an archive, whose checksums are right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", b"big" if len(data) % 7 == 0 else b"little")
        for key, size in (("0", 48), ("1", 16), ("2", 0), ("94", 8)):
            archive.writestr(f"archive/data/{key}", bytes(size))
    plain(torch_zip.read)(folder, buffer.getvalue())


def packed_npy(folder: pathlib.Path, data: bytes) -> None:
    """The input is the .npy files of an archive, stored or deflated."""
    buffer = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if len(data) % 2 else zipfile.ZIP_STORED
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for number, part in enumerate(data.split(b"\xff\xfe\xfd")):
            archive.writestr(f"{number}.npy", part)
    plain(npz.read)(folder, buffer.getvalue())


def header(folder: pathlib.Path, data: bytes) -> None:
    """The input is a safetensors header, with 64 bytes behind it."""
    plain(safetensors_file.read)(folder, struct.pack("<Q", len(data)) + data + bytes(64))


def index(folder: pathlib.Path, data: bytes) -> None:
    """The input is the index of two shards that are there."""
    _with_neighbours(folder)
    path = folder / "model.safetensors.index.json"
    path.write_bytes(data)
    with contextlib.suppress(CheckpointError):
        read_all(open_checkpoint(path))


def beside(name: str) -> Feed:
    """The input is what lies beside a checkpoint."""

    def feed(folder: pathlib.Path, data: bytes) -> None:
        _with_neighbours(folder)
        (folder / name).write_bytes(data)
        try:
            with open_checkpoint(folder / "a.npz") as file:
                find_blocks(file, dict(file), sidecar.known(file))
        except MHABridgeError:
            pass
        inspect_checkpoint(folder / "a.npz").to_json()

    return feed


def conversion(folder: pathlib.Path, data: bytes) -> None:
    """The input is a checkpoint of any format; it is inspected, and converted to some other one."""
    path = folder / "input"
    path.write_bytes(data)
    to, ending = [
        ("mindspore", "ckpt"),
        ("megengine", "pkl"),
        ("torch", "pth"),
        (None, "npz"),
        ("mindspore", "safetensors"),
    ][hashlib.sha256(data).digest()[0] % 5]
    try:
        inspect_checkpoint(path).to_json()
        report = convert_checkpoint(path, folder / f"out.{ending}", to=to, force=True, ignore_objects=True)
        assert report.ok, report.notes
    except MHABridgeError as error:
        json.dumps(error.to_dict())


def _with_neighbours(folder: pathlib.Path) -> None:
    """Two shards and a checkpoint of one attention layer, as they were before the last input."""
    spec = MHASpec(4, 2)
    named = MHAWeights.random(spec).to_layout("megengine", spec)
    if not (folder / "a.npz").exists():
        np.savez(folder / "a.npz", **{f"attn.{name}": value for name, value in named.items()})
        for number in (1, 2):
            text = b'{"w%d":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}' % number
            (folder / f"{number}.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))


# ---- targets and what they start from


def _golden(*patterns: str) -> Iterator[bytes]:
    for pattern in patterns:
        yield from (path.read_bytes() for path in sorted(GOLDEN.glob(pattern)))


def _converted(ending: str) -> Iterator[bytes]:
    """What the golden files become in another format."""
    with tempfile.TemporaryDirectory() as folder:
        for number, path in enumerate([*GOLDEN.glob("torch2*-state.pt"), *GOLDEN.glob("numpy2-p4.pkl")]):
            target = pathlib.Path(folder, f"{number}.{ending}")
            convert_checkpoint(path, target, ignore_objects=True)
            yield target.read_bytes()


def _pickles() -> Iterator[bytes]:
    for path in sorted(GOLDEN.glob("torch*.pt")):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                yield from (archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))


def _arrays() -> Iterator[bytes]:
    for array in (np.zeros((2, 3), "<f4"), np.asfortranarray(np.zeros((2, 3), ">f8")), np.array("text")):
        buffer = io.BytesIO()
        np.save(buffer, array)
        yield buffer.getvalue()


def _archives() -> Iterator[bytes]:
    for save in (np.savez, np.savez_compressed):
        buffer = io.BytesIO()
        save(buffer, a=np.zeros((2, 3), "f4"), b=np.asfortranarray(np.ones((3, 2))), c=np.array("text"))
        yield buffer.getvalue()


def _indices() -> Iterator[bytes]:
    yield b'{"metadata": {"total_size": 16}, "weight_map": {"w1": "1.safetensors", "w2": "2.safetensors"}}'
    yield b'{"weight_map": {"w1": "./1.safetensors"}}'


def _sidecars() -> Iterator[bytes]:
    fields = {"embed_dim": 4, "num_heads": 2, "layout": "megengine"}
    yield json.dumps({"mhabridge": 1, "framework": "megengine", "attention": {"attn": fields}, "kinds": {}}).encode()
    yield b'{"mhabridge": 1, "framework": "torch@2.1", "attention": {}, "kinds": {"a": "embedding"}}'


def _configurations() -> Iterator[bytes]:
    yield b'{"num_attention_heads": 2, "model_type": "bert", "position_embedding_type": "absolute"}'
    yield b'{"n_head": 2, "num_key_value_heads": 2, "text_config": {"rotary_dim": 64}}'


TARGETS: dict[str, tuple[Feed, Callable[[], Iterator[bytes]]]] = {
    "pickle": (plain(megengine.read), lambda: _golden("*.pkl")),
    "torch-pickle": (packed_pickle, _pickles),
    "torch-zip": (plain(torch_zip.read), lambda: _golden("torch*.pt")),
    "torch-legacy": (plain(torch_legacy.read), lambda: _golden("torch*legacy.pt")),
    "ckpt": (plain(mindspore_ckpt.read), lambda: _golden("mindspore/*.ckpt")),
    "safetensors": (plain(safetensors_file.read), lambda: _converted("safetensors")),
    "header": (header, lambda: (data[8 : 8 + struct.unpack("<Q", data[:8])[0]] for data in _converted("safetensors"))),
    "npz": (plain(npz.read), _archives),
    "npy": (packed_npy, _arrays),
    "index": (index, _indices),
    "sidecar": (beside("a.npz.mhabridge.json"), _sidecars),
    "config": (beside("config.json"), _configurations),
    "convert": (conversion, lambda: (*_golden("*.p*", "mindspore/*"), *_converted("npz"), *_converted("safetensors"))),
}


# ---- running


class Watched:
    """Feeds inputs to a target, and keeps those that are findings."""

    def __init__(self, target: str, keep: pathlib.Path, folder: pathlib.Path) -> None:
        self.target, self.keep, self.folder = target, keep, folder
        self.feed = TARGETS[target][0]
        self.known: set[str] = set()
        tempfile.tempdir = str(folder / "temporary")
        os.mkdir(tempfile.tempdir)

    def __call__(self, data: bytes) -> None:
        started, peak = time.monotonic(), _peak()
        try:
            self.feed(self.folder, data)
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            self.report(f"{type(error).__name__} at {frames[-1].filename}:{frames[-1].lineno}", data, repr(error))
        if time.monotonic() - started > SLOW:
            self.report("slow", data, f"{time.monotonic() - started:.1f} s")
        if _peak() - peak > LARGE:
            self.report("large", data, f"{(_peak() - peak) >> 10} MiB")
        left = os.listdir(str(tempfile.tempdir))
        if left:
            self.report("left behind", data, ", ".join(left))

    def report(self, what: str, data: bytes, more: str) -> None:
        if what in self.known:
            return
        self.known.add(what)
        path = self.keep / f"{self.target}-{hashlib.sha256(data).hexdigest()[:12]}"
        path.write_bytes(data)
        print(f"FINDING {self.target}: {what} ({more[:300]}), kept as {path}", flush=True)


def _peak() -> int:
    """KiB; not from getrusage, which begins with what the parent has."""
    return int(re.findall(r"VmHWM:\s*(\d+)", pathlib.Path("/proc/self/status").read_text())[0])


def _words(path: pathlib.Path) -> pathlib.Path:
    """libFuzzer's dictionary: the names that the readers know."""
    words = [*values.KNOWN, *(part for name in values.KNOWN for part in name.rsplit(".", 1)), "storage", "weight_map"]
    path.write_text("".join(f'"{word}"\n' for word in dict.fromkeys(words)))
    return path


def fuzz(target: str, seconds: int, keep: pathlib.Path) -> None:
    """Fuzz one target in this process, which libFuzzer ends."""
    folder = pathlib.Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    inputs = keep / f"corpus-{target}"
    inputs.mkdir(exist_ok=True)
    for data in TARGETS[target][1]():
        (inputs / hashlib.sha256(data).hexdigest()[:12]).write_bytes(data)
    options = [f"-max_total_time={seconds}", f"-max_len={LONGEST}", "-timeout=60", "-rss_limit_mb=4096"]
    arguments = [sys.argv[0], *options, f"-dict={_words(folder / 'words')}", "-print_final_stats=1", str(inputs)]
    atheris.Setup(arguments, Watched(target, keep, folder))
    atheris.Fuzz()


def run(targets: list[str], seconds: int, keep: pathlib.Path) -> int:
    """Fuzz targets one after another, each in a process of its own, and say what was found."""
    findings = 0
    for target in targets:
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, __file__, target, "--seconds", str(seconds), "--keep", str(keep), "--here"]
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TMPDIR": scratch})
        found = [line for line in done.stdout.splitlines() if line.startswith("FINDING")]
        covered = [int(number) for number in re.findall(r"cov: (\d+)", done.stderr)] or [0]
        count = re.search(r"number_of_executed_units: (\d+)", done.stderr)
        if count is None:
            found.append(f"FINDING {target}: the process died\n{done.stderr[-2000:]}")
        print(f"{target}: {count[1] if count else 0} inputs, coverage {covered[0]} to {max(covered)}", flush=True)
        print(*found, sep="\n", end="\n" if found else "")
        findings += len(found)
    return 1 if findings else 0


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--keep", type=pathlib.Path, help="where findings and inputs are kept")
    parser.add_argument("--replay", type=pathlib.Path, metavar="FILE", help="run one input, and let errors through")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    targets = options.targets or list(TARGETS)
    unknown = [target for target in targets if target not in TARGETS]
    if unknown:
        parser.error(f"no target is named {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    if options.replay:
        with tempfile.TemporaryDirectory() as folder:
            TARGETS[targets[0]][0](pathlib.Path(folder), options.replay.read_bytes())
        return 0
    keep = options.keep or pathlib.Path(tempfile.mkdtemp(prefix="fuzz-"))
    keep.mkdir(exist_ok=True)
    if options.here:
        fuzz(targets[0], options.seconds, keep)
    return run(targets, options.seconds, keep)


if __name__ == "__main__":
    sys.exit(main())
