"""One life of a worker: an interpreter started through the launcher, an execnet channel to it, and its end.

A ``Process`` is used by one caller at a time (``worker.Worker`` sees to that). When anything goes wrong in the middle
of a call it is ended rather than left out of step, and the error says how: the signal or the exit status, and the end
of its stderr.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import execnet
from execnet import gateway_base, gateway_bootstrap, gateway_io

from mhabridge import mapping
from mhabridge.backends import shipping, wire
from mhabridge.backends.line import Line, Offer
from mhabridge.backends.session import Session
from mhabridge.errors import BackendError, MHABridgeError, from_dict

END_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Place:
    """Which interpreter a worker runs in, and for which framework.

    Args:
        python: path of the interpreter on its own host; it is run as given, because a virtual environment's link must
            not be resolved.
        framework: whose adapter it gets.
        ssh: "host" or "user@host"; None for this host.
        ssh_args: more arguments for ssh, such as ("-F", "config").
    """

    python: str
    framework: str
    ssh: str | None = None
    ssh_args: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.python} on {self.ssh}" if self.ssh else self.python


class Process:
    """A running worker.

    Args:
        place: where.
        owner: when this object is collected, and at exit, the worker is ended.
        start_timeout: limit for the interpreter's start, in seconds; None for no limit.
        echo: show the worker's stderr as it comes.
        extra_modules: more modules for the worker: sources by name.

    Raises:
        BackendError: it did not start; the error says why.
    """

    def __init__(
        self,
        place: Place,
        owner: object,
        start_timeout: float | None = 120.0,
        echo: bool = False,
        extra_modules: dict[str, str] | None = None,
    ) -> None:
        self.place = place
        self.number = 0
        self._limit_hit: float | None = None
        self._closed = False
        self._session = Session()
        self._outbox = None if place.ssh else wire.Outbox(self._session.places)
        self._launcher: subprocess.Popen[bytes] | None = None
        self._gateway: Any = None
        self._line: Line | None = None
        self._finalizer = weakref.finalize(owner, self.close)
        _processes.add(self)
        try:
            with self._guarded("while it started", start_timeout):
                self._start(echo, extra_modules or {})
                self.description: dict[str, Any] = self.call("describe", {})
        except MHABridgeError:
            self.close()
            raise

    def call(self, function: str, payload: Any, timeout: float | None = None) -> Any:
        """One call; see ``Worker.call``."""
        self.number += 1
        request = {"number": self.number, "function": function, "payload": payload}
        with self._guarded(f"during {function!r}", timeout):
            wire.send(self._put, request, self._outbox)
            reply = wire.receive(self._get, public=True)
            if reply["number"] != self.number:
                raise AssertionError(f"reply {reply['number']} to call {self.number}")
        return self._result(function, reply)

    @property
    def alive(self) -> bool:
        """Whether it can take a call: not when it ended since the last one, nor when its directories were deleted."""
        usable = not self._closed and self._limit_hit is None and self._session.complete
        return usable and bool(self._gateway.hasreceiver())

    def close(self) -> None:
        """End the worker now, whatever it is doing; this takes a fraction of a second.

        It may run in any thread, when the owner is collected, and at exit, when no thread can be started (since 3.12).
        """
        if self._closed:
            return
        self._closed = True
        self._finalizer.detach()
        self._end()
        if self._line:
            self._line.close()
        self._session.close()

    def abandon(self) -> None:
        """In a forked child: see to it that nothing said here reaches the worker, which belongs to the parent."""
        self._closed = True
        self._finalizer.detach()
        if self._line:
            self._line.close()
        if self._launcher and self._launcher.stdin and not self._launcher.stdin.closed:
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, self._launcher.stdin.fileno())
            os.close(silence)

    def _start(self, echo: bool, extra_modules: dict[str, str]) -> None:
        spec = execnet.XSpec("popen//execmodel=main_thread_only")
        spec.python = shipping.launcher_command(
            self.place.python, self.place.ssh, self.place.ssh_args, self._session.control, self._session.places, echo
        )
        spec.id = "worker"
        # Not through an execnet.Group: that gives the launcher away only once the interpreter has answered, and its
        # clean-up at exit would kill the launcher, and in a forked child talk into its parent's channel.
        pipes = gateway_io.create_io(spec, execmodel=gateway_base.get_execmodel("thread"))
        self._launcher = pipes.popen
        self._gateway = gateway_bootstrap.bootstrap(pipes, spec)
        channel = self._gateway.remote_exec(shipping.source("mhabridge.backends.child"))
        self._put, self._get = channel.send, channel.receive
        given = {
            "modules": {**shipping.sources(self.place.framework), **extra_modules},
            "tables": mapping.tables(),
            "framework": self.place.framework,
        }
        if self.place.ssh:
            channel.send({**given, "places": None, "line": None})
            return
        with contextlib.closing(Offer(self._session.places[0])) as offer:
            channel.send({**given, "places": self._session.places, "line": offer.path})
            channel.receive()
            self._line = offer.accept()
        self._put, self._get = self._line.put, self._line.get

    @contextlib.contextmanager
    def _guarded(self, doing: str, timeout: float | None) -> Iterator[None]:
        """Keep to the time limit, and end the worker if it dies or is left in the middle of something."""
        timer = threading.Timer(timeout, self._hit_limit, (timeout,)) if timeout is not None else None
        if timer:
            timer.daemon = True
            timer.start()
        try:
            yield
        except MHABridgeError:  # raised before anything was sent
            raise
        except (EOFError, OSError, AssertionError, execnet.RemoteError) as error:
            raise self._post_mortem(doing, error) from None
        except BaseException:  # Ctrl-C above all
            self.close()
            raise
        finally:
            if timer:
                timer.cancel()

    def _hit_limit(self, timeout: float) -> None:
        self._limit_hit = timeout
        self._end()

    def _end(self) -> None:
        """Have the launcher kill the child's process group and end; where it does not answer, kill it too."""
        if self._launcher is None:
            return
        self._launcher.terminate()
        try:
            self._launcher.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._launcher.kill()  # the child goes with it, see the launcher
            self._launcher.wait()
        if self._line:
            self._line.cut()
        if self._launcher.stdin:
            with contextlib.suppress(OSError, ValueError):  # it is broken, or closed already
                self._launcher.stdin.close()

    def _post_mortem(self, doing: str, error: Exception) -> BackendError:
        """End it, and say what is known about how it ended."""
        status = self._wait_for_status()
        if status is None:
            self._end()
        stderr = self._session.stderr()
        self.close()
        died = BackendError(
            f"worker for {self.place.framework} ({self.place})",
            given=f"{self._ending(status, error)} {doing}",
            expected="an answer",
            advice=_advice(stderr, error, bool(self.place.ssh)),
        )
        if self._limit_hit is None and status and "returncode" in status:
            died.ending = _signal_or_status(status["returncode"], bool(self.place.ssh))
        return died

    def _wait_for_status(self) -> dict[str, Any] | None:
        """What the launcher says about the end; a line is closed a little before that is written."""
        until = time.monotonic() + END_SECONDS
        while self._gateway and self._gateway.hasreceiver() and time.monotonic() < until:
            time.sleep(0.005)
        return self._session.read("status")

    def _ending(self, status: dict[str, Any] | None, error: Exception) -> str:
        if self._limit_hit is not None:
            return f"no answer within the limit of {self._limit_hit:g} s"
        if status is None:
            return (
                f"the connection was lost ({type(error).__name__}: {str(error).splitlines()[-1] if str(error) else ''})"
            )
        if "error" in status:
            return f"the interpreter cannot be run: {status['error']}"
        return f"the worker {_how_it_ended(status['returncode'], bool(self.place.ssh))}"

    def _result(self, function: str, reply: dict[str, Any]) -> Any:
        if "error" in reply:
            raise from_dict(reply["error"])
        if "failure" in reply:
            failure = reply["failure"]
            raise BackendError(
                f"{function!r} in the worker for {self.place.framework} ({self.place})",
                given=f"{failure['type']}: {failure['text']}",
                advice=f"Its traceback ends with:\n{failure['traceback']}",
            )
        return reply["result"]


