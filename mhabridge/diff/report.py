"""``DiffReport``: what a diff found, as data."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from typing import Any

from mhabridge.diff.judge import Distance
from mhabridge.spec import MHASpec


@dataclasses.dataclass(frozen=True)
class Run:
    """One backend's part in a diff.

    Args:
        backend: its name.
        framework: which one it is.
        version: of the framework.
        where: "here" or "worker".
        status: "answered", "refused" (it cannot do this call rightly) or "failed" (missing, broken, died).
        reason: in words, when it did not answer.
        notes: what was native, lowered or composed.
    """

    backend: str
    framework: str
    version: str
    where: str
    status: str
    reason: str = ""
    notes: tuple[str, ...] = ()

    @property
    def native(self) -> bool:
        """Whether the framework's own layer answered."""
        return any(note.startswith("native") for note in self.notes)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of one backend beside the float64 reference."""

    backend: str
    tensor: str
    distance: Distance

    @property
    def ok(self) -> bool:
        """Whether rounding explains the difference."""
        return self.distance.ok


@dataclasses.dataclass(frozen=True)
class Pair:
    """Where two backends differ most in one tensor."""

    tensor: str
    first: str
    second: str
    max_difference: float
    index: tuple[int, ...]
    values: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class DiffReport:
    """The result of ``mb.diff``.

    Args:
        spec: the layer.
        seed: of weights and inputs, where they were drawn.
        dtype: what the backends computed in.
        runs: one for each backend.
        entries: one for each tensor of each backend that answered.
        pairs: one for each tensor and pair of backends that answered, the worst first.
    """

    spec: MHASpec
    seed: int
    dtype: str
    runs: tuple[Run, ...]
    entries: tuple[Entry, ...]
    pairs: tuple[Pair, ...]

    @property
    def ok(self) -> bool:
        """Every backend answered, and rounding explains every difference."""
        return bool(self.entries) and all(r.status == "answered" for r in self.runs) and all(e.ok for e in self.entries)

    @property
    def exit_code(self) -> int:
        """0 when ok, 1 when a difference was found, 2 when a backend could not be asked."""
        if not all(entry.ok for entry in self.entries):
            return 1
        return 0 if self.ok else 2

    @property
    def worst_pair(self) -> Pair | None:
        """The two backends and the element that differ most, or None with fewer than two answers."""
        return self.pairs[0] if self.pairs else None

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {
            "ok": self.ok,
            "spec": self.spec.to_dict(),
            "seed": self.seed,
            "dtype": self.dtype,
            "backends": [{**dataclasses.asdict(run), "native": run.native} for run in self.runs],
            "entries": [
                {"backend": entry.backend, "tensor": entry.tensor, "ok": entry.ok, **entry.distance.to_dict()}
                for entry in self.entries
            ],
            "pairs": [dataclasses.asdict(pair) for pair in self.pairs],
        }

    def to_json(self) -> str:
        """Everything, as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def to_csv(self) -> str:
        """The entries, one line each, with a header."""
        rows = self.to_dict()["entries"]
        names = ["backend", "tensor", "ok", *(field.name for field in dataclasses.fields(Distance))]
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()
