"""What goes wrong in a worker: each ends in a BackendError that says how, in bounded time, and the next call works."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mhabridge.backends import session
from mhabridge.backends.worker import Worker
from mhabridge.errors import ArgumentError, ArgumentTypeError, BackendError

TRICKS = {"tricks": Path(__file__).with_name("worker_tricks.py").read_text(encoding="utf-8")}
SOON = 5.0  # seconds within which a failure must be reported


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    made = Worker(sys.executable, "numpy", extra_modules=TRICKS)
    yield made
    made.close()


def fail(worker: Worker, function: str, payload: Any = None, timeout: float | None = None) -> BackendError:
    """Call, expect a BackendError soon, and see that the next call gets a new worker."""
    before = worker.call("tricks:facts", {})
    started = time.monotonic()
    with pytest.raises(BackendError) as raised:
        worker.call(f"tricks:{function}", payload or {}, timeout)
    assert time.monotonic() - started < SOON + (timeout or 0)
    after = worker.call("tricks:facts", {})
    assert after["pid"] != before["pid"]
    assert_gone(before["pid"], before["launcher"])
    return raised.value


def assert_gone(*pids: int, within: float = 2.0) -> None:
    """None of the processes is left, except as a zombie of somebody else's."""
    until = time.monotonic() + within
    while left := [pid for pid in pids if is_running(pid)]:
        assert time.monotonic() < until, f"still running: {left}"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_is_running_tells_the_living_from_the_dead() -> None:
    assert is_running(os.getpid())
    with pytest.raises(AssertionError, match="still running"):
        assert_gone(os.getpid(), within=0.05)


@pytest.mark.parametrize(
    ("function", "payload", "ending"),
    [
        ("segfault", {}, "was killed by SIGSEGV"),
        ("abort", {}, "was killed by SIGABRT"),
        ("kill_self", {}, "was killed by SIGKILL"),
        ("exit_now", {"status": 3}, "ended with exit status 3"),
        ("exit_now", {"status": 0}, "ended with exit status 0"),
    ],
)
def test_a_worker_that_ends_says_how(worker: Worker, function: str, payload: Any, ending: str) -> None:
    assert ending in fail(worker, function, payload).given


def test_the_error_names_the_call_the_interpreter_and_the_end_of_stderr(worker: Worker) -> None:
    error = fail(worker, "segfault")
    assert sys.executable in error.subject
    assert "during 'tricks:segfault'" in error.given
    assert "about to read address 0" in error.advice


@pytest.mark.parametrize("function", ["hang", "hang_in_c"])
def test_a_call_that_hangs_ends_at_its_limit(worker: Worker, function: str) -> None:
    assert "no answer within the limit of 0.5 s" in fail(worker, function, timeout=0.5).given


@pytest.mark.parametrize(
    "timeout", [0, -1, -0.5, float("nan"), float("-inf"), "5", True, 1j, [1], np.float32("nan"), np.float64(-2)]
)
def test_a_limit_that_is_no_positive_number_is_refused_before_anything_is_started(timeout: Any) -> None:
    fresh = Worker(sys.executable, "numpy")
    with pytest.raises((ArgumentError, ArgumentTypeError), match="a positive number of seconds"):
        fresh.call("ping", {}, timeout)
    assert fresh._process is None
    with pytest.raises((ArgumentError, ArgumentTypeError), match="start_timeout"):
        Worker(sys.executable, "numpy", start_timeout=timeout)


@pytest.mark.parametrize("timeout", [None, float("inf"), 1e300, 10**400, np.float32(60), np.int64(60)])
def test_no_limit_and_far_limits_are_no_trouble(worker: Worker, timeout: Any) -> None:
    assert worker.call("ping", {"a": 1}, timeout) == {"a": 1}


def remove_directories(worker: Worker) -> None:
    assert worker._process is not None
    for place in worker._process._session.places:
        shutil.rmtree(place)


@pytest.mark.parametrize("stopped", [("pid",), ("pid", "launcher")])
@pytest.mark.parametrize("tidied", [False, True])
def test_a_limit_holds_for_stopped_processes_and_without_directories(
    worker: Worker, stopped: tuple[str, ...], tidied: bool
) -> None:
    def hurt(facts: dict[str, Any]) -> None:
        for name in stopped:
            os.kill(facts[name], signal.SIGSTOP)
        if tidied:
            remove_directories(worker)

    facts = worker.call("tricks:facts", {})
    timer = threading.Timer(0.2, hurt, (facts,))
    timer.start()
    assert "no answer within the limit of 0.5 s" in fail(worker, "hang", timeout=0.5).given
    timer.join()