def _how_it_ended(code: int, through_ssh: bool) -> str:
    """A wait status in words. Through ssh a signal shows as 128 + its number; 255 is ssh's own failure."""
    if through_ssh and code == 255:
        return "could not be reached: ssh failed"
    how = _signal_or_status(code, through_ssh)
    return f"ended with {how}" if how.startswith("exit status") else f"was killed by {how}"


def _signal_or_status(code: int, through_ssh: bool) -> str:
    number = code - 128 if through_ssh and code > 128 else -code
    if number <= 0:
        return f"exit status {code}"
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _advice(stderr: str, error: Exception, through_ssh: bool) -> str:
    parts = []
    if isinstance(error, AssertionError) and through_ssh:
        parts.append("Something on that host prints when a shell starts: make its start-up files silent.")
    parts.append("The next call starts a new worker.")
    if isinstance(error, execnet.RemoteError):
        parts.append(f"It said:\n{error}")
    if stderr:
        parts.append(f"Its stderr ends with:\n{stderr}")
    return " ".join(parts)


def end_all() -> None:
    """End every worker of this process, also one that is just starting: calls in other threads fail, and return."""
    for process in list(_processes):
        process.close()


def _abandon_all() -> None:
    """Also those that another thread of the parent is just starting: at its exit the child would end them."""
    for process in list(_processes):
        process.abandon()
        _abandoned.append(process)


_processes: weakref.WeakSet[Process] = weakref.WeakSet()
_abandoned: list[Process] = []  # kept: execnet's objects would say goodbye to the worker when collected
os.register_at_fork(after_in_child=_abandon_all)
