"""What a worker costs: a small call, 100 MB each way, a start. Prints ratios measured in one run.

    python benchmarks/worker.py [PYTHON]

PYTHON is the worker's interpreter (NumPy is all it needs); by default the one that runs this.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np

from mhabridge.backends import backend
from mhabridge.backends.session import Session
from mhabridge.backends.worker import Worker
from mhabridge.calls import Call
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights

MEGABYTES = 100
CALL_LIMIT = 0.5  # ms
LARGE_LIMIT = 3.0  # times
# Functions that give or take an array, but do not touch it: only the way is measured.
FUNCTIONS = """
made = {}

def give(framework, payload):
    import numpy as np
    return {"x": made.setdefault(payload["size"], np.ones(payload["size"], np.uint8))}

def take(framework, payload):
    return payload["x"].size

def timed(framework, payload):
    import time
    from mhabridge.backends import service
    start = time.perf_counter()
    result = service.serve("run", framework, payload)
    return {"seconds": time.perf_counter() - start, "result": result}
"""


def milliseconds(action: Callable[[], object], times: int) -> float:
    """The median time of an action, after one to warm up."""
    action()
    return statistics.median(one(action) for _ in range(times))


def one(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return (time.perf_counter() - start) * 1e3


def one_call(worker: Worker, batch: int, embed_dim: int, num_heads: int) -> float:
    """Self-attention with L=10: the ms that a call takes beyond the function in the worker, which times itself."""
    spec = MHASpec(embed_dim, num_heads, batch_first=True)
    query = np.random.default_rng(0).standard_normal((batch, 10, embed_dim)).astype("float32")
    call = Call(query, query, query)
    payload = {"spec": spec.to_dict(), "weights": MHAWeights.random(spec).arrays(), "call": call.to_tree()}
    size = sum(array.nbytes for array in (*payload["weights"].values(), query, query, query)) / 1e6
    beyond = []
    for _ in range(300):
        start = time.perf_counter()
        inside = worker.call("bench:timed", payload)["seconds"]
        beyond.append((time.perf_counter() - start - inside) * 1e3)
    here = milliseconds(lambda: backend("numpy").call("run", payload), 50)
    print(f"call with N={batch} E={embed_dim} H={num_heads} ({size:.2f} MB there):", end=" ")
    print(f"{statistics.median(beyond):.2f} ms beyond the function; in this process {here:.2f} ms")
    return statistics.median(beyond)


def large_arrays(worker: Worker, place: str) -> float:
    """The worse of two ratios to copying the same bytes into a file's pages and out of them again."""
    array = np.ones(MEGABYTES * 10**6, np.uint8)
    there = milliseconds(lambda: worker.call("bench:take", {"x": array}), 9)
    back = milliseconds(lambda: worker.call("bench:give", {"size": array.size}), 9)
    target = np.empty_like(array)
    path = os.path.join(place, "baseline")
    pages = milliseconds(lambda: through_pages(array, target, path), 9)
    copy = milliseconds(lambda: np.copyto(target, array), 9)
    for way, taken in (("there", there), ("back", back)):
        print(f"{MEGABYTES} MB {way}: {taken:.0f} ms, {taken / pages:.2f} times the page cache (limit {LARGE_LIMIT:g})")
    print(f"  memcpy to and from the page cache: {pages:.0f} ms; plain memcpy: {copy:.0f} ms")
    return max(there, back) / pages


def through_pages(source: np.ndarray, target: np.ndarray, path: str) -> None:
    """Copy into pages that the file has already (after the first time), and out again."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        data, room = memoryview(source), memoryview(target)
        while data:
            data = data[os.write(handle, data) :]
        os.lseek(handle, 0, os.SEEK_SET)
        while room:
            room = room[os.readv(handle, [room]) :]
    finally:
        os.close(handle)


def start(python: str) -> None:
    def begin() -> None:
        worker = Worker(python, "numpy")
        worker.call("ping", {})
        worker.close()

    begun = milliseconds(begin, 3)
    print(f"start, first call and end of a worker: {begun:.0f} ms")


def main() -> int:
    python = sys.argv[1] if len(sys.argv) > 1 else sys.executable
    worker = Worker(python, "numpy", extra_modules={"bench": FUNCTIONS})
    session = Session()
    print(f"worker: {python}, NumPy {worker.describe()['numpy']}; files in {session.places[0]}")
    small = one_call(worker, 2, 64, 4)
    one_call(worker, 8, 128, 8)
    print(f"  an empty call: {milliseconds(lambda: worker.call('ping', {}), 300):.2f} ms")
    large = large_arrays(worker, session.places[0])
    start(python)
    session.close()
    worker.close()
    met = small <= CALL_LIMIT and large <= LARGE_LIMIT
    print(f"N=2 at most {CALL_LIMIT} ms, arrays at most {LARGE_LIMIT:g} times: {'met' if met else 'NOT met'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
