"""Starts a worker's interpreter and outlives it: nothing of it is left when the parent is gone, however that ended.

It stands between the parent and the child, but not in the way: the child has the parent's own pipes as stdin and
stdout. The launcher starts the child in a process group of its own and then only watches:

- the parent, by the hang-up of the pipe that is the child's stdin (its other end belongs to the parent alone) and, in
  case a forked child of the parent keeps that end open, by whose child the launcher itself is. Neither needs the
  worker's interpreter to do anything, so a child deep in a native call dies as well;
- the child's stderr, of which the last part is kept in two files of bounded size;
- the child's end. The status is on disk before the parent can see that the pipe is closed, because the launcher holds
  that open too.

Run with one argument, a JSON object; more arguments are added to the command. On another host there are no files: there
stderr just goes on to ssh, and the exit status is the child's. Standard library only, Python 3.8.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

STDERR_BYTES = 32 * 1024  # of each of the two files that take turns
WATCH_SECONDS = 0.25
GRACE_SECONDS = 0.3  # for a child that ends by itself when its stdin is closed

# Until execnet is up the child's stdout must stay clean, and .pth files, sitecustomize and shell wrappers do print. So
# it starts with stdout going where stderr goes, and with the pipe to the parent on another descriptor, which it puts in
# place as the first thing.
_RESTORE_STDOUT = "import os; os.dup2({pipe}, 1); os.close({pipe}); "


def main() -> None:
    """Start the child, watch, clean up, and exit as the child did."""
    options = json.loads(sys.argv[1])
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    signal.signal(signal.SIGINT, _ignore)  # Ctrl-C is the parent's; a handler, unlike SIG_IGN, is not inherited
    with contextlib.suppress(OSError):
        os.setsid()
    locks = [_lock(directory) for directory in options["directories"]]
    status, parent_gone = _run(options, _command(options, sys.argv[2:]))
    if parent_gone:
        for directory in options["directories"]:
            shutil.rmtree(directory, ignore_errors=True)
    elif options["control"]:
        _write(options["control"], "status", status)
    elif "error" in status:
        print(status["error"], file=sys.stderr, flush=True)
    del locks
    code = status.get("returncode", 127)
    os._exit(code if code >= 0 else 128 - code)


def _stop(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


def _ignore(number: int, frame: Any) -> None:
    pass


def _lock(directory: str) -> int:
    """Hold a shared lock for as long as this process lives: nobody takes the directory for a leftover."""
    handle = os.open(directory, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)
    return handle


def _command(options: dict[str, Any], added: list[str]) -> list[str]:
    command: list[str] = options["command"]
    if options["through_shell"]:  # ssh joins its arguments with spaces and gives them to a shell
        return command + [shlex.quote(argument) for argument in added]
    return command + added


def _run(options: dict[str, Any], command: list[str]) -> tuple[dict[str, Any], bool]:
    """The child's whole life; how it ended, and whether that was because the parent is gone."""
    keeper = _StderrKeeper(options["control"], options["echo"]) if options["control"] else None
    try:
        child = _start(command, options["through_shell"], keeper.pipe if keeper else 2)
    except OSError as error:
        return {"error": f"{type(error).__name__}: {error}"}, False
    try:
        if keeper:
            os.close(keeper.pipe)
        parent_gone = _watch(child, options["parent"], keeper)
        if parent_gone:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(GRACE_SECONDS)
    except SystemExit:
        parent_gone = False
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # grandchildren too, also when the child has ended
        child.wait()
    if keeper:
        keeper.take_rest()
    return {"returncode": child.returncode}, parent_gone


def _start(command: list[str], through_shell: bool, stderr: int) -> subprocess.Popen[bytes]:
    """Start the child in a session, and so a process group, of its own."""
    if through_shell:
        return subprocess.Popen(command, stderr=stderr, start_new_session=True, preexec_fn=_die_with_launcher())
    pipe = os.dup(1)
    command = [*command[:-1], _RESTORE_STDOUT.format(pipe=pipe) + command[-1]]
    try:
        return subprocess.Popen(
            command,
            stdout=stderr,
            stderr=stderr,
            pass_fds=[pipe],
            start_new_session=True,
            preexec_fn=_die_with_launcher(),
        )
    finally:
        os.close(pipe)


def _die_with_launcher() -> Any:
    """What makes the child die if the launcher is killed; Linux only (prctl PR_SET_PDEATHSIG)."""
    if not sys.platform.startswith("linux"):
        return None
    import ctypes

    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(1, signal.SIGKILL)


def _watch(child: subprocess.Popen[bytes], parent: int | None, keeper: _StderrKeeper | None) -> bool:
    """Until the child has ended (False) or the parent is gone (True)."""
    poll = select.poll()
    poll.register(0, getattr(select, "POLLRDHUP", 0))  # nothing is read: POLLHUP and POLLERR are always reported
    if keeper:
        poll.register(keeper.source, select.POLLIN)
    while True:
        ready = dict(poll.poll(WATCH_SECONDS * 1000))
        if keeper and keeper.source in ready and not keeper.take():
            poll.unregister(keeper.source)
            keeper = None
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(WATCH_SECONDS)  # stderr is closed: most likely the child is just ending
        if child.poll() is not None:
            return False
        if 0 in ready or (parent and os.getppid() != parent):
            return True


class _StderrKeeper:
    """Keeps the last part of what is written to a pipe in two files, ``stderr`` and, before it, ``stderr.before``."""

    def __init__(self, directory: str, echo: bool) -> None:
        self.path = os.path.join(directory, "stderr")
        self.echo = echo
        self.size = 0
        self.source, self.pipe = os.pipe()

    def take(self) -> bool:
        """Take what there is; False at the end."""
        data = os.read(self.source, 65536)
        if self.echo:
            with contextlib.suppress(OSError):
                os.write(2, data)
        with contextlib.suppress(OSError):  # a full disk must not stop the child
            self._keep(data[-STDERR_BYTES:])
        return bool(data)

    def take_rest(self) -> None:
        """Take what is still in the pipe, without waiting for more, and not for ever."""
        os.set_blocking(self.source, False)
        until = time.monotonic() + WATCH_SECONDS
        with contextlib.suppress(BlockingIOError):
            while time.monotonic() < until and self.take():
                pass

    def _keep(self, data: bytes) -> None:
        if self.size + len(data) > STDERR_BYTES:
            os.replace(self.path, self.path + ".before")
            self.size = 0
        with open(self.path, "ab") as file:
            file.write(data)
        self.size += len(data)


def _write(directory: str, name: str, content: dict[str, Any]) -> None:
    """Write a small JSON file, all of it or nothing."""
    path = os.path.join(directory, name)
    with contextlib.suppress(OSError):
        with open(path + ".new", "w", encoding="utf-8") as file:
            json.dump(content, file)
        os.replace(path + ".new", path)


if __name__ == "__main__":
    main()
