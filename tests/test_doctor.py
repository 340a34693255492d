"""The doctor: a healthy backend is found healthy, each kind of sick one is found sick, with what to do."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mhabridge import mapping
from mhabridge.backends import Backend, BackendInfo, backend, backends, doctor, registry, settings
from mhabridge.backends.settings import Entry
from mhabridge.cli.backends import command


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of this test alone, and only those frameworks that it registers, whatever else is installed here."""
    monkeypatch.setenv("MHABRIDGE_HOME", str(tmp_path))
    monkeypatch.setattr(doctor, "backends", lambda probe: [i for i in backends(probe) if i.framework == "numpy"])


def examined(name: str) -> doctor.Finding:
    return next(finding for finding in doctor.examine() if finding.info.name == name)


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def test_healthy_backends_are_healthy() -> None:
    settings.register(Entry("other", "numpy", sys.executable))
    for name in ("numpy", "other"):
        finding = examined(name)
        assert finding.info.ok
        assert not finding.needed
        assert finding.info.version == np.__version__
        assert finding.error is not None
        assert finding.error <= doctor.TOLERANCE


class Wrong(Backend):
    """The reference, with an answer that is spoiled."""

    def __init__(self, spoil: float) -> None:
        super().__init__(backend("numpy").info)
        self.spoil = spoil

    def run(self, *args: Any, **kwargs: Any) -> Any:
        result = super().run(*args, **kwargs)
        return dataclasses.replace(result, output=result.output + self.spoil)


@pytest.mark.parametrize("spoil", [1e-3, float("nan"), float("inf")])
def test_a_wrong_answer_is_found(spoil: float) -> None:
    _, error = doctor._judge(Wrong(spoil))
    finding = doctor._verdict(backend("numpy").info, error)
    assert not finding.info.ok
    assert finding.needed
    assert "install it again" in finding.info.reason


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "there is no interpreter"),
        ("exit 1", "exit status 1"),
        (f'exec {sys.executable} -S "$@"', "No module named 'numpy'"),
    ],
)
def test_a_sick_python_is_found(tmp_path: Path, text: str | None, problem: str) -> None:
    python = tmp_path / "python"
    settings.register(Entry("sick", "numpy", script(python, text) if text else str(python)))
    finding = examined("sick")
    assert not finding.info.ok
    assert finding.needed
    assert problem in finding.info.reason
    done = CliRunner().invoke(command, ["doctor", "--json"])
    assert done.exit_code == 1
    assert [row["needed"] for row in json.loads(done.output)] == [False, True]


@pytest.mark.parametrize("name", ["torch", "torch@2.13.0"])
def test_it_examines_the_entry_that_it_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Not a framework of the same name that is importable here."""
    monkeypatch.setattr(doctor, "backends", lambda probe: [i for i in backends(probe) if i.name == name])
    settings.register(Entry(name, "torch", script(tmp_path / "python", "exit 3")))
    finding = examined(name)
    assert not finding.info.ok
    assert finding.needed
    assert "exit status 3" in finding.info.reason


def test_an_entry_that_is_removed_meanwhile_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    settings.register(Entry("gone", "numpy", sys.executable))
    listed = [info for info in backends(probe=False) if info.name == "gone"]
    settings.unregister("gone")
    monkeypatch.setattr(doctor, "backends", lambda probe: listed)
    assert "removed meanwhile" in examined("gone").info.reason


def test_a_framework_that_is_not_installed_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "megengine" else found(name))
    monkeypatch.setattr(doctor, "backends", lambda probe: [i for i in backends(probe) if i.name == "megengine"])
    finding = examined("megengine")
    assert not finding.info.ok
    assert not finding.needed
    assert "mhabridge backends install megengine" in finding.info.reason
    assert CliRunner().invoke(command, ["doctor"]).exit_code == 0


def test_a_missing_interpreter_for_it_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("PYENV_ROOT", "UV_PYTHON_INSTALL_DIR", "PATH"):
        monkeypatch.setenv(variable, str(tmp_path))
    plan = {"framework": {"environments": [{"version": "1", "python": ["3.7"], "requirements": []}]}}
    monkeypatch.setattr(mapping, "table", lambda name: plan)
    info = BackendInfo("megengine", "megengine", None, "here", sys.executable, "", False, "not installed here.")
    assert "pyenv install 3.7" in doctor._explained(info).reason


@pytest.mark.frameworks
def test_a_framework_here_is_tried_in_another_process(framework: str) -> None:
    info = registry._here(framework)
    if not info.ok:
        pytest.skip(info.reason)
    assert doctor._examine(info).info.ok
