"""Environments: made by venv and pip, checked by a worker, registered only then, and removed without a trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mhabridge import mapping
from mhabridge.backends import backend, environments, interpreters, settings
from mhabridge.cli.backends import command
from mhabridge.errors import ArgumentError, BackendError

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Settings of this test alone."""
    monkeypatch.setenv("MHABRIDGE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def leave_only_this_interpreter(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    for variable in ("PYENV_ROOT", "UV_PYTHON_INSTALL_DIR", "PATH"):
        monkeypatch.setenv(variable, str(folder))


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


# -- interpreters ------------------------------------------------------------------------------------------------------


def test_a_shim_that_fails_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_only_this_interpreter(monkeypatch, tmp_path)
    script(tmp_path / "python3.7", "echo 'pyenv: python3.7: command not found' >&2; exit 127")
    with pytest.raises(BackendError) as raised:
        interpreters.find(["3.7"])
    assert "pyenv install 3.7" in raised.value.advice


@pytest.mark.parametrize("place", ["python3.7", "3.7.1/bin/python3.7", "versions/3.7.1/bin/python3.7"])
def test_only_what_answers_with_the_right_version_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    leave_only_this_interpreter(monkeypatch, tmp_path)
    script(tmp_path / place, "echo 3.6")
    with pytest.raises(BackendError):
        interpreters.find(["3.7"])


@pytest.mark.parametrize("place", ["python3.7", "versions/3.7.1/bin/python3.7", "cpython-3.7.9-linux/bin/python3.7"])
def test_path_pyenv_and_uv_are_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    leave_only_this_interpreter(monkeypatch, tmp_path)
    answering = script(tmp_path / place, "echo 3.7")
    assert interpreters.find(["3.5", "3.7"]) == str(answering)


def test_this_interpreter_is_the_first_choice_for_its_version() -> None:
    assert interpreters.find([HERE]) == sys.executable


# -- what the tables say -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", mapping.FRAMEWORKS)
def test_every_framework_has_an_environment_with_pins(name: str) -> None:
    plan = environments.plan_for(name)
    assert f"{name}=={plan['version']}" in plan["requirements"]
    assert any(requirement.startswith("numpy") for requirement in plan["requirements"])
    assert plan["python"]
    assert environments.plan_for(f"{name}@{plan['version']}") == plan


def test_an_unknown_version_lists_the_known_ones() -> None:
    with pytest.raises(ArgumentError, match=r"torch@2\.13\.0, torch@1\.8\.1"):
        environments.install("torch@0.1")
    with pytest.raises(ArgumentError, match="torch, mindspore, megengine"):
        environments.install("tensorflow")


# -- add ---------------------------------------------------------------------------------------------------------------


def test_add_checks_by_starting_a_worker() -> None:
    added = environments.add("mine", sys.executable, framework="numpy")
    assert added.version
    assert settings.entries() == [added]
    assert backend("mine").call("ping", {}) == {}


@pytest.mark.parametrize(
    ("name", "python", "options", "problem"),
    [
        ("numpy@0.1", sys.executable, {}, "expected version 0.1"),
        ("mine", "/nonexistent/python", {"framework": "numpy"}, "/nonexistent/python"),
        ("mine", sys.executable, {}, "--framework"),
        ("mine", sys.executable, {"framework": "tensorflow"}, "tensorflow"),
        ("../mine", sys.executable, {"framework": "numpy"}, "'../mine'"),
        ("numpy", sys.executable, {}, "the reference in this process"),
        ("torch", sys.executable, {"framework": "numpy"}, "a name that does not mean torch"),
        ("mine", sys.executable, {"framework": "numpy", "ssh": "-oProxyCommand=true"}, "host or user@host"),
    ],
)
def test_nothing_is_added_when_anything_is_wrong(name: str, python: str, options: dict[str, Any], problem: str) -> None:
    with pytest.raises((BackendError, ArgumentError)) as raised:
        environments.add(name, python, **options)
    assert problem in str(raised.value)
    assert settings.entries() == []


def test_adding_again_replaces_the_worker_that_runs_what_was_there_before() -> None:
    environments.add("mine", sys.executable, framework="numpy")
    held = backend("mine")
    before = held.call("describe", {})["pid"]
    environments.add("mine", sys.executable, framework="numpy")
    assert held.call("describe", {})["pid"] != before
    assert backend("mine").call("describe", {})["pid"] != before
    environments.remove("mine")


@pytest.mark.parametrize("place", ["a_file", "a_file/below"])
def test_settings_that_cannot_be_written_are_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "a_file").write_text("", encoding="utf-8")
    monkeypatch.setenv("MHABRIDGE_HOME", str(tmp_path / place))
    with pytest.raises(BackendError, match="a_file"):
        environments.add("mine", sys.executable, framework="numpy")


