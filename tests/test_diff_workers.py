"""Several backends at once: workers run at the same time, and one that dies is a row of the report."""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mhabridge as mb
from mhabridge.backends.registry import Backend
from mhabridge.backends.worker import Worker
from mhabridge.diff.report import Run

TRICKS = {"tricks": Path(__file__).with_name("worker_tricks.py").read_text(encoding="utf-8")}
SPEC = mb.MHASpec(8, 2)


class Tricked(Backend):
    """The reference in a worker; what it is asked to compute is turned into another function."""

    def __init__(self, name: str, trick: str = "", meet: threading.Barrier | None = None) -> None:
        info = dataclasses.replace(mb.backend("numpy").info, name=name, where="worker")
        super().__init__(info, Worker(sys.executable, "numpy", extra_modules=TRICKS))
        self.trick, self.meet = trick, meet

    def call(self, function: str, payload: dict[str, Any], timeout: float | None = None) -> Any:
        if function == "run" and self.meet:
            self.meet.wait(20)
        if function == "run" and self.trick:
            function, payload = f"tricks:{self.trick}", {"status": 3}
        return super().call(function, payload, timeout)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Make ``mb.diff`` find these backends by their names."""
    made: dict[str, Tricked] = {}

    def add(*backends: Tricked) -> list[str]:
        made.update({backend.info.name: backend for backend in backends})
        monkeypatch.setattr(
            "mhabridge.diff.running.find_backend", lambda name: made[name] if name in made else mb.backend(name)
        )
        return ["numpy", *made]

    yield add
    for backend in made.values():
        assert backend._worker is not None
        backend._worker.close()


def run_of(report: mb.DiffReport, name: str) -> Run:
    return next(run for run in report.runs if run.backend == name)


@pytest.mark.parametrize(
    ("trick", "words"),
    [
        ("segfault", "died: SIGSEGV in forward."),
        ("abort", "died: SIGABRT in forward."),
        ("exit_now", "died: exit status 3 in forward."),
    ],
)
def test_a_backend_that_dies_is_a_row(use: Any, trick: str, words: str) -> None:
    report = mb.diff(SPEC, use(Tricked("dying", trick), Tricked("living")))
    assert run_of(report, "dying").status == "failed"
    assert run_of(report, "dying").reason.startswith(words)
    assert run_of(report, "living").status == "answered"
    assert {entry.second for entry in report.entries} == {"numpy", "living"}
    assert all(entry.ok for entry in report.entries)
    assert (report.ok, report.exit_code, report.verdict) == (False, 2, "failed")


def test_one_that_dies_in_a_gradient_says_so(use: Any) -> None:
    report = mb.diff(SPEC, use(Tricked("dying", "segfault")), grads=True)
    assert run_of(report, "dying").reason.startswith("died: SIGSEGV in forward or backward.")


def test_one_that_hangs_is_a_row(use: Any) -> None:
    report = mb.diff(SPEC, use(Tricked("hanging", "hang")), timeout=1.0)
    assert "no answer within the limit of 1 s" in run_of(report, "hanging").reason
    assert not run_of(report, "hanging").reason.startswith("died")


def test_workers_run_at_the_same_time(use: Any) -> None:
    """Each of the three waits for the others before it computes: one after another they would wait for ever."""
    meet = threading.Barrier(3)
    report = mb.diff(SPEC, use(*(Tricked(f"worker{i}", meet=meet) for i in range(3))))
    assert report.ok, report.runs
    assert [run.backend for run in report.runs] == ["numpy", "worker0", "worker1", "worker2"]


def test_the_environment_of_each_side_is_told(use: Any) -> None:
    report = mb.diff(SPEC, use(Tricked("living")))
    assert run_of(report, "living").environment["numpy"] == np.__version__
    assert set(run_of(report, "numpy").environment) == {"python", "numpy", "host"}
