"""The command line as a process: its exit codes, and that nobody ever sees a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mhabridge.backends import settings
from mhabridge.backends.settings import Entry
from mhabridge.cli import main
from tests.test_worker_failures import assert_gone

COMMAND = [sys.executable, "-c", "from mhabridge.cli.main import main; main()"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Settings of this test alone; the working directory too."""
    monkeypatch.setenv("MHABRIDGE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").write_text("text", encoding="utf-8")
    (tmp_path / "nested.json").write_text("[" * 100_000, encoding="utf-8")
    return tmp_path / "home"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False, timeout=60)


ADD = ("backends", "add", "x", "--framework", "numpy", "--python", sys.executable)
ERRORS = {
    ("nonsense",): "No such command",
    ("diff", "--nonsense"): "No such option",
    ("backends", "add", "x"): "Missing option '--python'",
    ("backends", "remove", "nothing"): "no such registered backend",
    ("backends", "install", "nonsense"): "one of torch, mindspore, megengine",
    ("backends", "install", "numpy"): "the reference in this process",
    ("backends", "install", "torch@0.1"): "environments known",
    ("backends", "install", "../x"): "'../x'",
    ("backends", "install", "megengine", "--python", "a_file"): "does not start",
    ("backends", "install", "megengine", "--pip-args", "'"): "No closing quotation",
    (*ADD, "--ssh-args", "'"): "No closing quotation",
    (*ADD, "--ssh", ""): "host or user@host",
    (*ADD[:-1], "a_file"): "cannot be run",
    ("backends", "add", "numpy", "--python", sys.executable): "the reference in this process",
    ("backends", "add", "torch", "--framework", "numpy", "--python", sys.executable): "does not mean torch",
    ("mapping", "torch"): "Missing argument",
    ("mapping", "torch", "nonsense"): "nonsense",
    ("mapping", "torch@", "mindspore"): "'torch@'",
    ("mapping", "torch@1.8.1; rm", "mindspore"): "1.8.1; rm",
    ("mapping", "torch", "mindspore", "--json", "--markdown"): "not both",
    ("diff", "--backends", "numpy,numpy"): "each name once",
    ("diff", "--backends", "numpy", "--spec", "missing.json"): "missing.json",
    ("diff", "--backends", "numpy", "--spec", "nested.json"): "given",
    ("diff", "--backends", "numpy", "--spec", "/"): "readable JSON",
    ("diff", "--backends", "numpy", "--weights", "a_file"): "a_file",
    ("diff", "--backends", "numpy", "--dtype", "int8"): "int8",
    ("diff", "--backends", "numpy", "--num-heads", "7"): "num_heads",
    ("diff", "--backends", "numpy", "--masks", "nonsense"): "nonsense",
}


@pytest.mark.parametrize(
    "arguments", ERRORS, ids=lambda arguments: " ".join(arguments).replace(sys.executable, "PYTHON")
)
def test_an_error_is_a_message_and_exit_code_2(arguments: tuple[str, ...]) -> None:
    assert_refused(run(*arguments), ERRORS[arguments])


def assert_refused(done: subprocess.CompletedProcess[str], text: str) -> None:
    assert done.returncode == 2, done
    assert text in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert "bug in mhabridge" not in done.stderr


@pytest.mark.parametrize("timeout", ["-1", "nan", "0"])
def test_a_limit_that_is_none_is_a_row_that_says_so(timeout: str) -> None:
    done = run("diff", "--backends", "numpy", "--timeout", timeout)
    assert done.returncode == 2
    assert "a positive number of seconds" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("place", ["a_file", "a_file/below", "/proc/x"])
@pytest.mark.parametrize("arguments", [ADD, ("backends", "install", "torch", "--python", sys.executable)])
def test_settings_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], place: str
) -> None:
    monkeypatch.setenv("MHABRIDGE_HOME", place)
    done = run(*arguments)
    if "install" in arguments and "expected Python" in done.stderr:
        pytest.skip("mappings/ knows no environment for this Python")
    assert_refused(done, place)


@pytest.mark.parametrize("content", ["[" * 100_000, "null", '{"format": 1, "backends": [null]}'])
@pytest.mark.parametrize("command", ["list", "doctor"])
def test_damaged_settings(home: Path, content: str, command: str) -> None:
    home.mkdir()
    (home / "backends.json").write_text(content, encoding="utf-8")
    assert_refused(run("backends", command), "Repair it, or delete it")


OUTPUTS = [
    ("--help",),
    ("backends", "list"),
    ("backends", "list", "--json"),
    ("mapping", "torch", "mindspore"),
    ("mapping", "torch", "mindspore", "--json"),
    ("diff", "--backends", "numpy"),
]


