"""How often an injected fault is named, and how long that takes; and that nothing is named on clean ports.

python benchmarks/diagnosing.py [--singles 400] [--pairs 150] [--clean 200]
"""

from __future__ import annotations

import argparse
import collections
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mhabridge.diff.diagnosis.search import diagnose
from tests.faulty_ports import Trial, draw, right

LIMITS = {1: 0.95, 2: 0.8}
EACH, ENOUGH = 0.6, 6  # of one kind alone, in so many cases: one that is never named would fit into the limit for all
SIZES = (16, 32, 64, 128, 256, 512)


def _measure(trial: Trial) -> tuple[bool, bool, float]:
    """Named; named among what explains it as well; seconds of processor time."""
    start = time.process_time()
    found = diagnose(trial.spec, trial.weights, trial.inputs, trial.call, trial.observed, trial.expected)
    seconds = time.process_time() - start
    named = right(trial, found.faults)
    return named, named or any(right(trial, other) for other in found.others), seconds


def _table(count: int, seeds: int) -> bool:
    rows: dict[str, list[tuple[bool, bool, float]]] = collections.defaultdict(list)
    for seed in range(10_000, 10_000 + seeds):
        trial = draw(seed, count, sizes=SIZES)
        if trial is None:
            continue
        result = _measure(trial)
        groups = [each.group for each in trial.injected] if count == 1 else []
        keys = ["all", trial.spec.dtype, f"layout {trial.layout}", f"weights {trial.returned}"]
        keys.append("E <= 64" if trial.spec.embed_dim <= 64 else "E > 64")
        for key in keys + [f"  {group}" for group in groups]:
            rows[key].append(result)
    what = {0: "clean ports", 1: "single faults", 2: "pairs of faults"}[count]
    print(f"\n{what:<28} {'cases':>6} {'named':>7} {'listed':>7} {'median s':>9} {'longest s':>9}")
    for key, results in sorted(rows.items(), key=lambda item: (item[0].startswith("  "), item[0] != "all", item[0])):
        named, listed, seconds = zip(*results, strict=True)
        shares = f"{statistics.mean(named):>7.1%} {statistics.mean(listed):>7.1%}"
        print(
            f"{key:<28} {len(results):>6} {shares} {statistics.median(seconds):>9.2f} {max(seconds):>9.2f}", flush=True
        )
    share = statistics.mean(named for named, _, _ in rows["all"])
    kinds = [results for key, results in rows.items() if key.startswith("  ") and len(results) >= ENOUGH]
    each = min((statistics.mean(named for named, _, _ in results) for results in kinds), default=1.0)
    return share >= LIMITS.get(count, 1.0) and each >= EACH  # of clean ports "named" says that nothing was


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("singles", 400), ("pairs", 150), ("clean", 200)):
        parser.add_argument(f"--{name}", type=int, default=default, help="how many seeds to draw")
    options = parser.parse_args()
    good = [_table(0, options.clean), _table(1, options.singles), _table(2, options.pairs)]
    print(f"\nlimits: {LIMITS[1]:.0%} of single faults ({EACH:.0%} of each kind), ", end="")
    print(f"{LIMITS[2]:.0%} of pairs, nothing on clean ports")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
