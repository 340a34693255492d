"""Compares many pairs of stored tensors, in several threads: reading and adding up both let go of the interpreter."""

from __future__ import annotations

import concurrent.futures
import os
import threading
from collections.abc import Callable, Iterator, Sequence

from mhabridge.checkpoint.storage.memory import Scratch
from mhabridge.diff.checkpoints import streaming
from mhabridge.diff.checkpoints.streaming import Found, Side
from mhabridge.diff.comparing import Comparison
from mhabridge.errors import ArgumentError

Progress = Callable[[int, int], None]
Task = tuple[int, int, int]  # the number of a pair, the first element, and how many
MOST_WORKERS = 4  # threads; more would wait for memory
_STRETCH = 8 << 20  # elements that one thread takes of a large tensor
_TOGETHER = 2 << 20  # elements: to hand over a small tensor by itself takes longer than to compare it
_LITTLE = 64 << 10  # elements
_MOST_TOGETHER = 256  # so that progress is seen, and adding up stays cheap
_memory = threading.local()


def compare_all(
    pairs: Sequence[tuple[Side, Side]], workers: int | None = None, progress: Progress | None = None
) -> list[Comparison]:
    """The verdict on each pair; both of one are of equal size.

    Args:
        pairs: of tensors.
        workers: threads; None for as many as there are processors, at most ``MOST_WORKERS``.
        progress: called with the bytes done and the bytes in all.

    Raises:
        ArgumentError: workers is no number of threads.
        CheckpointError: a file cannot be read.
    """
    count = _count(workers)
    ways = [streaming.alike(*pair) for pair in pairs]
    tasks = [(number, *stretch) for number, way in enumerate(ways) for stretch in _stretches(*way)]
    tasks.sort(key=lambda task: task[2] < _LITTLE)  # their many short steps would make the others wait in between
    done, whole = 0, sum(one.tensor.nbytes + other.tensor.nbytes for one, other in pairs)
    results: list[Found | None] = [None] * len(pairs)
    for (number, _, elements), found in zip(tasks, _measured(ways, tasks, count), strict=True):
        kept = results[number]
        if kept is None:
            results[number] = found
        else:
            kept.join(found)
        done += elements * sum(side.tensor.item_size for side in pairs[number])
        if progress is not None:
            progress(done, whole)
    return [
        streaming.verdict(*pair, found, turned=way != pair)
        for pair, way, found in zip(pairs, ways, results, strict=True)
        if found is not None
    ]


def _count(workers: int | None) -> int:
    if workers is None:
        return min(
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, MOST_WORKERS
        )
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ArgumentError("workers", given=repr(workers), expected="a number of threads, or None")
    return workers


def _stretches(first: Side, second: Side) -> Iterator[tuple[int, int]]:
    """Where each task starts, and how many elements it has: tensors that lie as they are can be divided."""
    size = first.tensor.size
    step = _STRETCH if first.tensor.plain and second.tensor.plain else max(size, 1)
    for start in range(0, max(size, 1), step):
        yield start, min(step, size - start)


def _measured(ways: Sequence[tuple[Side, Side]], tasks: Sequence[Task], workers: int) -> Iterator[Found]:
    sheet = streaming.sheet_size(workers)

    def one(task: Task) -> Found:
        number, start, count = task
        return streaming.measure(*ways[number], _scratches(), sheet, start, count)

    if workers == 1:
        yield from map(one, tasks)
        return
    pool = concurrent.futures.ThreadPoolExecutor(workers)
    try:
        for found in pool.map(lambda some: [one(task) for task in some], _bundles(tasks)):
            yield from found
    finally:
        pool.shutdown(cancel_futures=True)


def _bundles(tasks: Sequence[Task]) -> Iterator[list[Task]]:
    """Tasks in their order, small ones together."""
    bundle: list[Task] = []
    for task in tasks:
        bundle.append(task)
        if sum(one[2] for one in bundle) >= _TOGETHER or len(bundle) >= _MOST_TOGETHER:
            yield bundle
            bundle = []
    if bundle:
        yield bundle


def _scratches() -> tuple[Scratch, Scratch]:
    """Memory of this thread."""
    kept: dict[str, tuple[Scratch, Scratch]] = _memory.__dict__
    if "scratches" not in kept:
        kept["scratches"] = Scratch(), Scratch()
    return kept["scratches"]