# -- install -----------------------------------------------------------------------------------------------------------


def test_a_python_of_another_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"Python 3\.8 or 3\.9"):
        environments.install("torch@1.8.1", str(script(tmp_path / "python", "echo 3.99")))
    with pytest.raises(BackendError, match="does not start"):
        environments.install("torch@1.8.1", str(script(tmp_path / "python", "exit 1")))


@pytest.mark.frameworks
@pytest.mark.timeout(300)
def test_install_and_remove(home: Path, python_for_numpy: str) -> None:
    lines: list[str] = []
    entry = environments.install("numpy@1.23.5", python_for_numpy, progress=lines.append)
    assert (entry.version, entry.installed) == ("1.23.5", True)
    assert any("numpy==1.23.5" in line for line in lines)
    assert backend("numpy@1.23.5").call("describe", {})["numpy"] == "1.23.5"
    assert environments.remove("numpy@1.23.5") == entry
    assert settings.entries() == []
    assert not os.path.exists(entry.python)


@pytest.mark.frameworks
def test_a_failed_install_leaves_nothing(home: Path, python_for_numpy: str) -> None:
    with pytest.raises(BackendError) as raised:
        environments.install("numpy@1.23.5", python_for_numpy, ["--no-index"])
    assert "No matching distribution" in raised.value.advice
    assert_nothing_left(home)


@pytest.mark.frameworks
def test_an_interrupted_install_leaves_nothing(home: Path, python_for_numpy: str) -> None:
    def interrupt(line: str) -> None:
        if line.startswith("Installing"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        environments.install("numpy@1.23.5", python_for_numpy, progress=interrupt)
    assert_nothing_left(home)


@pytest.fixture(scope="module")
def python_for_numpy() -> str:
    try:
        return interpreters.find(environments.plan_for("numpy")["python"])
    except BackendError as error:
        pytest.skip(str(error))


def assert_nothing_left(home: Path) -> None:
    assert settings.entries() == []
    assert [path.name for path in (home / "environments").iterdir() if path.is_dir()] == []


# -- the command line --------------------------------------------------------------------------------------------------


def run(*arguments: str) -> Any:
    return CliRunner().invoke(command, list(arguments))


def test_the_command_line_adds_lists_and_removes() -> None:
    added = run("add", "mine", "--python", sys.executable, "--framework", "numpy", "--json")
    assert added.exit_code == 0
    assert json.loads(added.output)["name"] == "mine"
    for arguments in (["list", "--json"], ["--json"], ["list", "--probe", "--json"]):
        assert "mine" in [row["name"] for row in json.loads(run(*arguments).output)]
    assert "mine" in run("list").output
    assert "Removed mine" in run("remove", "mine").output
    assert "mine" not in run().output


def test_an_error_is_one_message_and_exit_code_2() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from mhabridge.cli.main import main; main()", "backends", "remove", "nothing"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("mhabridge: backend 'nothing': given no such registered backend")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["", "list", "add", "install", "remove", "doctor"])
def test_help_has_an_example(name: str) -> None:
    shown = run(*([name] if name else []), "--help")
    assert shown.exit_code == 0
    assert "Example: mhabridge backends" in shown.output
