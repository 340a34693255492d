"""However the parent ends, nothing of its worker is left 2 s later: no process, no file."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.test_worker_failures import assert_gone

# A parent that tells who its worker is, then makes a call that never returns in a thread and goes on to its end.
PARENT = """
import json, os, signal, subprocess, sys, threading, time
from pathlib import Path
from mhabridge.backends.worker import Worker

tricks = {"tricks": Path(sys.argv[1]).read_text(encoding="utf-8")}
worker = Worker(sys.executable, "numpy", extra_modules=tricks)
facts = worker.call("tricks:facts", {})
facts["grandchild"] = worker.call("tricks:grandchild", {})
facts["places"] = worker._process._session.places
busy = sys.argv[2]
if busy != "idle":
    threading.Thread(target=worker.call, args=("tricks:" + busy, {}), daemon=True).start()
    time.sleep(0.3)
print(json.dumps(facts), flush=True)
exec(sys.argv[3])
"""
ENDINGS = {
    "returns": "pass",
    "raises": "raise RuntimeError('the parent fails')",
    "sys.exit": "sys.exit(3)",
    "os._exit": "os._exit(0)",
    "aborts": "os.abort()",
    "SIGTERM": "os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)",
    "SIGKILL": "os.kill(os.getpid(), signal.SIGKILL)",
    "SIGKILL while a forked child lives": "os.fork() or time.sleep(20); os.kill(os.getpid(), signal.SIGKILL)",
}


@pytest.mark.parametrize("busy", ["idle", "hang", "hang_in_c"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_nothing_is_left(ending: str, busy: str) -> None:
    facts, parent = run_parent(busy, ENDINGS[ending])
    ended = time.monotonic()
    assert_gone(facts["pid"], facts["launcher"], facts["grandchild"], within=2.0)
    while any(Path(place).exists() for place in facts["places"]):
        assert time.monotonic() < ended + 3.0, "files are left"
        time.sleep(0.02)
    kill_group(parent)


@pytest.mark.parametrize("ending", ["pass", "sys.exit(0)", "worker.close()"])
def test_a_parent_that_just_ends_says_nothing(ending: str, tmp_path: Path) -> None:
    with open(tmp_path / "stderr", "w", encoding="utf-8") as stderr:
        _, parent = run_parent("idle", ending, stderr)
    assert parent.returncode == 0
    assert (tmp_path / "stderr").read_text(encoding="utf-8") == ""


def test_a_parent_in_which_a_worker_is_busy_ends_without_waiting_for_it() -> None:
    started = time.monotonic()
    run_parent("hang_in_c", "started = time.monotonic()")
    assert time.monotonic() - started < 10


def run_parent(
    busy: str, ending: str, stderr: Any = subprocess.DEVNULL
) -> tuple[dict[str, Any], subprocess.Popen[str]]:
    """Run a parent to its end."""
    tricks = Path(__file__).with_name("worker_tricks.py")
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tricks), busy, ending],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        start_new_session=True,
    )
    assert parent.stdout
    with parent.stdout:
        line = parent.stdout.readline()
    parent.wait(10)
    return json.loads(line), parent


def kill_group(parent: subprocess.Popen[str]) -> None:
    """End a forked child that the parent may have left on purpose."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(parent.pid, signal.SIGKILL)
