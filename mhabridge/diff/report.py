"""``DiffReport``: what a diff found, as data, whatever was compared: backends, checkpoints or recorded runs."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from mhabridge.diff.comparing import VERDICTS, Comparison
from mhabridge.diff.diagnosis import Diagnosis
from mhabridge.diff.judge import Distance, plain_number
from mhabridge.spec import MHASpec

REFERENCE = "reference"


@dataclasses.dataclass(frozen=True)
class Run:
    """One side of a diff: a backend, a file or a recorded run.

    Args:
        backend: its name; for a file the path that was given.
        framework: which one it is; "" where that is not known.
        version: of the framework.
        where: "here" or "worker"; "" for a file.
        status: "answered", "refused" (it cannot do this call rightly) or "failed" (missing, broken, died).
        reason: in words, when it did not answer.
        notes: what was native, lowered or composed; for a file what its reader says.
        environment: what else is known of where it ran, by name: python, numpy, platform, device, ...
    """

    backend: str
    framework: str
    version: str
    where: str
    status: str
    reason: str = ""
    notes: tuple[str, ...] = ()
    environment: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def native(self) -> bool:
        """Whether the framework's own layer answered."""
        return any(note.startswith("native") for note in self.notes)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of two sides.

    Args:
        layer: the path of the layer that it belongs to; "" for the one layer of ``mb.diff``.
        tensor: "output", "attn_weights", "grads.query", "q_weight", ...; in files the tensor's name.
        first: the name of one side; "reference" for the float64 reference.
        second: the name of the other; the one that is judged, where the first is the reference.
        comparison: what was found.
    """

    layer: str
    tensor: str
    first: str
    second: str
    comparison: Comparison

    @property
    def ok(self) -> bool:
        """Whether rounding explains the difference."""
        return self.comparison.ok

    @property
    def backend(self) -> str:
        """The side that is judged."""
        return self.second

    @property
    def distance(self) -> Distance:
        """Of the side that is judged, to the float64 reference; without one, its numbers are NaN."""
        found = self.comparison.distances[1]
        return found or Distance(self.comparison.verdict, self.comparison.reason)

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, the comparison's among them."""
        names = {"layer": self.layer, "tensor": self.tensor, "first": self.first, "second": self.second}
        return {**names, "ok": self.ok, **self.comparison.to_dict()}


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of a model, or one group of a checkpoint's tensors, in the order in which it ran.

    Args:
        name: its path on the first side ("encoder.layers.0.self_attn").
        other: its path on the second side; the same where the names agree, "" where that side lacks it.
        kind: of layer, such as "MultiheadAttention"; "" where that is not known.
        matched: how the two were found to belong together: "name", "rule", "order" or "".
        notes: what was left out or could not be compared.
    """

    name: str
    other: str
    kind: str = ""
    matched: str = "name"
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Map:
    """A matrix as it is drawn: one head's attention, on both sides.

    Args:
        title: "head 3".
        first: (rows, columns), floating; NaN where it is NaN.
        second: the same shape.
        rows: for each row of the picture the first index that it stands for: large matrices are drawn in blocks.
        columns: likewise.
    """

    title: str
    first: np.ndarray
    second: np.ndarray
    rows: tuple[int, ...]
    columns: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Picture:
    """What is drawn of one entry.

    Args:
        layer: as in its entry.
        tensor: likewise.
        first: likewise.
        second: likewise.
        maps: heads, for attention weights; of the batch element in which the sides differ most.
        batch: which one that is; None for tensors without a batch.
        counts: of elements by the size of their absolute difference.
        edges: of these, one more than counts; powers of ten; the first bin holds what is equal.
        origin: the index of the neighbourhood's first element.
        near_first: the worst element and its neighbours on the first side: (rows, columns), or (1, columns).
        near_second: the same of the second.
        overview: the last two axes as one matrix, for other tensors than attention weights; of that batch element.
    """

    layer: str
    tensor: str
    first: str
    second: str
    maps: tuple[Map, ...] = ()
    batch: int | None = None
    counts: tuple[int, ...] = ()
    edges: tuple[float, ...] = ()
    origin: tuple[int, ...] = ()
    near_first: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0), np.float32))
    near_second: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0), np.float32))
    overview: Map | None = None


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of two trainings.

    Args:
        step: from 1.
        tensor: the parameter that is furthest apart, in units of the growth of one rounding error.
        first: the name of one side.
        second: of the other.
        apart: the largest difference between the two in any parameter.
        grown: the same between the first side and itself, started with weights that one rounding error changed.
        times: the largest ratio of the two over all parameters.
        explained: whether rounding explains it.
        layer: the path of the layer that was trained; "" for the one layer of ``mb.diff``.
    """

    step: int
    tensor: str
    first: str
    second: str
    apart: float
    grown: float
    times: float
    explained: bool
    layer: str = ""


