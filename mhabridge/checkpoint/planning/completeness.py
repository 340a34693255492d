"""Law 1: every tensor of the source is used, and every name of the target is filled exactly once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from mhabridge.checkpoint.planning import renaming
from mhabridge.checkpoint.planning.drafts import Draft, Entry
from mhabridge.errors import WeightsError

Shape = tuple[int, ...]
_LISTED = 8


@dataclasses.dataclass(frozen=True)
class Misfit:
    """What stands between a target's names and shapes and those that it would get.

    Args:
        missing: the target's names that nothing is there for, and that may not be missing.
        unexpected: names that the target does not have.
        mismatched: what the target would get, and what it has, by name.
        allowed: the pattern that lets a name of the target be missing, by name.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: Mapping[str, tuple[Shape, Shape]] = dataclasses.field(default_factory=dict)
    allowed: Mapping[str, str] = dataclasses.field(default_factory=dict)


def misfit(found: Mapping[str, Shape], wanted: Mapping[str, Shape], allow_missing: Sequence[str] = ()) -> Misfit:
    """Hold what a target would get against its real names and shapes.

    Args:
        found: the shapes of what is to be written, by name.
        wanted: the target's own.
        allow_missing: patterns of the target's names that may stay without a tensor.

    Example:
        >>> misfit({"a": (2,), "b": (3,)}, {"b": (4,), "c": ()}).mismatched
        {'b': ((3,), (4,))}
    """
    absent = [name for name in wanted if name not in found]
    allowed = {name: renaming.matches(name, allow_missing) for name in absent}
    return Misfit(
        tuple(name for name in absent if allowed[name] is None),
        tuple(name for name in found if name not in wanted),
        {
            name: (found[name], tuple(wanted[name]))
            for name in found
            if found[name] != tuple(wanted.get(name, found[name]))
        },
        {name: pattern for name, pattern in allowed.items() if pattern is not None},
    )


def require_used(draft: Draft) -> None:
    """Refuse a plan that leaves tensors of the source over.

    Raises:
        WeightsError: it does.
    """
    left = [draft.old_names[name] for name in draft.left()]
    if left:
        raise WeightsError(", ".join(left[:_LISTED]), given="no rule", expected="a place in the target")


def require_once(entries: Sequence[Entry]) -> dict[str, Shape]:
    """The shape of every name that is filled.

    Raises:
        WeightsError: a name is filled twice.
    """
    found: dict[str, Entry] = {}
    for entry in entries:
        other = found.setdefault(str(entry.target), entry)
        if other is not entry:
            raise WeightsError(
                str(entry.target),
                given=f"{', '.join(other.sources)} and {', '.join(entry.sources)}",
                expected="one tensor for this name",
                advice="Rename one of them (--rename), or leave one out (--drop).",
            )
    return {name: entry.after or () for name, entry in found.items()}


def require_fits(found: Misfit) -> None:
    """Refuse what does not fill the target exactly.

    Raises:
        WeightsError: with the names, or the shapes.
    """
    if found.missing or found.unexpected:
        both = f" ({', '.join(found.unexpected[:_LISTED])})" if found.missing and found.unexpected else ""
        raise WeightsError(
            ", ".join((found.missing or found.unexpected)[:_LISTED]),
            given=f"{len(found.missing)} names of the target without a tensor, "
            f"{len(found.unexpected)} tensors without a name{both}",
            expected="every name of the target filled, and no other",
            advice=prefix_advice(found.missing, found.unexpected) or "Use --rename, --drop or --allow-missing.",
        )
    for name, (shape, wanted) in found.mismatched.items():
        raise WeightsError(
            name,
            given=f"shape {shape}",
            expected=f"shape {wanted} in the target",
            advice="Nothing is reshaped to fit. If it is another kind of layer than it was taken for, use --kind.",
        )


def prefix_advice(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """How to rename when all names differ by the same prefix; empty when they do not.

    Example:
        >>> prefix_advice(["fc.bias", "fc.weight"], ["module.fc.bias", "module.fc.weight"])
        "All differ by 'module.': use the rule 'module.*=*' (rename, --rename)."
    """
    for shorter, longer, swapped in ((missing, unexpected, False), (unexpected, missing, True)):
        first = next(iter(longer), "")
        start = next((first[: -len(name)] for name in shorter if name and first.endswith(f".{name}")), "")
        if start and {start + name for name in shorter} == set(longer):
            rule = f"*={start}*" if swapped else f"{start}*=*"
            return f"All differ by {start!r}: use the rule {rule!r} (rename, --rename)."
    return ""
