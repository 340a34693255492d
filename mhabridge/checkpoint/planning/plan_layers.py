"""Plans the layers of a checkpoint that are no attention: each under the target framework's names and shapes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase

from mhabridge.checkpoint.planning import kinds, modules, renaming, turned
from mhabridge.checkpoint.planning.drafts import Draft, Shape, by_module
from mhabridge.checkpoint.planning.kinds import Choice
from mhabridge.checkpoint.planning.origins import Dialect
from mhabridge.checkpoint.planning.sidecar import Specs
from mhabridge.checkpoint.storage.stored import shapes_of
from mhabridge.errors import ArgumentError

_LISTED = 4
_OF_TURNED = ("linear", kinds.UNKNOWN)  # what people may say of a linear map that lies the other way round


class LayerPlanner:
    """Plans every layer that is no attention.

    Args:
        draft: of the plan.
        to: the target's framework.
        dialects: the frameworks that the source may be from.
        specs: what travels with the source.
        said: what the user says that layers are, by patterns of paths.
        wanted: the target's real names and shapes, when they are known.
        turned_paths: the paths of linear maps that lie the other way round, as ``turned.paths`` gives them: those in
            the source, before any rule, and those in the target.
    """

    def __init__(
        self,
        draft: Draft,
        to: Dialect,
        dialects: Sequence[str],
        specs: Specs,
        said: Mapping[str, str],
        wanted: Mapping[str, Shape] | None,
        turned_paths: tuple[Collection[str], Collection[str]],
    ) -> None:
        self.draft, self.to, self.dialects = draft, to, dialects
        self.specs, self.said, self.turned = specs, said, turned_paths
        self.wanted = None if wanted is None else _by_path(wanted)
        self.left_open: dict[str, str] = {}  # layers whose kind the target's own names and shapes do not tell
        self._matched: set[str] = set()
        self._paths: list[str] = []
        self._doubtful: dict[str, list[str]] = {}

    def plan(self, parts: Mapping[str, str]) -> None:
        """Carry every tensor that is left.

        Args:
            parts: the new paths of the parts of transformer layers.

        Raises:
            ArgumentError: a kind of layer that is stated does not fit, or nothing has such a path.
            CheckpointError: a layer with several readings.
            UnsupportedError: a layer that the target's framework does not have.
        """
        layers = by_module(self.draft.left())
        self._paths = list(layers)
        for path, names in layers.items():
            # mindspore.mint has no transformer layers: a model has those of mindspore.nn, with its norms.
            dialect = self.to.framework if path in parts else self.to.name
            new_path = parts.get(path, path)
            if self.wanted is not None and path in self.wanted:
                new_path = path  # somebody's own layer that only looks like the framework's
            self._layer(path, names, dialect, f"{new_path}." if new_path else "")
        for told, paths in self._doubtful.items():
            more = f" and {len(paths) - _LISTED} more" if len(paths) > _LISTED else ""
            self.draft.notes.append(f"{', '.join(paths[:_LISTED])}{more}: {told}.")
        self._require_matched()

    def _require_matched(self) -> None:
        unused = [pattern for pattern in self.said if pattern not in self._matched]
        if unused:
            near = dict.fromkeys(path for pattern in unused for path in renaming.close(pattern, self._paths))
            raise ArgumentError(
                "kinds",
                given=", ".join(map(repr, unused)),
                expected="patterns of paths of layers, such as 'encoder.*.dw'",
                advice="No layer that could be of this kind has such a path."
                + f" Close to it: {', '.join(near)}." * bool(near),
            )

    def _layer(self, path: str, names: Mapping[str, str], dialect: str, start: str) -> None:
        own = shapes_of({leaf: self.draft.tensors[name] for leaf, name in names.items()})
        if self._is_turned(path, names, own, dialect, start):
            return
        found = modules.readings(own, self.dialects)
        wanted = None if self.wanted is None else self.wanted.get(start.rstrip("."), {})
        dialect = kinds.fitting_dialect(found, dialect, wanted)
        recorded = self.specs.kinds.get(self.draft.old_path(names))
        choice = self._choice(path, found, dialect, wanted, recorded)
        if choice is None:
            for leaf, name in names.items():
                self.draft.carry(name, name, own[leaf], "unchanged: no known kind of layer")
            return
        written = choice.written(dialect)
        for leaf, part in choice.reading.parts.items():
            if part in written:
                native, shape = written[part]
                self.draft.carry(names[leaf], start + native, shape, choice.rule)
            else:
                self.draft.leave_out(names[leaf], f"{choice.reading.kind}: {dialect} has no {part}")
        if choice.others:
            told = f"read as {choice}; by names and shapes it could be {' or '.join(choice.others)} (--kind)"
            self._doubtful.setdefault(told, []).append(path)
        self._remember(start.rstrip("."), choice, dict(written.values()))

    def _is_turned(
        self, path: str, names: Mapping[str, str], own: Mapping[str, Shape], dialect: str, start: str
    ) -> bool:
        """Carry a linear map that lies the other way round in the source or in the target; whether it is one."""
        old_path = self.draft.old_path(names)
        before, after = old_path in self.turned[0], path in self.turned[1]
        if not (before or after) or self._said(path, _OF_TURNED) or not self._may_be_linear(old_path):
            return False  # whoever says that it is linear means one that lies as everybody else's
        reading = turned.reading(own, before)
        if reading is None:
            return False
        written = {part: (start + name, shape) for part, (name, shape) in reading.in_dialect(dialect).items()}
        weight = self.draft.tensors[names["weight"]]
        canonical = turned.unturned(weight) if before else weight
        ways = ["(in, out)" if one else "(out, in)" for one in (before, after)]
        rule = f"linear: {' -> '.join(ways)}" if before != after else f"linear: {ways[0]}, as it is"
        self.draft.turn(names["weight"], written["weight"][0], canonical, turned.STEPS if after else (), rule)
        self.draft.carry(names["bias"], *written["bias"], rule)
        return True

    def _may_be_linear(self, old_path: str) -> bool:
        return self.specs.kinds.get(old_path) in (None, "linear")

    def _choice(
        self,
        path: str,
        found: Sequence[modules.Reading],
        dialect: str,
        wanted: Mapping[str, Shape] | None,
        recorded: str | None,
    ) -> Choice | None:
        """The reading that holds; None for a layer of no known kind."""
        possible = {*(reading.kind for reading in found), kinds.UNKNOWN}
        said = self._said(path, possible)
        if said is None and recorded is not None and recorded.partition(":")[0] not in possible:
            raise self.specs.stale(f"it says that {path} is a {recorded}, and its tensors are none of one")
        if kinds.UNKNOWN in (said, recorded if said is None else None):
            self.left_open.update({path: kinds.UNKNOWN} if found else {})
            return None
        if said is not None:
            return kinds.stated(path, found, said, dialect)
        if recorded is not None:
            try:
                return kinds.of_record(path, found, recorded, dialect, wanted)
            except ArgumentError as error:
                raise self.specs.stale(str(error)) from error
        found = kinds.not_ruled_out(path, found)
        return kinds.decide(path, found, dialect, wanted) if found else None

    def _said(self, path: str, possible: Collection[str]) -> str | None:
        """What the user says of a layer: of this path, else by a pattern, which concerns only what it can be."""
        if path in self.said:
            self._matched.add(path)
            return self.said[path]
        fitting = {
            pattern: kind
            for pattern, kind in self.said.items()
            if fnmatchcase(path, pattern) and kind.partition(":")[0] in possible
        }
        self._matched.update(fitting)
        return next(iter(fitting.values()), None)

    def _remember(self, path: str, choice: Choice, written: Mapping[str, Shape]) -> None:
        alike = modules.of_framework(self.to.framework)
        if len({reading.kind for reading in modules.readings(written, alike)}) > 1:
            self.left_open[path] = choice.recorded


def _by_path(wanted: Mapping[str, Shape]) -> dict[str, dict[str, Shape]]:
    """Names and shapes of each layer's own tensors, by the layer's path."""
    grouped = by_module(wanted)
    return {path: {leaf: tuple(wanted[name]) for leaf, name in names.items()} for path, names in grouped.items()}
