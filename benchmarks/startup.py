"""What it costs to start: ratios to `import numpy`, measured in interleaved pairs of fresh interpreters.

Each ratio is the median over pairs, so a busy moment of the machine hits both halves of a pair or one pair only.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

PAIRS = 31
NUMPY = [sys.executable, "-c", "import numpy"]
EMPTY = [sys.executable, "-c", ""]
COMMAND = str(Path(sys.executable).with_name("mhabridge"))

# title, command, what it is compared with, largest ratio allowed (None: for information)
MEASURED = (
    ("import mhabridge", [sys.executable, "-c", "import mhabridge"], NUMPY, 1.3),
    ("mb.MHASpec", [sys.executable, "-c", "import mhabridge as mb; mb.MHASpec"], NUMPY, None),
    (
        "every light name",
        [sys.executable, "-c", "from mhabridge import MHASpec, MHAWeights, masks, backend"],
        NUMPY,
        None,
    ),
    ("mhabridge --help", [COMMAND, "--help"], NUMPY, 2.0),
    ("python -c ''", EMPTY, NUMPY, None),
)


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def measure(command: list[str], other: list[str]) -> tuple[float, float]:
    """The median ratio and the command's median time in seconds."""
    seconds(command), seconds(other)  # files into the page cache, .pyc files written
    pairs = [(seconds(command), seconds(other)) for _ in range(PAIRS)]
    return statistics.median(one / two for one, two in pairs), statistics.median(one for one, _ in pairs)


def main() -> int:
    print(f"{'start':<20} {'ms':>7} {'x import numpy':>15} {'limit':>6}")
    failed = False
    for title, command, other, limit in MEASURED:
        ratio, median = measure(command, other)
        over = limit is not None and ratio > limit
        failed = failed or over
        shown = "" if limit is None else f"{limit:.1f}"
        print(f"{title:<20} {1e3 * median:>7.1f} {ratio:>15.2f} {shown:>6}{'  OVER' if over else ''}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
