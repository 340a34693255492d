"""What ``mhabridge diff checkpoints`` costs beside reading both files, in time and memory, and beside what others do.

    python benchmarks/diffing.py [--gigabytes 1] [--pairs 5] [--folder DIR] [--no-peers]

Each diff runs in a process of its own, in turns with ``cat`` of both files to /dev/null, files in the page cache; given
are the median of the paired ratios and the ratio of the shortest times, and the limit counts as met when either is
below it. Time is that of the call, CPU the seconds of all its threads, memory the peak of the whole process. A quarter
of the size shows what grows with it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MAKER = Path(__file__).with_name("converting_worker.py")
LIMIT, MEBIBYTES = 3.0, 200
HEADS = 16
ENDINGS = {"safetensors": "torch", "ckpt": "mindspore", "pkl": "megengine"}
CASES = (  # the model, the two formats, and whether the second file has other numbers
    ("encoder", "safetensors", "safetensors", False),
    ("encoder", "safetensors", "safetensors", True),
    ("encoder", "pt", "ckpt", False),
    ("encoder", "pt", "ckpt", True),
    ("e1024", "pt", "pkl", False),
    ("e1024", "pt", "pkl", True),
    ("e4096", "pt", "pkl", False),
)
LAYERS = {"encoder": 21, "e1024": 64, "e4096": 4}  # of 1 GiB


class Bench:
    """Makes files in a folder when they are first needed, and counts the limits that were not met."""

    def __init__(self, folder: Path, gigabytes: float, pairs: int) -> None:
        self.folder, self.gigabytes, self.pairs, self.failed = folder, gigabytes, pairs, 0

    def made(self, model: str, ending: str, other: bool) -> Path:
        path = self.folder / f"{model}{'-other' if other else ''}.{ending}"
        if path.exists():
            return path
        if ending != "pt":
            source = self.made(model, "pt", other)
            self.make("convert", str(source), str(path), ENDINGS[ending], HEADS, False)
        elif other:
            self.job("shake", str(self.made(model, "pt", False)), str(path))
        elif model == "encoder":
            self.make("make_encoder", str(path), max(round(LAYERS[model] * self.gigabytes), 1))
        else:
            self.make("make_attention", str(path), max(round(LAYERS[model] * self.gigabytes), 1), int(model[1:]))
        return path

    def make(self, name: str, *arguments: Any) -> None:
        subprocess.run([sys.executable, str(MAKER), name, json.dumps(arguments)], check=True, capture_output=True)

    def job(self, name: str, *arguments: str) -> dict[str, Any]:
        command = [sys.executable, __file__, "--job", name, *arguments]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return dict(json.loads(done.stdout.splitlines()[-1]))

    def keep_only(self, model: str) -> None:
        for path in self.folder.iterdir():
            if not path.name.startswith(model):
                path.unlink()

    def verdict(self, met: bool) -> str:
        self.failed += not met
        return "met" if met else "NOT MET"


def reading(*paths: Path) -> tuple[float, float]:
    """Seconds, and those of the processor."""
    start, before = time.perf_counter(), os.times()
    with Path(os.devnull).open("wb") as nowhere:
        subprocess.run(["cat", *map(str, paths)], check=True, stdout=nowhere)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - start, used


def against_reading(bench: Bench) -> None:
    print(
        f"\n{bench.gigabytes} GiB against {bench.gigabytes} GiB\n"
        f"{'files':<30} {'numbers':<7} {'cat s':>6} {'CPU':>5} {'s':>6} {'CPU':>5} "
        f"{'x cat':>6} {'min':>6} {'limit':>5} {'':7} {'MiB':>5} {'limit':>5}",
        flush=True,
    )
    for model, one, two, other in CASES:
        bench.keep_only(model)
        first = bench.made(model, one, False)
        second = bench.made(model, two, other)
        if first == second:
            second = first.with_name(f"{model}-copy.{one}")
            subprocess.run(["cp", str(first), str(second)], check=True)
        rows = [(reading(first, second), bench.job("diff", str(first), str(second))) for _ in range(bench.pairs + 1)]
        cats, ours = [row[0][0] for row in rows[1:]], [row[1]["seconds"] for row in rows[1:]]
        median = statistics.median(mine / cat for cat, mine in zip(cats, ours, strict=True))
        shortest, peak = min(ours) / min(cats), max(row[1]["mebibytes"] for row in rows)
        names, numbers = f"{model}.{one} / .{two}", "other" if other else "same"
        used, cpu = min(row[0][1] for row in rows), min(row[1]["cpu"] for row in rows)
        wanted = "off" if other else "equal"
        assert all(row[1]["verdict"] == wanted for row in rows), [row[1]["verdict"] for row in rows]
        print(
            f"{names:<30} {numbers:<7} {min(cats):>6.2f} {used:>5.2f} {min(ours):>6.2f} {cpu:>5.2f} "
            f"{median:>6.2f} {shortest:>6.2f} {LIMIT:>5.1f} {bench.verdict(min(median, shortest) <= LIMIT):<7} "
            f"{peak:>5.0f} {MEBIBYTES:>5} {bench.verdict(peak <= MEBIBYTES)}",
            flush=True,
        )


def peers(bench: Bench) -> None:
    print(f"\nwhat others take for the same numbers, {bench.gigabytes} GiB against {bench.gigabytes} GiB")
    bench.keep_only("encoder")
    first = bench.made("encoder", "safetensors", False)
    second = bench.made("encoder", "safetensors", True)
    for name in ("reprod_log", "polygraphy"):
        if importlib.util.find_spec(name) is None:
            print(f"{name:<30} not installed here")
            continue
        try:
            found = bench.job(name, str(first), str(second))
        except subprocess.CalledProcessError as error:
            print(f"{name:<30} failed: {str(error.stderr).strip().splitlines()[-1]}")
            continue
        print(f"{name:<30} {found['seconds']:>6.2f} s {found['mebibytes']:>6.0f} MiB", flush=True)


# -- jobs, each in a process of its own --


def diff(first: str, second: str) -> dict[str, Any]:
    from mhabridge.diff.checkpoints import diff_checkpoints

    start, used = time.perf_counter(), time.process_time()
    report = diff_checkpoints(first, second)
    return {
        "seconds": time.perf_counter() - start,
        "cpu": time.process_time() - used,
        "verdict": report.verdict,
        "entries": len(report.entries),
    }


def shake(source: str, target: str) -> dict[str, Any]:
    """Another training of the same model: every number is another one."""
    import torch

    state = torch.load(source, weights_only=True)
    torch.save({name: tensor + 0.01 * torch.randn(tensor.shape) for name, tensor in state.items()}, target)
    return {"seconds": 0.0}


def reprod_log(first: str, second: str) -> dict[str, Any]:
    """Its helper takes two dicts of arrays, which it would read from .npy files; that reading is not counted."""
    from reprod_log import ReprodDiffHelper  # type: ignore[import-not-found]
    from safetensors.numpy import load_file

    mine, theirs = load_file(first), load_file(second)
    start = time.perf_counter()
    helper = ReprodDiffHelper()
    helper.compare_info(mine, theirs)
    helper.report(path=os.devnull)
    return {"seconds": time.perf_counter() - start}


def polygraphy(first: str, second: str) -> dict[str, Any]:
    from polygraphy.comparator import Comparator, CompareFunc, IterationResult, RunResults  # type: ignore[import-not-found]
    from safetensors.numpy import load_file

    start = time.perf_counter()
    results = RunResults()
    for path in (first, second):
        results.append((path, [IterationResult(load_file(path))]))
    Comparator.compare_accuracy(results, compare_func=CompareFunc.simple(check_error_stat="max"))
    return {"seconds": time.perf_counter() - start}


def peak_mebibytes() -> float:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def main() -> int:
    if sys.argv[1:2] == ["--job"]:
        found = globals()[sys.argv[2]](*sys.argv[3:])
        print("\n" + json.dumps({**found, "mebibytes": peak_mebibytes()}))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--folder", default=None)
    parser.add_argument("--no-peers", action="store_true")
    given = parser.parse_args()
    failed = 0
    for size in dict.fromkeys((given.gigabytes / 4, given.gigabytes)):
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            bench = Bench(Path(folder), size, given.pairs)
            against_reading(bench)
            if size == given.gigabytes and not given.no_peers:
                peers(bench)
            failed += bench.failed
    print(f"\nlimits not met: {failed}; load after: {os.getloadavg()[0]:.1f}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
