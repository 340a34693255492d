"""Names of backends: what is here, what is registered, and how a name finds one."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mhabridge import mapping
from mhabridge.backends import BackendInfo, backend, backends, registry, settings
from mhabridge.backends.settings import Entry
from mhabridge.errors import ArgumentError, ArgumentTypeError, BackendError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Settings of this test alone."""
    monkeypatch.setenv("MHABRIDGE_HOME", str(tmp_path))
    return tmp_path


def entry(name: str, framework: str = "numpy", **fields: Any) -> Entry:
    return Entry(name, framework, fields.pop("python", sys.executable), **fields)


def test_the_reference_is_always_first_and_here() -> None:
    info = backends()[0]
    assert (info.name, info.framework, info.where, info.ok) == ("numpy", "numpy", "here", True)
    assert info.version == np.__version__
    assert info.to_dict()["python"] == sys.executable


def test_every_framework_has_a_row() -> None:
    infos = {info.name: info for info in backends()}
    assert set(infos) == {"numpy", *mapping.FRAMEWORKS}
    for name in mapping.FRAMEWORKS:
        assert infos[name].ok or f"mhabridge backends install {name}" in infos[name].reason


def test_listing_imports_no_framework() -> None:
    code = "import sys; from mhabridge import backends; backends(); print([m for m in {!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code.format(mapping.FRAMEWORKS)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_importing_the_package_loads_neither_execnet_nor_the_registry() -> None:
    code = "import sys, mhabridge.backends; print(sorted(m for m in sys.modules if 'execnet' in m or 'registry' in m))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_registered_backend_is_probed_and_called() -> None:
    settings.register(entry("other"))
    info = next(info for info in backends() if info.name == "other")
    assert (info.ok, info.where, info.version) == (True, "worker", np.__version__)
    assert backend("other").call("ping", {"a": (1, 2)}) == {"a": (1, 2)}
    assert backend("other").call("describe", {})["pid"] != os.getpid()


def test_calls_of_one_process_share_a_worker() -> None:
    settings.register(entry("shared"))
    pids = {backend("shared").call("describe", {})["pid"] for _ in range(2)}
    assert len(pids) == 1


@pytest.mark.parametrize("probe", [True, False])
def test_a_python_that_was_moved_is_a_row_that_says_so(tmp_path: Path, probe: bool) -> None:
    settings.register(entry("moved", python=str(tmp_path / "gone")))
    info = next(info for info in backends(probe=probe) if info.name == "moved")
    assert not info.ok
    assert str(tmp_path / "gone") in info.reason
    assert "mhabridge backends remove moved" in info.reason


def test_a_name_with_a_version_is_exact() -> None:
    settings.register(entry("torch@1.8.1", "torch", version="1.8.1"))
    assert backend("torch@1.8.1").info.version == "1.8.1"
    with pytest.raises(BackendError, match="no backend of exactly this name") as raised:
        backend("torch@1.7")
    assert "torch@1.8.1" in str(raised.value)


