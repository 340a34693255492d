"""Which backends the tests run on, and what happens when one is missing.

``--backends a,b`` chooses them; ``--require a,b`` fails the session when one of those cannot be used (a skip would hide
it). Tests that need a framework or another environment carry the marker ``frameworks``; all others run with nothing
but NumPy.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import pathlib
import signal

import pytest

# The environments that `make` made, also when pytest is started by hand.
os.environ.setdefault("MHABRIDGE_HOME", str(pathlib.Path(__file__).parents[1] / ".mhabridge"))

from mhabridge import mapping
from mhabridge.backends import BackendInfo, backends

DEFAULT = ",".join((mapping.REFERENCE, *mapping.FRAMEWORKS))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backends", default=DEFAULT, help="backends to run the conformance tests on")
    parser.addoption("--sweep", type=int, default=600, help="how many cases tests/test_sweep.py runs on each backend")
    parser.addoption("--require", default="", help="backends without which the session fails")


def pytest_configure(config: pytest.Config) -> None:
    # A shell's background jobs ignore Ctrl-C, and so does all that they start; some tests are about Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    missing = [name for name in _names(config, "--require") if not usable(name)]
    if missing:
        reasons = "; ".join(f"{name}: {reason(name)}" for name in missing)
        raise pytest.UsageError(f"required backends cannot be used: {reasons}")


def _names(config: pytest.Config, option: str) -> list[str]:
    return [name for name in config.getoption(option).split(",") if name]


@functools.lru_cache(maxsize=1)
def _infos() -> dict[str, BackendInfo]:
    return {info.name: info for info in backends()}


def usable(name: str) -> bool:
    info = _infos().get(name)
    return bool(info and info.ok)


def reason(name: str) -> str:
    info = _infos().get(name)
    return info.reason if info else "no such backend here; see `mhabridge backends list`"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = _names(metafunc.config, "--backends")
    if "backend_name" in metafunc.fixturenames:
        metafunc.parametrize("backend_name", chosen, scope="session", indirect=True)
    if "framework" in metafunc.fixturenames:
        metafunc.parametrize("framework", [n for n in chosen if n != "numpy"], scope="session", indirect=True)


@pytest.fixture(scope="session")
def backend_name(request: pytest.FixtureRequest) -> str:
    """The name of a backend that can be used; skips with the reason when it cannot."""
    return _ready(request.param)


@pytest.fixture(scope="session")
def framework(request: pytest.FixtureRequest) -> str:
    """As ``backend_name``, without the NumPy reference."""
    return _ready(request.param)


def _ready(name: str) -> str:
    if not usable(name):
        pytest.skip(f"{name}: {reason(name)}")
    if name == "mindspore" and importlib.util.find_spec("mindspore"):
        import mindspore

        # Each PyNative call costs 40 to 60 ms on two cores otherwise (2.10): its threads wait for each other.
        mindspore.runtime.launch_blocking()
    return str(name)
