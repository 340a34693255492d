"""What a conversion costs beside ``cp`` of its source, beside ``import numpy``, and beside what others do.

    python benchmarks/converting.py [--gigabytes 1] [--pairs 7] [--most-gigabytes 4] [--folder DIR] [--no-peers]

Everything in a row takes turns; given are the median of the paired ratios and the ratio of the shortest times, and a
limit counts as met when either is below it: on a machine that others use too, each is disturbed in its own way. Each
conversion runs in a process of its own; its time is that of the call, its memory the whole process's.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mhabridge.backends import backends

WORKER = Path(__file__).with_name("converting_worker.py")
COMMAND = str(Path(sys.executable).with_name("mhabridge"))
HEADS = 16
GIB = 1 << 30
SIZES = (0.25, 1.0, 4.0)  # GiB
FASTER = 1.6  # times: what two are to one
LINEAR = 1.3  # times what the time is beside cp at the smallest size
ROOM = 5  # times the checkpoint's size: sources in two formats, a target, a copy, and some for the system


@dataclasses.dataclass(frozen=True)
class Conversion:
    """One row: what is converted to what, and how long it may take."""

    source: str
    ending: str
    to: str | None
    limit: float
    matrix_mebibytes: int = 4

    def __str__(self) -> str:
        return f"{self.source} -> .{self.ending}"


PASSED, SUMMED, TURNED = 1.7, 3.5, 2.5  # times the time of cp
CASES = (
    Conversion("encoder.pt", "safetensors", None, PASSED),
    Conversion("encoder.pt", "ckpt", "mindspore", PASSED),
    Conversion("encoder.safetensors", "ckpt", "mindspore", PASSED),
    Conversion("encoder.ckpt", "safetensors", "torch", PASSED),
    Conversion("encoder.safetensors", "pt", "torch", SUMMED),
    Conversion("encoder.ckpt", "pt", "torch", SUMMED),
    Conversion("e1024.pt", "pkl", "megengine", TURNED),
    Conversion("e1024.pkl", "safetensors", "torch", TURNED),
    Conversion("e4096.pt", "pkl", "megengine", TURNED, 64),
    Conversion("e4096.pkl", "safetensors", "torch", TURNED, 64),
)
TARGETS = (("safetensors", "mindspore"), ("pkl", "megengine"))  # of several files: the ending, and whose names
INSPECTED = ("pt", "safetensors", "safetensors.index.json", "ckpt", "npz")
# what others do: the worker's job, its source, what we write instead, and how many times as fast we want to be
PEERS = (
    ("torch.load + mindspore.save_checkpoint", "torch_to_mindspore", "encoder.pt", ("ckpt", "mindspore"), 8.0),
    ("safetensors + .T + pickle.dump", "packed_pickle", "e1024.safetensors", ("pkl", "megengine"), 8.0),
    ("numpy + .T + megengine.save", "packed_megengine", "e1024.npz", ("pkl", "megengine"), 8.0),
    (
        "mindspore.ckpt_to_safetensors",
        "mindspore_to_safetensors",
        "encoder.ckpt",
        ("safetensors", "mindspore"),
        5.0,
    ),
    ("TroubleShooter", "troubleshooter", "encoder.pt", ("ckpt", "mindspore"), 3.0),
    ("torch.load -> torch.save", "torch_to_torch", "encoder.pt", ("pt", "torch"), None),
)


# Jobs that another interpreter does, where there is one.
PYTHONS = {
    job: info.python for info in backends() for job in ["packed_megengine"] if info.ok and info.name == "megengine"
}


class Bench:
    """Runs jobs on checkpoints in a folder, and counts the limits that were not met."""

    def __init__(self, folder: Path, gigabytes: float, pairs: int) -> None:
        self.folder, self.gigabytes, self.pairs = folder, gigabytes, pairs
        self.failed = 0

    def job(self, name: str, *arguments: Any) -> dict[str, Any]:
        python = PYTHONS.get(name, sys.executable)
        command = [python, str(WORKER), name, json.dumps(arguments)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return dict(json.loads(done.stdout.splitlines()[-1]))

    def source(self, name: str) -> Path:
        """A checkpoint, made when it is first needed."""
        path = self.folder / name
        if path.exists():
            return path
        stem, _, ending = name.partition(".")
        layers = {"encoder": 21, "e1024": 64, "e4096": 4}[stem.partition("-")[0]] * self.gigabytes
        if ending != "pt":
            to = {"safetensors": "torch", "ckpt": "mindspore", "pkl": "megengine"}.get(ending, "torch")
            self.job("convert", str(self.source(f"{stem}.pt")), str(path), to, HEADS, False)
        elif stem.startswith("encoder"):
            self.job("make_encoder", str(path), max(round(layers), 1))
        else:
            self.job("make_attention", str(path), max(round(layers), 1), int(stem.partition("-")[0][1:]))
        return path

    def keep_only(self, *stems: str) -> None:
        for path in self.folder.iterdir():
            if path.name.partition(".")[0] not in stems:
                path.unlink()

    def copy(self, source: Path) -> float:
        with self.target("copy") as target:
            return seconds(["cp", str(source), str(target)])

    def convert(self, case: Conversion, verify: bool = False, workers: int | None = None) -> dict[str, Any]:
        source = str(self.source(case.source))
        with self.target(case.ending) as target:
            return self.job("convert", source, str(target), case.to, HEADS, verify, workers)

    @contextlib.contextmanager
    def target(self, ending: str) -> Iterator[Path]:
        """A name to write to; what was written is removed, and was never waited for."""
        path = self.folder / f"out.{ending}"
        path.unlink(missing_ok=True)
        try:
            yield path
        finally:
            for made in self.folder.glob("out*"):
                made.unlink()

    def verdict(self, met: bool) -> str:
        self.failed += not met
        return "met" if met else "NOT MET"


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def ratios(ours: list[float], theirs: list[float]) -> tuple[float, float]:
    """The median of the paired ratios, and the ratio of the shortest."""
    return statistics.median(one / two for one, two in zip(ours, theirs, strict=True)), min(ours) / min(theirs)


def heading(title: str, columns: str) -> None:
    print(f"\n{title}\n{columns}", flush=True)


def against_cp(bench: Bench) -> None:
    heading(
        "beside cp of the source (x cp: median, shortest), and what verification adds",
        f"{'conversion':<33} {'cp s':>6} {'s':>6} {'x cp':>5} {'min':>5} {'limit':>5} {'':7} "
        f"{'verified x':>10} {'':7} {'MiB':>5} {'limit':>5}",
    )
    for case in CASES:
        bench.keep_only(case.source.partition(".")[0])
        source = bench.source(case.source)
        rows = [  # the first brings files and code into memory
            (bench.copy(source), bench.convert(case), bench.convert(case, verify=True)) for _ in range(bench.pairs + 1)
        ]
        copies = [row[0] for row in rows[1:]]
        plain, checked = ([row[which]["seconds"] for row in rows[1:]] for which in (1, 2))
        peak = max(row[which]["mebibytes"] for row in rows for which in (1, 2))
        median, shortest = ratios(plain, copies)
        verified = min(ratios(checked, plain))
        room = 64 + 2 * case.matrix_mebibytes
        print(
            f"{case!s:<33} {min(copies):>6.2f} {min(plain):>6.2f} {median:>5.2f} {shortest:>5.2f} {case.limit:>5.1f} "
            f"{bench.verdict(min(median, shortest) <= case.limit):<7} {verified:>10.2f} "
            f"{bench.verdict(verified <= 2):<7} {peak:>5.0f} {room:>5} {bench.verdict(peak <= room)}",
            flush=True,
        )


def inspecting(bench: Bench) -> None:
    heading(
        "mhabridge inspect beside python -c 'import numpy'",
        f"{'file':<33} {'ms':>6} {'x':>5} {'min':>5} {'limit':>5} {'':7} {'MiB':>5} {'limit':>5}",
    )
    bench.keep_only("encoder", "e1024")
    for name in (*(f"encoder.{ending}" for ending in INSPECTED), "e1024.pkl"):
        source = str(bench.source(name))
        times = [
            (seconds([COMMAND, "inspect", source]), seconds([sys.executable, "-c", "import numpy"]))
            for _ in range(bench.pairs + 1)
        ]
        ours, theirs = ([pair[which] for pair in times[1:]] for which in (0, 1))
        found = bench.job("inspect", source)
        median, shortest = ratios(ours, theirs)
        right = found["mebibytes"] <= 60 and not found["frameworks"]
        print(
            f"{name:<33} {1e3 * min(ours):>6.0f} {median:>5.2f} {shortest:>5.2f} {3:>5} "
            f"{bench.verdict(min(median, shortest) <= 3):<7} {found['mebibytes']:>5.0f} {60:>5} {bench.verdict(right)}",
            flush=True,
        )


def several(bench: Bench) -> None:
    """Two threads, or two files at a time, beside one after another."""
    columns = f"{'conversion':<33} {'s':>6} {'faster x':>9} {'min':>5} {'limit':>5}"
    heading("one conversion by two threads, beside one; and its reads and writes alone, for what there is", columns)
    bench.keep_only()
    shards = Conversion("e1024.pt", "safetensors.index.json", "mindspore", 0.0)
    faster_row(bench, "e1024.pt -> 4 shards", lambda threads: bench.convert(shards, workers=threads)["seconds"], FASTER)
    source = bench.source("e1024.pt")
    faster_row(bench, "reads and writes of 4 shards", lambda threads: bare_copy_seconds(bench, source, threads))
    one = Conversion("e1024.pt", "pkl", "megengine", 0.0)
    faster_row(bench, str(one), lambda threads: bench.convert(one, workers=threads)["seconds"], FASTER)
    heading("four files, two at a time beside one after another; and so with cp, for what the disk allows", columns)
    bench.keep_only()
    quarter = Bench(bench.folder, bench.gigabytes / 4, bench.pairs)
    files = [str(quarter.source(f"e1024-{number}.pt")) for number in range(4)]
    for ending, to in TARGETS:
        measure = functools.partial(at_once_seconds, bench, files, to, ending)
        faster_row(bench, f"e1024.pt -> .{ending}", measure, FASTER)
    faster_row(bench, "cp", lambda together: copies_seconds(bench, files, together))
    heading("four files by one command beside a command for each, which starts four processes", columns)
    for ending, to in TARGETS:
        for more in ((), ("--no-verify",)):
            options = ("--to", to, "--num-heads", str(HEADS), *more)
            title = f"4 .pt -> .{ending}{', unverified' if more else ''}"
            faster_row(bench, title, functools.partial(commands_seconds, bench, files, ending, options))


def faster_row(bench: Bench, title: str, measure: Callable[[int], float], limit: float | None = None) -> None:
    """How much faster two are than one: of more pairs, since the median of seven changes by a twentieth each time."""
    rows = [[measure(count) for count in (1, 2)] for _ in range(2 * bench.pairs + 2)]
    alone, together = ([row[which] for row in rows[1:]] for which in (0, 1))
    median, shortest = ratios(alone, together)
    met = "" if limit is None else f"{limit:>5} {bench.verdict(max(median, shortest) >= limit)}"
    print(f"{title:<33} {min(together):>6.2f} {median:>9.2f} {shortest:>5.2f} {met}", flush=True)


def bare_copy_seconds(bench: Bench, source: Path, threads: int) -> float:
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        return float(bench.job("copy_barely", str(source), folder, threads)["seconds"])


def commands_seconds(bench: Bench, files: list[str], ending: str, options: Sequence[str], count: int) -> float:
    """Of whole processes: one for each file, or (two) one for all."""
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        calls = [[file] for file in files] if count == 1 else [files]
        return sum(seconds([COMMAND, "convert", *call, folder, "--format", ending, *options]) for call in calls)


def at_once_seconds(bench: Bench, files: list[str], to: str, ending: str, count: int) -> float:
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        return float(bench.job("convert_several", files, folder, to, ending, count)["seconds"])


def copies_seconds(bench: Bench, files: list[str], count: int) -> float:
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        start = time.perf_counter()
        for first in range(0, len(files), count):
            running = [subprocess.Popen(["cp", file, folder]) for file in files[first : first + count]]
            assert not any(one.wait() for one in running)
        return time.perf_counter() - start


def sizes(bench: Bench, most: float) -> None:
    """Whether time grows with the size as that of cp does: large files take a GiB longer to write for cp too.

    Before each comes a bare copy that is not measured. A virtual machine's host may take freed memory back, and gives
    it out again at a twelfth of the speed (measured: 0.6 s instead of 0.05 for writing 256 MiB, cp included); whether a
    command has to ask for some depends on what ran before it, so before both the same runs.
    """
    heading(
        f"by size: time beside cp (limit: {LINEAR} times what it is for the smallest), and memory, verified",
        f"{'conversion':<33} {'GiB':>5} {'cp s':>6} {'s':>6} {'s a GiB':>8} {'x cp':>5} {'min':>5} {'grows x':>8} "
        f"{'limit':>5} {'':7} {'MiB':>5} {'limit':>5}",
    )
    for case in (CASES[0], CASES[6]):
        room = 64 + 2 * case.matrix_mebibytes
        first: tuple[float, float] | None = None
        for gigabytes in [size for size in SIZES if size <= most]:
            bench.keep_only()
            one = Bench(bench.folder, gigabytes, bench.pairs)
            source = one.source(case.source)
            size = source.stat().st_size / GIB
            rows = []
            for _ in range(one.pairs + 1):
                bare_copy_seconds(one, source, 1)
                copied = one.copy(source)
                bare_copy_seconds(one, source, 1)
                rows.append((copied, one.convert(case)["seconds"]))
            copies, ours = ([row[which] for row in rows[1:]] for which in (0, 1))
            median, shortest = ratios(ours, copies)
            first = first or (median, shortest)
            grows = min(median / first[0], shortest / first[1])
            peak = one.convert(case, verify=True)["mebibytes"]
            print(
                f"{case!s:<33} {size:>5.2f} {min(copies):>6.2f} {min(ours):>6.2f} {min(ours) / size:>8.2f} "
                f"{median:>5.2f} {shortest:>5.2f} {grows:>8.2f} {LINEAR:>5} {bench.verdict(grows <= LINEAR):<7} "
                f"{peak:>5.0f} {room:>5} {bench.verdict(peak <= room)}",
                flush=True,
            )
    bench.keep_only()


def peers(bench: Bench) -> None:
    """Whole processes, imports included: that is what one waits for."""
    heading(
        "beside what others do, whole processes (ours without and with verification)",
        f"{'other':<40} {'s':>6} {'MiB':>5} {'ours s':>7} {'MiB':>4} {'faster x':>9} {'limit':>5} {'':7} "
        f"{'memory':>7} {'limit':>5} {'':7} {'verified':>8}",
    )
    for title, job, source, (ending, to), limit in PEERS:
        missing = why_not(job)
        if missing:
            print(f"{title:<40} skipped: {missing}", flush=True)
            continue
        bench.keep_only(source.partition(".")[0])
        case = Conversion(source, ending, to, 0.0)
        rows = [peer_row(bench, job, case) for _ in range(bench.pairs)]
        theirs, ours, checked = zip(*rows, strict=True)
        faster = max(ratios([one for one, _ in theirs], [one for one, _ in ours]))
        verified = max(ratios([one for one, _ in theirs], [one for one, _ in checked]))
        memory = max(peak for _, peak in ours) / max(peak for _, peak in theirs)
        wanted = "" if limit is None else f"{limit:.0f}"
        print(
            f"{title:<40} {min(theirs)[0]:>6.2f} {max(peak for _, peak in theirs):>5.0f} {min(ours)[0]:>7.2f} "
            f"{max(peak for _, peak in ours):>4.0f} {faster:>9.1f} {wanted:>5} "
            f"{bench.verdict(faster >= limit) if limit else '':<7} {memory:>7.2f} {0.1 if limit else '':>5} "
            f"{bench.verdict(memory <= 0.1) if limit else '':<7} {verified:>8.1f}",
            flush=True,
        )


def why_not(job: str) -> str:
    """Why a peer cannot be measured here; nothing when it can."""
    if job == "packed_megengine" and job not in PYTHONS:
        return "it is not installed (mhabridge backends install megengine)"
    if job != "troubleshooter":
        return ""
    if importlib.util.find_spec(job) is None:
        return "it is not installed (pip install --no-deps troubleshooter)"
    tried = subprocess.run([sys.executable, "-c", f"import {job}"], capture_output=True, text=True)
    return f"it cannot be imported ({tried.stderr.strip().splitlines()[-1]})" if tried.returncode else ""


def peer_row(bench: Bench, job: str, case: Conversion) -> list[tuple[float, float]]:
    """Seconds and peak memory of the peer, of ours, and of ours with verification."""
    source = str(bench.source(case.source))
    row = []
    runs: tuple[Callable[[Path], dict[str, Any]], ...] = (
        lambda target: bench.job(job, source, str(target)),
        lambda target: bench.job("convert", source, str(target), case.to, HEADS, False),
        lambda target: bench.job("convert", source, str(target), case.to, HEADS, True),
    )
    for run in runs:
        kept = set(bench.folder.iterdir())
        with bench.target(case.ending) as target:
            start = time.perf_counter()
            found = run(target)
            row.append((time.perf_counter() - start, found["mebibytes"]))
        for made in set(bench.folder.iterdir()) - kept:
            made.unlink()
    return row


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--gigabytes", type=float, default=1.0, help="of the checkpoints (1)")
    options.add_argument("--pairs", type=int, default=7, help="how often all is measured (7); two beside one twice so")
    options.add_argument("--most-gigabytes", type=float, default=4.0, help="of those for time and memory by size (4)")
    options.add_argument("--folder", help="where checkpoints are made; the temporary folder unless given")
    options.add_argument("--no-peers", action="store_true", help="leave out what others do")
    given = options.parse_args()
    largest = max(given.gigabytes, given.most_gigabytes)
    with tempfile.TemporaryDirectory(prefix="mhabridge-", dir=given.folder) as folder:
        free = shutil.disk_usage(folder).free
        if free < ROOM * largest * GIB:
            print(f"{folder}: {free / GIB:.1f} GiB free, {ROOM * largest:.1f} needed; try --gigabytes 0.25 or --folder")
            return 2
        bench = Bench(Path(folder), given.gigabytes, given.pairs)
        print(f"checkpoints of {given.gigabytes} GiB, {given.pairs} pairs; load before: {os.getloadavg()[0]:.1f}")
        against_cp(bench)
        inspecting(bench)
        several(bench)
        sizes(bench, given.most_gigabytes)
        if not given.no_peers:
            peers(bench)
    print(f"\nlimits not met: {bench.failed}; load after: {os.getloadavg()[0]:.1f}")
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main())
