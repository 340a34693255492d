"""Work on a few threads: reading, writing, turning matrices and checksums all let go of Python's lock.

Two are enough: more wait for the same file and the same memory (measured), and each takes memory of its own.
"""

from __future__ import annotations

import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent import futures
from types import TracebackType

from mhabridge.checkpoint.storage.memory import Scratch

WORTH_A_THREAD = 1 << 20  # bytes: what is smaller takes no longer than handing it over
_MOST = 2
_PATIENCE = 0.1  # seconds


def usual_count(beside: int = 1) -> int:
    """How many threads to work on: two where there are two processors.

    Args:
        beside: how many such are at work at a time.

    Example:
        >>> usual_count() in (1, 2), usual_count(1000)
        (True, 1)
    """
    processors = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return min(_MOST, max(len(processors) // beside, 1))


class Stopped(Exception):
    """Another job failed or somebody pressed Ctrl-C: what this one makes is not wanted any more."""


class Workers:
    """Threads for the jobs of one file; use it in a ``with`` statement, which waits for all of them.

    Args:
        count: of threads; with one, each job is done when it is given, and nothing runs beside anything.

    Attributes:
        stopped: whether jobs that still run should end; ``Sink`` looks at it.

    Example:
        >>> with Workers(2) as workers:
        ...     done = []
        ...     for number in range(3):
        ...         workers.give(lambda number=number: done.append(number))
        >>> sorted(done)
        [0, 1, 2]
    """

    def __init__(self, count: int) -> None:
        self._pool = futures.ThreadPoolExecutor(count) if count > 1 else None
        self._waiting: deque[futures.Future[None]] = deque()
        self._own = threading.local()
        self.stopped = False

    @property
    def scratch(self) -> Scratch:
        """Memory to work in, which the calling thread has for itself."""
        if not hasattr(self._own, "scratch"):
            self._own.scratch = Scratch()
        return self._own.scratch  # type: ignore[no-any-return]

    def give(self, job: Callable[[], None]) -> None:
        """Have a job done, now or as soon as a thread is free; ``wait`` raises what it raises."""
        if self._pool is None:
            job()
        else:
            self._waiting.append(self._pool.submit(job))

    def give_all(self, jobs: Sequence[Callable[[], None]]) -> None:
        """Have several jobs done, as ``give`` does each.

        None begins before all are given: to hand over the second while the first runs takes as long as Python lets a
        thread wait for its lock (5 ms).
        """
        if self._pool is None:
            for job in jobs:
                job()
            return
        given = threading.Event()

        def done_then(job: Callable[[], None]) -> None:
            while not given.wait(_PATIENCE):
                if self.stopped:  # somebody pressed Ctrl-C before all were given
                    raise Stopped
            job()

        for job in jobs:
            self.give(functools.partial(done_then, job))
        given.set()

    def wait(self) -> None:
        """Wait for all jobs, or until one fails; of several errors that of the job that was given first is raised."""
        futures.wait(self._waiting, return_when=futures.FIRST_EXCEPTION)
        while self._waiting:
            one = self._waiting.popleft()
            if one.done():
                one.result()

    def stop(self) -> None:
        """End the jobs that run, and begin no other; returns when none runs any more."""
        self.stopped = True
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self.stop()
