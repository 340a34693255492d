"""What goes right in a worker: on this interpreter, and on Python 3.8 with NumPy 1.23."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mhabridge.backends import interpreters, shipping
from mhabridge.backends.worker import Worker
from mhabridge.errors import ArgumentTypeError, BackendError, UnsupportedError

TRICKS = {"tricks": Path(__file__).with_name("worker_tricks.py").read_text(encoding="utf-8")}


@pytest.fixture(scope="session")
def python38(request: pytest.FixtureRequest) -> str:
    """A Python 3.8 with NumPy 1.23 and nothing else, kept in pytest's cache folder."""
    assert request.config.cache
    folder = request.config.cache.mkdir("worker-python38")
    python = str(folder / "bin" / "python")
    check = [python, "-I", "-c", "import sys, numpy; assert numpy.__version__.startswith('1.23.')"]
    if not os.path.exists(python) or subprocess.run(check, check=False).returncode:
        try:
            base = interpreters.find(["3.8"])
        except BackendError as error:
            pytest.skip(str(error))
        subprocess.run([base, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "numpy==1.23.5"], check=True)
    return python


@pytest.fixture(scope="module", params=["this python", pytest.param("python 3.8", marks=pytest.mark.frameworks)])
def worker(request: pytest.FixtureRequest) -> Iterator[Worker]:
    python = sys.executable if request.param == "this python" else request.getfixturevalue("python38")
    made = Worker(python, "numpy", extra_modules=TRICKS)
    yield made
    made.close()


def test_it_describes_itself(worker: Worker) -> None:
    described = worker.describe()
    facts = worker.call("tricks:facts", {})
    assert described["framework"] == "numpy"
    assert described["version"] == described["numpy"]
    assert described["python"].startswith("{}.{}.".format(*facts["version"]))
    assert described["pid"] == facts["pid"] != os.getpid()


def test_it_runs_our_modules_isolated_in_the_main_thread_and_in_a_group_of_its_own(worker: Worker) -> None:
    facts = worker.call("tricks:facts", {})
    assert facts["mhabridge"] == "<mhabridge>", "an installed mhabridge was used"
    assert facts["isolated"] == 1
    assert facts["main_thread"]
    assert facts["group"] == facts["pid"]


def test_values_come_back_unchanged(worker: Worker) -> None:
    tree = {"a": [None, True, -1, 2**80, 1.5, float("inf"), "ä", b"\0"], "t": (1, (2, [3])), "empty": {}}
    assert worker.call("ping", tree) == tree


@pytest.mark.parametrize("size", [0, 1, 10_000, 100_000, 3_000_000])
@pytest.mark.parametrize("dtype", ["f2", "f4", ml_dtypes.bfloat16])
def test_arrays_come_back_unchanged(worker: Worker, size: int, dtype: Any) -> None:
    array = (np.arange(size) % 251).astype(dtype)
    found = worker.call("ping", {"x": array, "y": array[::2]})
    assert found["x"].dtype == found["y"].dtype == array.dtype
    assert found["x"].tobytes() == array.tobytes()
    assert found["y"].tobytes() == array[::2].tobytes()


def test_results_outlive_the_next_call_and_the_worker(worker: Worker) -> None:
    sizes = (10, 100_000, 3_000_000)
    results = [worker.call("tricks:big", {"size": size, "value": 1.0})["x"] for size in sizes]
    for size in sizes:
        worker.call("tricks:big", {"size": size, "value": 2.0})
    worker.close()
    for result in results:
        assert (result == 1.0).all()
        result += 1  # it is ours
        assert (result == 2.0).all()


def test_our_errors_arrive_as_themselves(worker: Worker) -> None:
    with pytest.raises(UnsupportedError) as raised:
        worker.call("tricks:raise_ours", {})
    assert str(raised.value) == "attn_mask: given 3 axes; expected 2. Drop one."


def test_other_errors_arrive_with_their_traceback_and_its_source_lines(worker: Worker) -> None:
    pid = worker.call("tricks:facts", {})["pid"]
    with pytest.raises(BackendError) as raised:
        worker.call("tricks:raise_theirs", {})
    assert "KeyError: 'missing on purpose'" in raised.value.given
    assert 'return numbers["missing on purpose"]' in raised.value.advice
    assert worker.call("tricks:facts", {})["pid"] == pid, "the worker was lost to a mere exception"


def test_sys_exit_is_an_error_too(worker: Worker) -> None:
    with pytest.raises(BackendError, match="SystemExit: enough"):
        worker.call("tricks:system_exit", {})


def test_an_unknown_function_is_named(worker: Worker) -> None:
    with pytest.raises(BackendError, match="'pong'"):
        worker.call("pong", {})


@pytest.mark.parametrize("call", [("ping", {"x": object()}), ("tricks:unsendable", {})])
def test_what_is_no_tree_is_refused_and_the_worker_lives(worker: Worker, call: tuple[str, Any]) -> None:
    pid = worker.call("tricks:facts", {})["pid"]
    with pytest.raises(ArgumentTypeError, match="given object"):
        worker.call(*call)
    assert worker.call("tricks:facts", {})["pid"] == pid


def test_threads_take_turns(worker: Worker) -> None:
    found: dict[int, Any] = {}

    def ask(number: int) -> None:
        for _ in range(20):
            found[number] = worker.call("tricks:add_one", {"x": np.full(20_000, number)})["sum"]
            assert (found[number] == number + 1).all()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4


def test_a_forked_child_gets_a_worker_of_its_own(worker: Worker) -> None:
    pid = worker.call("tricks:facts", {})["pid"]
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write_end, str(worker.call("tricks:facts", {})["pid"]).encode())
            worker.close()
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as file:
        other = int(file.read())
    os.waitpid(child, 0)
    assert other != pid
    assert worker.call("tricks:facts", {})["pid"] == pid


def test_a_forked_child_that_ends_leaves_a_worker_alone_that_is_just_starting() -> None:
    """In an interpreter of its own, where a fork may run everything that runs at exit."""
    code = """
import os, sys, threading, time
from mhabridge.backends import process
from mhabridge.backends.worker import Worker

worker = Worker(sys.executable, "numpy")
answers = []
thread = threading.Thread(target=lambda: answers.append(worker.call("ping", {"a": 1})))
thread.start()
while not [one for one in process._processes if one._launcher]:
    time.sleep(0.001)
child = os.fork()
if child:
    os.waitpid(child, 0)
    thread.join()
    print(answers)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "[{'a': 1}]\n", done.stderr


@pytest.mark.parametrize("adapter", ["numpy", "torch", "mindspore", "megengine"])
def test_a_worker_is_handed_everything_that_its_modules_import(adapter: str) -> None:
    handed = shipping.sources(adapter)
    for name, text in handed.items():
        assert imported_by(text) <= set(handed), name


def test_that_check_can_fail() -> None:
    assert imported_by("from mhabridge.cli import main") == {"mhabridge.cli", "mhabridge.cli.main"}
    assert imported_by("import numpy") == set()


def imported_by(text: str) -> set[str]:
    """The modules of ours that a source imports, except those that only a type checker sees."""
    tree = ast.parse(text)
    for node in list(ast.walk(tree)):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])
    ours = {module for module in found if module.partition(".")[0] == "mhabridge"}
    return {module for module in ours if is_module(module)}


def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