def pretend_present(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch 2.13.0 is importable here, wherever these tests run."""
    known = registry._here
    present = BackendInfo("torch", "torch", "2.13.0", "here", sys.executable, "", True)
    monkeypatch.setattr(registry, "_here", lambda name: present if name == "torch" else known(name))


@pytest.mark.parametrize("name", ["torch", "torch@2.13.0"])
def test_exactly_that_name_registered_wins_over_the_framework_here(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    pretend_present(monkeypatch)
    assert backend(name).info.where == "here"
    settings.register(entry(name, "torch"))
    assert backend(name).info.where == "worker"
    rows = [info for info in backends(probe=False) if info.name == name]
    assert [info.where for info in rows] == ["worker"]
    settings.unregister(name)
    assert backend(name).info.where == "here"


def test_the_list_says_which_of_two_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_present(monkeypatch)
    settings.register(entry("torch", "torch"))
    info = next(info for info in backends(probe=False) if info.name == "torch")
    assert f"used instead of torch 2.13.0 in {sys.executable}" in info.reason
    settings.register(entry("torch@1.8.1", "torch"))
    assert next(info for info in backends(probe=False) if info.name == "torch@1.8.1").reason == ""


@pytest.mark.parametrize(
    ("name", "whose"),
    [
        ("numpy", "torch"),
        ("numpy", "numpy"),
        ("torch", "numpy"),
        ("torch@1.8.1", "mindspore"),
        ("numpy@1.23.5", "megengine"),
    ],
)
def test_a_name_that_means_something_else_is_refused(name: str, whose: str) -> None:
    with pytest.raises(ArgumentError, match="name"):
        settings.register(entry(name, whose))
    assert settings.entries() == []


def test_the_version_is_that_of_what_runs_not_of_what_was_registered() -> None:
    settings.register(entry("upgraded", version="0.1"))
    found = backend("upgraded")
    assert found.info.version == "0.1"
    found.call("ping", {})
    assert found.info.version == np.__version__
    info = next(info for info in backends() if info.name == "upgraded")
    assert info.version == np.__version__


def test_a_limit_is_checked_also_where_it_has_no_effect() -> None:
    with pytest.raises(ArgumentError, match="timeout"):
        backend("numpy").call("ping", {}, timeout=-1)
    with pytest.raises(ArgumentTypeError, match="timeout"):
        backend("numpy").call("ping", {}, timeout="5")  # type: ignore[arg-type]
    assert backend("numpy").call("ping", {"a": 1}, timeout=float("inf")) == {"a": 1}


def test_a_plain_name_finds_the_only_version(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_missing(monkeypatch)
    settings.register(entry("megengine@1.13.0", "megengine"))
    assert backend("megengine").info.name == "megengine"
    settings.register(entry("megengine@1.12.0", "megengine"))
    with pytest.raises(BackendError, match=r"megengine@1\.13\.0, megengine@1\.12\.0"):
        backend("megengine")


def test_the_version_here_can_be_asked_for_by_number() -> None:
    assert backend(f"numpy@{np.__version__}").info.where == "here"


def test_an_unknown_backend_lists_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_missing(monkeypatch)
    with pytest.raises(BackendError) as raised:
        backend("megengine")
    assert "mhabridge backends install megengine" in str(raised.value)
    with pytest.raises(BackendError, match="one of numpy"):
        backend("nonsense")
    with pytest.raises(ArgumentError):
        backend("torch@")


def test_numpy_2_with_a_framework_that_breaks_on_it_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np, "__version__", "2.1.0")
    assert "needs numpy<2" in registry.numpy_problem("mindspore")
    assert registry.numpy_problem("torch") == ""
    monkeypatch.setattr(np, "__version__", "1.26.4")
    assert registry.numpy_problem("mindspore") == ""


def pretend_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No framework but the reference is importable here, wherever these tests run."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in mapping.FRAMEWORKS else found(name))


# -- the settings file -------------------------------------------------------------------------------------------------


def test_entries_come_back_as_they_were_written() -> None:
    written = [
        entry("a", ssh="user@host", ssh_args=("-p", "22")),
        entry("torch@1.8.1", "torch", version="1.8.1", installed=True),
    ]
    for one in written:
        settings.register(one)
    assert settings.entries() == written
    settings.register(entry("a"))
    assert settings.entries() == [written[1], entry("a")]
    assert settings.unregister("a") == entry("a")
    with pytest.raises(BackendError, match="no such registered backend"):
        settings.unregister("a")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"format": 2, "backends": []}',
        b'{"format": 1}',
        b'{"format": 1, "backends": [], "more": 1}',
        b'{"format": 1, "backends": 5}',
        b'{"format": 1, "backends": [{"name": "a"}]}',
        b'{"format": 1, "backends": [{"name": "a", "framework": "numpy", "python": 5}]}',
        b'{"format": 1, "backends": [{"name": "a", "framework": "numpy", "python": "relative"}]}',
        b"[" * 100_000,
        b'{"format": 1, "backends": [{"name": "torch", "framework": "numpy", "python": "/p"}]}',
        b'{"format": 1, "backends": [{"name": "../a", "framework": "numpy", "python": "/p"}]}',
        b'{"format": 1, "backends": [{"name": "a", "framework": "numpy", "python": "/p", "ssh": "-oProxyCommand=x"}]}',
        b'{"format": 1, "backends": [{"name": "a", "framework": "numpy", "python": "/p", "unknown": 1}]}',
    ],
)
def test_a_damaged_file_is_refused_and_left_alone(home: Path, content: bytes) -> None:
    path = home / "backends.json"
    path.write_bytes(content)
    with pytest.raises(BackendError) as raised:
        backends()
    assert raised.value.subject == str(path)
    with pytest.raises(BackendError):
        settings.register(entry("a"))
    assert path.read_bytes() == content


def test_two_entries_of_one_name_are_damage(home: Path) -> None:
    fields = {"name": "a", "framework": "numpy", "python": "/p"}
    (home / "backends.json").write_text(json.dumps({"format": 1, "backends": [fields, fields]}), encoding="utf-8")
    with pytest.raises(BackendError, match="twice"):
        settings.entries()


def register_some(number: int) -> None:
    for step in range(5):
        settings.register(entry(f"name-{number}-{step}"))


def test_processes_that_register_at_once_lose_nothing(home: Path) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Pool(3) as pool:
        pool.map(register_some, range(3))
    assert len(settings.entries()) == 15
    assert {path.name for path in home.iterdir()} == {"backends.json", "backends.lock"}


def test_home_falls_back_to_the_data_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MHABRIDGE_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert settings.home() == tmp_path / "mhabridge"
    monkeypatch.delenv("XDG_DATA_HOME")
    assert settings.home() == Path.home() / ".local" / "share" / "mhabridge"
