"""What the page says, in its order: the verdict, why, the sides, the layers, the trainings, the notes."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from typing import Any

from mhabridge.diff.comparing import VERDICTS
from mhabridge.diff.judge import plain_number
from mhabridge.diff.page import text
from mhabridge.diff.page.layers import Group, Leaf, all_leaves, tree_of
from mhabridge.diff.page.training import Chart, charts
from mhabridge.diff.report import DiffReport

KINDS = {"backends": "Backends", "checkpoints": "Checkpoints", "recordings": "Recorded runs"}


_SEEN = 0.012  # of the bar


@dataclasses.dataclass(frozen=True)
class Count:
    """How many comparisons have a verdict; ``start`` and ``width`` are its part of a bar of 100."""

    verdict: str
    count: int
    start: float
    width: float


@dataclasses.dataclass(frozen=True)
class Fact:
    """One thing that is known of each side, and whether the sides have it different."""

    name: str
    values: tuple[str, ...]
    differs: bool


@dataclasses.dataclass(frozen=True)
class Contents:
    """All that the template needs."""

    report: DiffReport
    kind: str
    sides: str
    sentences: tuple[str, ...]
    counts: tuple[Count, ...]
    facts: tuple[Fact, ...]
    setting: tuple[tuple[str, str], ...]
    members: tuple[Group | Leaf, ...]
    leaves: tuple[Leaf, ...]
    first: Leaf | None
    charts: tuple[Chart, ...]
    cause: str
    mends: tuple[str, ...]
    json: str

    @property
    def verdicts(self) -> tuple[str, ...]:
        """That layers have, the worst first."""
        known = {row.verdict for leaf in self.leaves for row in leaf.rows}
        return tuple(verdict for verdict in reversed(VERDICTS) if verdict in known)


def contents(report: DiffReport) -> Contents:
    """Everything on the page, from the report alone."""
    members = tree_of(report)
    leaves = tuple(all_leaves(members))
    return Contents(
        report,
        KINDS.get(report.kind, report.kind),
        ", ".join(text.visible(run.backend) for run in report.runs) or "no sides",
        tuple(sentences(report)),
        tuple(_counts(report)),
        tuple(_facts(report)),
        tuple(_setting(report)),
        members,
        leaves,
        next((leaf for leaf in leaves if leaf.first), None),
        charts(report),
        cause(report),
        tuple(dict.fromkeys(fault.mend for each in report.diagnoses[:1] for fault in each.faults if fault.mend)),
        as_json(report),
    )


def as_json(report: DiffReport) -> str:
    """The report as JSON that may stand inside a script element: no markup can begin in it."""
    return json.dumps(_plain(report.to_dict()), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _plain(item: Any) -> Any:
    """Without what JSON does not know, at any depth."""
    if isinstance(item, dict):
        return {str(name): _plain(each) for name, each in item.items()}
    if isinstance(item, (list, tuple)):
        return [_plain(each) for each in item]
    return plain_number(item)


def cause(report: DiffReport) -> str:
    """The first diagnosis in a line: it is that of the first divergence."""
    found = report.diagnosis
    if found is None:
        return ""
    named = [f"{fault.name} ({fault.where})" if fault.where else fault.name for fault in found.faults]
    faults = text.visible(" and ".join(named))
    side = f"{text.visible(found.side)}: " if found.side else ""
    return side + (faults or "none of the known faults explains it")


def _count(report: DiffReport, verdict: str) -> int:
    return sum(entry.comparison.verdict == verdict for entry in report.entries)


def _counts(report: DiffReport) -> Iterable[Count]:
    """Each verdict's part of a bar; a single wrong one among thousands still has a part that can be seen."""
    counts = [_count(report, verdict) for verdict in VERDICTS]
    parts = [max(count / (sum(counts) or 1), _SEEN if count else 0.0) for count in counts]
    start = 0.0
    for verdict, count, part in zip(VERDICTS, counts, parts, strict=True):
        width = 100 * part / (sum(parts) or 1)
        yield Count(verdict, count, round(start, 3), round(width, 3))
        start += width


def sentences(report: DiffReport) -> Iterable[str]:
    """The verdict in words; the first sentence is the most important one."""
    parted = [step for step in report.steps if not step.explained]
    if parted:
        yield f"The trainings part at step {parted[0].step}, by more than rounding explains."
    yield from _about_entries(report, bool(parted))
    if report.steps and not parted:
        yield "Rounding explains how far the trainings part."
    for status in ("refused", "failed"):
        names = [text.visible(run.backend) for run in report.runs if run.status == status]
        if names:
            yield f"{', '.join(names)} {status}."


def _about_entries(report: DiffReport, parted: bool) -> Iterable[str]:
    total, broken, off = len(report.entries), _count(report, "broken"), _count(report, "off")
    of_all = f"of {text.counted(total, 'comparison')}"
    if not total:
        yield "Nothing was compared."
    if broken:
        what = "missing, of another shape or dtype, or NaN or infinite where it should not be."
        yield f"{broken:,} {of_all} {'is' if broken == 1 else 'are'} broken: {what}"
    if off:
        yield f"{off:,} {of_all} {'is' if off == 1 else 'are'} further apart than rounding explains."
    if total and not broken and not off:
        every = "The only comparison is" if total == 1 else f"All {total:,} comparisons are"
        alike = _count(report, "equal") == total
        yield f"{every} equal, bit for bit." if alike else f"Rounding explains every {'other ' * parted}difference."


def _facts(report: DiffReport) -> Iterable[Fact]:
    runs = report.runs
    known: dict[str, list[str]] = {
        "framework": [run.framework for run in runs],
        "version": [run.version for run in runs],
        "status": [run.status for run in runs],
        "ran": [{"here": "in this process", "worker": "in a worker"}.get(run.where, run.where) for run in runs],
    }
    if report.kind == "backends":
        known["native layer"] = ["yes" if run.native else "no" if run.status == "answered" else "" for run in runs]
    names = dict.fromkeys(name for run in runs for name in run.environment)
    for name in names:
        known[text.visible(name)] = [str(run.environment.get(name, "")) for run in runs]
    for name, values in known.items():
        if any(values):
            yield Fact(name, tuple(text.visible(each) for each in values), len(set(values)) > 1)


def _setting(report: DiffReport) -> Iterable[tuple[str, str]]:
    """What all sides computed: the layer, the seed, the dtype."""
    if report.dtype:
        yield "dtype", report.dtype
    if report.seed is not None:
        yield "seed", str(report.seed)
    for name, item in (report.spec.to_dict() if report.spec else {}).items():
        if name != "dtype":
            yield name, text.visible(item)


def fraction(value: float) -> float | None:
    """A number for sorting in the page: None where there is none, a huge one for inf."""
    return None if math.isnan(value) else min(value, 1e308)