def test_a_stopped_worker_and_launcher_can_be_closed(worker: Worker) -> None:
    facts = worker.call("tricks:facts", {})
    for name in ("launcher", "pid"):
        os.kill(facts[name], signal.SIGSTOP)
    started = time.monotonic()
    worker.close()
    assert time.monotonic() - started < SOON
    assert_gone(facts["pid"], facts["launcher"])


def test_deleted_directories_cost_a_new_worker_and_no_call(worker: Worker) -> None:
    """As those who tidy temporary files up do."""
    before = worker.call("tricks:facts", {})
    remove_directories(worker)
    array = np.ones(3_000_000)
    assert (worker.call("tricks:add_one", {"x": array})["sum"] == 2).all()
    assert worker.call("tricks:facts", {})["pid"] != before["pid"]
    assert_gone(before["pid"], before["launcher"])
    after = worker.call("tricks:facts", {})
    remove_directories(worker)
    started = time.monotonic()
    worker.close()
    assert time.monotonic() - started < 1.0
    assert_gone(after["pid"], after["launcher"])


def test_deleted_files_cost_nothing(worker: Worker) -> None:
    array = np.ones(100_000)
    pid = worker.call("tricks:facts", {"x": array})["pid"]
    assert worker.call("tricks:echo", {"x": array})["x"].sum() == 100_000
    assert worker._process is not None
    kept = [path for place in worker._process._session.places for path in Path(place).glob("array-*")]
    assert kept
    for path in kept:
        path.unlink()
    assert worker.call("tricks:echo", {"x": array})["x"].sum() == 100_000
    assert worker.call("tricks:facts", {})["pid"] == pid


def test_a_dropped_worker_ends_its_interpreter() -> None:
    dropped = Worker(sys.executable, "numpy", extra_modules=TRICKS)
    facts = dropped.call("tricks:facts", {})
    places = dropped._process._session.places if dropped._process else []
    del dropped
    gc.collect()
    assert_gone(facts["pid"], facts["launcher"])
    assert places
    assert not any(Path(place).exists() for place in places)


def test_a_limit_that_is_kept_changes_nothing(worker: Worker) -> None:
    pid = worker.call("tricks:facts", {}, timeout=0.5)["pid"]
    time.sleep(0.6)
    assert worker.call("tricks:facts", {})["pid"] == pid


def test_printing_wildly_does_no_harm(worker: Worker, capfd: pytest.CaptureFixture[str]) -> None:
    assert worker.call("tricks:print_wildly", {"lines": 3000}) == "done"
    assert worker.call("ping", {"a": 1}) == {"a": 1}
    assert capfd.readouterr() == ("", "")


def test_stderr_is_kept_only_at_its_end_and_shown_only_on_failure(
    worker: Worker, capfd: pytest.CaptureFixture[str]
) -> None:
    assert worker.call("tricks:flood_stderr", {"lines": 3000, "die": False}) == "done"
    assert worker._process is not None
    assert bytes_of_stderr(Path(worker._process._session.control)) <= 2 * 32 * 1024
    error = fail(worker, "flood_stderr", {"lines": 3000, "die": True})
    assert "2999 zzz" in error.advice
    assert len(error.advice) < 5000
    assert capfd.readouterr() == ("", "")


def test_verbose_shows_stderr_as_it_comes(capfd: pytest.CaptureFixture[str]) -> None:
    loud = Worker(sys.executable, "numpy", verbose=True, extra_modules=TRICKS)
    loud.call("tricks:flood_stderr", {"lines": 3, "die": False})
    seen, until = "", time.monotonic() + 10
    while "2 zzz" not in seen and time.monotonic() < until:  # the launcher passes it on in its own time
        time.sleep(0.02)
        seen += capfd.readouterr().err
    loud.close()
    assert "2 zzz" in seen


def test_a_worker_without_stderr_still_works_and_still_dies_well() -> None:
    mute = Worker(sys.executable, "numpy", extra_modules=TRICKS)
    assert mute.call("tricks:close_stderr", {}) == "done"
    time.sleep(0.5)
    assert mute.call("ping", {}) == {}
    assert "SIGABRT" in fail(mute, "abort").given
    mute.close()


def bytes_of_stderr(control: Path) -> int:
    """How much of a worker's stderr is kept. The launcher may turn the two files over meanwhile, so one may vanish."""
    size = 0
    for path in control.glob("stderr*"):
        with contextlib.suppress(FileNotFoundError):
            size += path.stat().st_size
    return size


