"""Holds the plan of a checkpoint against a live model: what can be filled, and all that stands against it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from mhabridge import packing
from mhabridge.checkpoint.in_memory import Arrays, same_numbers
from mhabridge.checkpoint.load_report import LoadReport, Mismatch
from mhabridge.checkpoint.planning.completeness import Misfit, misfit
from mhabridge.checkpoint.planning.plan import Options, Plan
from mhabridge.checkpoint.storage.stored import StoredFile
from mhabridge.checkpoint.storage.writing import Outgoing
from mhabridge.spec import MHASpec
from mhabridge.state import Slot

# What a layer computes beside its weights; specs that travel have defaults there unless somebody said more.
_MEANING = ("scale", "add_zero_attn", "residual")
_LISTED = 8


class Fitting:
    """A plan beside a model.

    Args:
        file: the open checkpoint.
        plan: to the model's framework, names and shapes.
        slots: of the model.
        specs: of the model's attention layers, by path.
        options: of the plan.
    """

    def __init__(
        self, file: StoredFile, plan: Plan, slots: Sequence[Slot], specs: Mapping[str, MHASpec], options: Options
    ) -> None:
        self.file, self.plan, self.specs, self.options = file, plan, specs, options
        invented = _invented(plan)
        self.made = {one.name: one for one in plan.outgoing if one.name not in invented}
        self.wanted: dict[str, Slot] = {}
        for slot in slots:  # of a tensor with several names one is enough
            there = [name for name in slot.every_name if name in self.made]
            self.wanted.update(dict.fromkeys(there or slot.names[:1], slot))

    def report(self) -> LoadReport:
        """What fits and what does not."""
        wrong = misfit(
            {name: one.shape for name, one in self.made.items()},
            {name: slot.shape for name, slot in self.wanted.items()},
            self.options.may_be_missing,
        )
        mismatched = self._mismatched()
        errors = {**self._other_heads(), **self._torn()}
        unfit = {one.name for one in mismatched}.union(*errors.values())
        return LoadReport(
            str(self.file.path),
            tuple(name for name in self.made if name in self.wanted and name not in unfit),
            wrong.missing,
            wrong.unexpected,
            mismatched,
            tuple(errors),
            tuple(self._notes(wrong)),
            self.plan.entries,
        )

    def chosen(self, report: LoadReport) -> list[Outgoing]:
        """What is to be filled: of a tied tensor one."""
        first = {self.wanted[name].names[0]: self.made[name] for name in reversed(report.loaded)}
        return list(first.values())[::-1]

    def _mismatched(self) -> tuple[Mismatch, ...]:
        return tuple(
            Mismatch(name, f"{one.dtype} {one.shape}", f"{slot.dtype} {slot.shape}")
            for name, one in self.made.items()
            for slot in [self.wanted.get(name)]
            if slot is not None and (one.shape, one.dtype) != (slot.shape, slot.dtype)
        )

    def _other_heads(self) -> dict[str, Collection[str]]:
        """The same weights with another number of heads are another layer, and no shape tells."""
        found: dict[str, Collection[str]] = {}
        for block in self.plan.blocks:
            spec = self.specs.get(block.prefix)
            if spec is not None and block.heads_known and block.spec.num_heads != spec.num_heads:
                text = f"{block.prefix or 'num_heads'}: {block.spec.num_heads} heads in the file, {spec.num_heads} here"
                found[text] = [name for name in self.made if name.startswith(packing.join(block.prefix, ""))]
        return found

    def _torn(self) -> dict[str, Collection[str]]:
        """Tied tensors of the model for which the file has different values."""
        names: dict[str, list[str]] = {}
        for name, slot in self.wanted.items():
            if name in self.made:
                names.setdefault(slot.names[0], []).append(name)
        arrays = Arrays(list(self.made.values()))
        return {
            f"{', '.join(found)}: one tensor in the model, and different ones in the file": found
            for found in names.values()
            if any(not same_numbers(arrays, found[0], other) for other in found[1:])
        }

    def _notes(self, wrong: Misfit) -> list[str]:
        notes = [*self.file.notes, *self.plan.notes]
        notes += [f"{name}: kept as it was; {pattern} may be missing" for name, pattern in wrong.allowed.items()]
        notes += [f"{', '.join(entry.sources)}: {entry.rule}" for entry in self.plan.entries if entry.target is None]
        used = {name for entry in self.plan.entries for name in entry.sources}
        if self.options.prefix and self.file.keys() - used:
            notes.append(f"{len(self.file.keys() - used)} tensors outside {self.options.prefix} were not looked at.")
        plain = [entry.name for entry in self.file.objects if not entry.inert]
        if plain:
            more = f" and {len(plain) - _LISTED} more" if len(plain) > _LISTED else ""
            notes.append(f"Entries that are no tensors were not looked at: {', '.join(plain[:_LISTED])}{more}.")
        return notes + self._differences()

    def _differences(self) -> list[str]:
        notes = []
        for block in self.plan.blocks:
            spec = self.specs.get(block.prefix, block.spec)
            for field in _MEANING:
                here, there = getattr(spec, field), getattr(block.spec, field)
                if here != there:
                    notes.append(f"{block.prefix or 'the layer'}: {field} is {here} here; by the file it is {there}.")
        return notes


def _invented(plan: Plan) -> set[str]:
    """Tensors of zeros for which the file has none, though its own layout has a place for them: they are missing.

    In another layout's file such zeros are what an absent bias means.
    """
    values = {check.target for check in plan.checks if check.source is not None}
    zeros = {check.target for check in plan.checks} - values
    places = {
        packing.join(block.prefix, one.name) for block in plan.blocks for one in packing.find(block.layout).tensors
    }
    return zeros & places
