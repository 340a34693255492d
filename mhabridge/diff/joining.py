"""Several diffs of single layers as one report of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from mhabridge.diff.report import DiffReport, Layer, Run
from mhabridge.errors import ArgumentError

_STATUSES = ("answered", "refused", "failed")


def joined(reports: Mapping[str, DiffReport]) -> DiffReport:
    """One report of all layers, in the order given.

    Args:
        reports: what ``mb.diff`` gave, by the path of the layer.

    Returns:
        A report whose entries, diagnoses and pictures name their layers. A backend that did not answer for one layer
        did not answer for the whole.

    Raises:
        ArgumentError: there is none.

    Example:
        >>> from mhabridge import MHASpec, diff
        >>> model = joined({f"layers.{i}": diff(MHASpec(8, 2), ["numpy"], seed=i) for i in range(2)})
        >>> [entry.layer for entry in model.entries], model.ok
        (['layers.0', 'layers.0', 'layers.1', 'layers.1'], True)
    """
    if not reports:
        raise ArgumentError("reports", given="none", expected="at least one")
    every = list(reports.values())
    runs: dict[str, Run] = {}
    for name, report in reports.items():
        for run in report.runs:
            runs[run.backend] = _worse(runs.get(run.backend), run, name)
    specs = {report.spec for report in every}
    bad = [name for name, report in reports.items() if not report.ok]
    return DiffReport(
        tuple(runs.values()),
        tuple(dataclasses.replace(each, layer=name) for name, report in reports.items() for each in report.entries),
        pairs=tuple(dataclasses.replace(each, layer=name) for name, report in reports.items() for each in report.pairs),
        layers=tuple(Layer(name, name, "MultiheadAttention") for name in reports),
        diagnoses=tuple(
            dataclasses.replace(each, layer=name) for name, report in reports.items() for each in report.diagnoses
        ),
        pictures=tuple(
            dataclasses.replace(each, layer=name) for name, report in reports.items() for each in report.pictures
        ),
        steps=tuple(dataclasses.replace(each, layer=name) for name, report in reports.items() for each in report.steps),
        first_divergence=bad[0] if bad else None,
        spec=specs.pop() if len(specs) == 1 else None,
        seed=every[0].seed if len({report.seed for report in every}) == 1 else None,
        dtype=" and ".join(dict.fromkeys(report.dtype for report in every)),
        notes=tuple(dict.fromkeys(note for report in every for note in report.notes)),
    )


def _worse(known: Run | None, run: Run, layer: str) -> Run:
    """The run of one side over all layers: the first one that did not answer, with all notes."""
    if run.reason:
        run = dataclasses.replace(run, reason=f"{layer}: {run.reason}")
    if known is None:
        return run
    worse = run if _STATUSES.index(run.status) > _STATUSES.index(known.status) else known
    environment = {**run.environment, **known.environment}
    notes = tuple(dict.fromkeys((*known.notes, *run.notes)))
    return dataclasses.replace(worse, notes=notes, environment=environment, version=known.version or run.version)