def while_it_hangs(worker: Worker, action: Callable[[dict[str, Any]], None]) -> BackendError:
    """The error of a call that hangs, once ``action`` has been done to its processes."""
    facts = worker.call("tricks:facts", {})
    timer = threading.Timer(0.3, action, (facts,))
    timer.start()
    error = fail(worker, "hang_in_c")
    timer.join()
    return error


def test_killed_from_outside_in_mid_call(worker: Worker) -> None:
    assert "was killed by SIGKILL" in while_it_hangs(worker, lambda facts: os.kill(facts["pid"], signal.SIGKILL)).given


def test_the_launcher_killed_in_mid_call_takes_the_worker_with_it(worker: Worker) -> None:
    error = while_it_hangs(worker, lambda facts: os.kill(facts["launcher"], signal.SIGKILL))
    assert "the connection was lost" in error.given


def test_killed_between_calls(worker: Worker) -> None:
    before = worker.call("tricks:facts", {})
    os.kill(before["pid"], signal.SIGKILL)
    assert_gone(before["pid"], before["launcher"])
    time.sleep(0.1)
    assert worker.call("tricks:facts", {})["pid"] != before["pid"]


def test_grandchildren_die_with_the_worker(worker: Worker, tmp_path: Path) -> None:
    path = tmp_path / "pid"
    assert "SIGABRT" in fail(worker, "grandchild_and_die", {"path": str(path)}).given
    assert_gone(int(path.read_text()))
    pid = worker.call("tricks:grandchild", {})
    worker.close()
    assert_gone(pid)


def test_interrupting_a_call_ends_the_worker(worker: Worker) -> None:
    """As Ctrl-C does: the reply to the interrupted call must never be taken for the next one's."""
    # MindSpore's first operation in a process takes SIGINT over, and ends the process with it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before = worker.call("tricks:facts", {})
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        worker.call("tricks:hang", {})
    timer.join()
    assert_gone(before["pid"], before["launcher"])
    assert worker.call("ping", {"a": 1}) == {"a": 1}


def test_closing_from_another_thread_ends_a_call(worker: Worker) -> None:
    worker.call("ping", {})
    timer = threading.Timer(0.3, worker.close)
    timer.start()
    with pytest.raises(BackendError, match="hang"):
        worker.call("tricks:hang", {})
    timer.join()
    assert worker.call("ping", {"a": 1}) == {"a": 1}


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        (None, "cannot be run: FileNotFoundError"),
        ("#!/bin/sh\necho this is no python; exit 3\n", "exit status 3"),
        ("#!/bin/sh\nsleep 1000\n", "no answer within the limit"),
        ("#!/bin/sh\nkill -SEGV $$\n", "SIGSEGV"),
    ],
)
def test_an_interpreter_that_does_not_start(tmp_path: Path, script: str | None, problem: str) -> None:
    python = tmp_path / "python"
    if script:
        python.write_text(script, encoding="utf-8")
        python.chmod(0o755)
    broken = Worker(str(python), "numpy", start_timeout=1.0)
    started = time.monotonic()
    with pytest.raises(BackendError, match=problem) as raised:
        broken.call("ping", {})
    assert time.monotonic() - started < SOON
    assert str(python) in str(raised.value)


def test_an_interpreter_that_prints_when_it_starts_does_no_harm(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho hello from a wrapper\nexec {sys.executable} "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    chatty = Worker(str(python), "numpy")
    assert chatty.call("ping", {"a": 1}) == {"a": 1}
    chatty.close()


def test_an_interpreter_without_numpy_says_so(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    with pytest.raises(BackendError, match="No module named 'numpy'"):
        Worker(str(python), "numpy").call("ping", {})


def test_a_missing_framework_is_one_clear_message() -> None:
    without = Worker(sys.executable, "megengine")
    with pytest.raises(BackendError) as raised:
        without.call("ping", {})
    assert "megengine" in raised.value.given
    assert "Traceback" not in str(raised.value)
    assert "mhabridge backends install megengine" in raised.value.advice


def test_nothing_is_left_in_the_file_system(worker: Worker) -> None:
    worker.call("ping", {"x": np.zeros(100_000), "y": np.zeros(3_000_000)})
    assert worker._process is not None
    places = worker._process._session.places
    assert all(Path(place).stat().st_mode & 0o777 == 0o700 for place in places)
    worker.close()
    assert not any(Path(place).exists() for place in places)


def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "_roots", lambda: [str(tmp_path)])
    monkeypatch.setattr(session, "_SETTLE_SECONDS", -1.0)
    living = session.Session()
    abandoned = tmp_path / (session._prefix() + "abandoned")
    abandoned.mkdir()
    session.Session().close()
    assert [str(path) for path in tmp_path.iterdir()] == living.places
    living.close()
    assert not list(tmp_path.iterdir())
