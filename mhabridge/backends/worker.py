"""A worker: calls into another interpreter, which is started when it is first needed and again after it died.

One interpreter serves one call at a time, in its main thread. Threads of the parent take turns; after a fork the child
gets an interpreter of its own.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence
from typing import Any

from mhabridge.backends import limits
from mhabridge.backends.process import Place, Process

START_SECONDS = 120.0  # importing a framework from a cold disk takes a while


class Worker:
    """A framework in another interpreter, on this host or another.

    The interpreter ends with ``close``, when the worker is garbage-collected, and at exit.

    Args:
        python: path of the interpreter. Only the framework and NumPy need to be installed there.
        framework: "torch", "mindspore", "megengine" or "numpy".
        ssh: "host" or "user@host"; None for this host. Port, identity and so on come from the user's ssh configuration.
        ssh_args: more arguments for ssh.
        start_timeout: limit for the start, in seconds; the framework's import counts. None for no limit.
        verbose: show the worker's stderr as it comes; otherwise its end is part of an error, and no more.
        extra_modules: more modules that the worker can import: sources by name.

    Example:
        >>> import sys
        >>> worker = Worker(sys.executable, "numpy")
        >>> worker.call("ping", {"values": [1, 2.5, None]})
        {'values': [1, 2.5, None]}
        >>> worker.close()
    """

    def __init__(
        self,
        python: str,
        framework: str,
        *,
        ssh: str | None = None,
        ssh_args: Sequence[str] = (),
        start_timeout: float | None = START_SECONDS,
        verbose: bool = False,
        extra_modules: dict[str, str] | None = None,
    ) -> None:
        self.place = Place(python, framework, ssh, tuple(ssh_args))
        self._start_timeout = limits.seconds(start_timeout, "start_timeout")
        self._verbose = verbose
        self._extra_modules = dict(extra_modules or {})
        self._process: Process | None = None
        self._lock = threading.Lock()
        _workers.add(self)

    def call(self, function: str, payload: Any, timeout: float | None = None) -> Any:
        """Call a function of ``service`` in the worker.

        Args:
            function: a name in ``service.FUNCTIONS``, or "module:function".
            payload: a tree (see ``wire``).
            timeout: limit for this call in seconds, apart from a start that it may need; None or inf for no limit.

        Returns:
            The function's result, a tree. Its arrays stay valid, and are nobody else's.

        Raises:
            BackendError: the worker did not start, died, or ran out of time (the next call starts a new one), or the
                function raised something that is not an error of ours.
            MHABridgeError: the function raised it.
            ArgumentTypeError: the payload is not a tree, or the timeout no number.
            ArgumentError: the timeout is NaN, zero or negative.
        """
        limit = limits.seconds(timeout)
        with self._lock:
            return self._running().call(function, payload, limit)

    def describe(self) -> dict[str, Any]:
        """The versions of the framework, Python and NumPy in use there, the host and the process id."""
        with self._lock:
            description: dict[str, Any] = self._running().description
            return description

    @property
    def description(self) -> dict[str, Any] | None:
        """What ``describe`` tells, if the interpreter is running; it is not started for this."""
        process = self._process
        return process.description if process and process.alive else None

    def close(self) -> None:
        """End the interpreter, also in the middle of a call by another thread. A later call starts a new one."""
        process, self._process = self._process, None
        if process:
            process.close()

    def _running(self) -> Process:
        if self._process and not self._process.alive:
            self._process.close()
            self._process = None
        if self._process is None:
            self._process = Process(self.place, self, self._start_timeout, self._verbose, self._extra_modules)
        return self._process

    def _forget(self) -> None:
        """In a forked child: the interpreter is the parent's, and so may be a lock that is held."""
        self._lock = threading.Lock()
        self._process = None


_workers: weakref.WeakSet[Worker] = weakref.WeakSet()


def _forget_all() -> None:
    for worker in list(_workers):
        worker._forget()


os.register_at_fork(after_in_child=_forget_all)
