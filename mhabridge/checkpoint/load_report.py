"""What ``load_into`` tells: what was filled, and what did not fit."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from mhabridge.checkpoint.planning.completeness import prefix_advice
from mhabridge.checkpoint.planning.drafts import Entry
from mhabridge.errors import WeightsError

_LISTED = 8


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """A tensor whose dtype or shape (``given``, in the model's layout) is not what the model has (``expected``)."""

    name: str
    given: str
    expected: str

    def __str__(self) -> str:
        return f"{self.name} ({self.given}, not {self.expected})"


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What ``load_into`` did.

    Args:
        source: the file.
        loaded: the names of the model's tensors that got their values; tied ones under each name that the file has.
        missing: the model's names that the file has nothing for.
        unexpected: names, in the model's framework, of tensors that the model has no place for.
        mismatched: tensors of another dtype or shape than the model's.
        errors: everything else that stands against loading.
        notes: what people should know, such as what was left out and why.
        entries: what each tensor was made of, as in a conversion.
    """

    source: str
    loaded: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[Mismatch, ...] = ()
    errors: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    entries: tuple[Entry, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether everything fitted.

        Example:
            >>> LoadReport("a.pth").ok, LoadReport("a.pth", missing=("weight",)).ok
            (True, False)
        """
        return not (self.missing or self.unexpected or self.mismatched or self.errors)

    def to_json(self) -> str:
        """The report as one JSON object."""
        fields: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["mismatched"] = [dataclasses.asdict(one) for one in self.mismatched]
        fields["entries"] = [entry.to_dict() for entry in self.entries]
        return json.dumps({"ok": self.ok, **fields})


def require_ok(report: LoadReport) -> None:
    """Refuse to load what does not fit.

    Raises:
        WeightsError: with the lists.

    Example:
        >>> require_ok(LoadReport("a.pth"))
    """
    lists = {
        "missing": report.missing,
        "unexpected": report.unexpected,
        "mismatched": tuple(map(str, report.mismatched)),
        "errors": report.errors,
    }
    if not report.ok:
        raise WeightsError(
            report.source,
            given="; ".join(f"{len(found)} {what}: {_some(found)}" for what, found in lists.items() if found),
            expected="a value for every tensor of the model, and no other",
            advice="Nothing was changed. "
            + (
                prefix_advice(report.missing, report.unexpected)
                or "Use prefix, rename, drop or allow_missing; strict=False loads what fits."
            ),
        )


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