@pytest.mark.parametrize("arguments", OUTPUTS, ids=" ".join)
def test_a_full_disk_is_said(arguments: tuple[str, ...]) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run([*COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "mhabridge: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("arguments", OUTPUTS, ids=" ".join)
def test_a_reader_that_has_seen_enough_is_no_error(arguments: tuple[str, ...]) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run([*COMMAND, *arguments], stdout=write_end, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(write_end)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_stderr_on_a_full_disk_changes_no_exit_code() -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run([*COMMAND, "backends", "remove", "nothing"], stderr=full, check=False)
    assert done.returncode == 2


def test_a_shell_can_ask_what_could_be_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(main.COMPLETION, "bash_source")
    done = run()
    assert (done.returncode, done.stderr) == (0, "")
    assert "complete" in done.stdout


@pytest.mark.parametrize("arguments", [("--version",), ("--help",), ("backends",), ("diff", "--backends", "numpy")])
def test_what_can_be_done_is_exit_code_0(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


# -- what nobody foresaw -----------------------------------------------------------------------------------------------


def exit_code(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> int:
    """That of ``main`` around a command that does this."""

    def invoke(context: object) -> None:
        act()

    monkeypatch.setattr(main.cli, "invoke", invoke)
    monkeypatch.setattr(sys, "argv", ["mhabridge", "diff"])
    with pytest.raises(SystemExit) as raised:
        main.main()
    assert isinstance(raised.value.code, int)
    return raised.value.code


def raiser(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            ZeroDivisionError("by\nzero"),
            2,
            "this is a bug in mhabridge: ZeroDivisionError: by zero. Set MHABRIDGE_TRACE",
        ),
        (RecursionError(), 2, "this is a bug in mhabridge: RecursionError"),
        (SystemExit("a text"), 2, "this is a bug in mhabridge: SystemExit: a text"),
        (np.linalg.LinAlgError(), 2, "this is a bug in mhabridge: LinAlgError"),
        (MemoryError("Unable to allocate 1 PiB"), 2, "there is not enough memory. Unable to allocate 1 PiB"),
        (PermissionError(13, "Permission denied", "place"), 2, "Permission denied: 'place'"),
        (BrokenPipeError(), 141, ""),
        (KeyboardInterrupt(), 130, ""),
        (SystemExit(1), 1, ""),
        (SystemExit(), 0, ""),
    ],
)
def test_every_ending_has_its_code_and_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, message: str
) -> None:
    monkeypatch.delenv(main.TRACEBACK, raising=False)
    assert exit_code(monkeypatch, raiser(error)) == code
    said = capsys.readouterr().err
    assert message in said
    assert bool(message) == bool(said)
    assert "Traceback" not in said
    assert said.count("\n") <= 1


def test_the_traceback_can_be_seen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(main.TRACEBACK, "1")
    assert exit_code(monkeypatch, raiser(ZeroDivisionError("by zero"))) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


# -- Ctrl-C ------------------------------------------------------------------------------------------------------------

# An interpreter that tells its pid and then hangs, when it starts or when attention is computed.
HANGS_AT_START = """#!/bin/sh
echo $$ > {busy}
sleep 1000
"""
HANGS_IN_A_CALL = """#!{python}
import os, sys
patch = (
    "import numpy, os, time; "
    "tell = lambda: os.write(os.open({busy!r}, os.O_WRONLY | os.O_CREAT), b'%d%c' % (os.getpid(), 10)); "
    "numpy.exp = lambda *a, **k: (tell(), time.sleep(1000)); "
)
os.execv({python!r}, [{python!r}, *sys.argv[1:-1], patch + sys.argv[-1]])
"""


@pytest.mark.parametrize("text", [HANGS_AT_START, HANGS_IN_A_CALL], ids=["at start", "in a call"])
@pytest.mark.parametrize(
    "arguments", [("diff", "--backends", "slow"), ("backends", "doctor")], ids=lambda arguments: arguments[0]
)
def test_ctrl_c_ends_everything_and_exits_as_other_tools_do(
    tmp_path: Path, text: str, arguments: tuple[str, ...]
) -> None:
    busy = tmp_path / "busy"
    python = tmp_path / "python"
    python.write_text(text.format(python=sys.executable, busy=str(busy)), encoding="utf-8")
    python.chmod(0o755)
    settings.register(Entry("slow", "numpy", str(python)))
    command = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    pid = int(wait_for(busy, command))
    launcher = int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
    command.send_signal(signal.SIGINT)
    stdout, stderr = command.communicate(timeout=10)
    assert command.returncode == 130
    assert (stdout, stderr) == ("", "")
    assert_gone(pid, launcher)


def wait_for(path: Path, command: subprocess.Popen[str]) -> str:
    until = time.monotonic() + 30
    while not (path.exists() and path.read_text(encoding="utf-8").endswith("\n")):
        assert command.poll() is None, command.communicate()
        assert time.monotonic() < until, "it never came so far"
        time.sleep(0.02)
    return path.read_text(encoding="utf-8")
