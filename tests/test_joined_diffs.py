"""Several diffs of layers as one report of a model."""

from __future__ import annotations

import dataclasses

import pytest

import mhabridge as mb
from mhabridge.diff.joining import joined
from mhabridge.diff.report import DiffReport, Run
from mhabridge.errors import ArgumentError

SPEC = mb.MHASpec(8, 2)


def off(report: DiffReport) -> DiffReport:
    """The same with a first entry that is off."""
    first = report.entries[0]
    wrong = dataclasses.replace(first, comparison=dataclasses.replace(first.comparison, verdict="off"))
    return dataclasses.replace(report, entries=(wrong, *report.entries[1:]))


def test_every_part_names_its_layer() -> None:
    report = joined({f"layers.{i}": mb.diff(SPEC, ["numpy"], seed=i, pictures=True) for i in range(3)})
    assert report.ok
    names = [f"layers.{i}" for i in range(3)]
    assert [layer.name for layer in report.layers] == names
    assert sorted({entry.layer for entry in report.entries}) == names
    assert len(report.entries) == 6
    assert sorted({each.layer for each in report.pictures}) == names
    assert len(report.runs) == 1
    assert report.seed is None  # they differ
    assert report.spec == SPEC


def test_the_first_layer_that_differs_is_the_first_divergence() -> None:
    good = mb.diff(SPEC, ["numpy"])
    report = joined({"a": good, "b": off(good), "c": off(good)})
    assert (report.ok, report.verdict, report.first_divergence) == (False, "off", "b")


def test_a_backend_that_failed_once_failed() -> None:
    good = mb.diff(SPEC, ["numpy"])
    bad = dataclasses.replace(good, runs=(dataclasses.replace(good.runs[0], status="failed", reason="died"),))
    for reports in ({"a": good, "b": bad, "c": good}, {"b": bad, "a": good}):
        (run,) = joined(reports).runs
        assert (run.status, run.reason) == ("failed", "b: died")


def test_notes_and_environments_are_kept() -> None:
    good = mb.diff(SPEC, ["numpy"])
    other = dataclasses.replace(good, runs=(Run("numpy", "numpy", "", "here", "answered", notes=("x",)),))
    (run,) = joined({"a": good, "b": other}).runs
    assert set(run.notes) == {*good.runs[0].notes, "x"}
    assert run.environment == good.runs[0].environment


def test_none_is_an_error() -> None:
    with pytest.raises(ArgumentError, match="at least one"):
        joined({})