@dataclasses.dataclass(frozen=True)
class DiffReport:
    """The result of ``mb.diff``, ``mb.diff_checkpoints`` and ``mb.diff_recordings``.

    Args:
        runs: the sides.
        entries: what is compared, in order; for backends each against the float64 reference.
        kind: "backends", "checkpoints" or "recordings".
        pairs: for backends, each two of them beside each other, the worst first.
        layers: of a model, in the order in which they ran.
        diagnoses: what explains the differences, or that nothing does.
        pictures: of the entries that are worth looking at.
        steps: of training, when asked for.
        first_divergence: the path of the first layer whose own computation, inputs or weights differ by more than
            rounding; None if there is none.
        spec: the layer, for backends.
        seed: of weights and inputs, where they were drawn.
        dtype: what the backends computed in.
        notes: what was left out.
    """

    runs: tuple[Run, ...]
    entries: tuple[Entry, ...]
    kind: str = "backends"
    pairs: tuple[Entry, ...] = ()
    layers: tuple[Layer, ...] = ()
    diagnoses: tuple[Diagnosis, ...] = ()
    pictures: tuple[Picture, ...] = dataclasses.field(default=(), repr=False)
    steps: tuple[Step, ...] = ()
    first_divergence: str | None = None
    spec: MHASpec | None = None
    seed: int | None = None
    dtype: str = ""
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Something was compared, every side answered, and rounding explains every difference."""
        return bool(self.entries) and all(run.status == "answered" for run in self.runs) and not self.differs

    @property
    def differs(self) -> bool:
        """Whether there is a difference that rounding does not explain."""
        return not all(entry.ok for entry in self.entries) or not all(step.explained for step in self.steps)

    @property
    def exit_code(self) -> int:
        """0 when ok, 1 when a difference was found, 2 when a side could not be asked or nothing was compared."""
        if self.differs:
            return 1
        return 0 if self.ok else 2

    @property
    def verdict(self) -> str:
        """The worst verdict of all entries; "failed" when a side did not answer or nothing was compared."""
        if self.entries and not all(entry.ok for entry in self.entries):
            return worst(entry.comparison.verdict for entry in self.entries)
        if not all(step.explained for step in self.steps):
            return "off"
        return worst(entry.comparison.verdict for entry in self.entries) if self.ok else "failed"

    @property
    def worst_pair(self) -> Entry | None:
        """The two sides and the tensor that differ most, or None with fewer than two answers."""
        found = self.pairs or (self.entries if self.kind != "backends" else ())
        return max(found, key=_how_bad, default=None)

    @property
    def diagnosis(self) -> Diagnosis | None:
        """The first one, which is that of the first divergence; None when nothing had to be explained."""
        return self.diagnoses[0] if self.diagnoses else None

    def of_layer(self, name: str) -> tuple[Entry, ...]:
        """The entries of one layer."""
        return tuple(entry for entry in self.entries if entry.layer == name)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pictures, as plain values."""
        return {
            "ok": self.ok,
            "verdict": self.verdict,
            "kind": self.kind,
            "spec": self.spec.to_dict() if self.spec else None,
            "seed": self.seed,
            "dtype": self.dtype,
            "first_divergence": self.first_divergence,
            "runs": [{**dataclasses.asdict(run), "native": run.native} for run in self.runs],
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "entries": [entry.to_dict() for entry in self.entries],
            "pairs": [entry.to_dict() for entry in self.pairs],
            "diagnoses": [each.to_dict() for each in self.diagnoses],
            "steps": [
                {name: plain_number(item) for name, item in dataclasses.asdict(step).items()} for step in self.steps
            ],
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """Everything but the pictures, as JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def to_csv(self) -> str:
        """The entries and pairs, one line each, with a header; each side's distance to the reference too.

        Names come from files: one that a spreadsheet would take for a formula has an apostrophe before it.
        """
        rows = [_flat(entry) for entry in (*self.entries, *self.pairs)]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(_flat(_NOTHING)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write the report as one page that needs nothing else, neither files nor a network."""
        from mhabridge.diff.page import write

        write(self, path)

    def to_png(self, path: str | os.PathLike[str]) -> None:
        """Draw the most telling picture; needs matplotlib."""
        from mhabridge.diff.figure import write

        write(self, path)


def worst(verdicts: Iterable[str]) -> str:
    """The worst of several verdicts; "equal" of none.

    Example:
        >>> worst(["equal", "off", "rounding"])
        'off'
    """
    return max(verdicts, key=VERDICTS.index, default="equal")


def _how_bad(entry: Entry) -> tuple[int, float]:
    apart = entry.comparison.max_abs
    return VERDICTS.index(entry.comparison.verdict), apart if apart == apart else -1.0


def _flat(entry: Entry) -> dict[str, Any]:
    fields = entry.to_dict()
    distances = fields.pop("distances")
    for which, distance in zip(("first", "second"), distances, strict=True):
        known = distance or {}
        for name in (field.name for field in dataclasses.fields(Distance)):
            fields[f"{which}_{name}"] = known.get(name)
    return {name: _no_formula(item) for name, item in fields.items()}


def _no_formula(cell: Any) -> Any:
    return "'" + cell if isinstance(cell, str) and cell.startswith(_FORMULA) and cell != "-inf" else cell


_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_NOTHING = Entry("", "", "", "", Comparison("equal"))
