"""One checkpoint as a diff sees it: attention layers by their canonical parameters, other layers by their own tensors.

Nothing is refused for being unknown: what cannot be told to be attention is a layer like any other, compared by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mhabridge import layouts, packing
from mhabridge.checkpoint.formats.scalars import as_tensor
from mhabridge.checkpoint.planning import modules, sidecar, turned
from mhabridge.checkpoint.planning.drafts import Draft, by_module
from mhabridge.checkpoint.planning.layers import Block, find_blocks
from mhabridge.checkpoint.planning.modules import Reading
from mhabridge.checkpoint.planning.origins import source_dialects
from mhabridge.checkpoint.storage.comparing import all_zero
from mhabridge.checkpoint.storage.stored import StoredFile, StoredObject, StoredTensor, shapes_of
from mhabridge.errors import ArgumentError, MHABridgeError


@dataclasses.dataclass(frozen=True)
class Group:
    """One layer of one checkpoint.

    Args:
        path: its path after the user's rules.
        own_path: its path in the file.
        tensors: of attention the canonical parameters, as views; else the layer's own tensors by the last part of
            their names.
        names: the full name in the file of the tensor that each of these lies in.
        block: what is known of it as attention; None for other layers.
        readings: what kinds of layer it can be.
        notes: what was left out.
    """

    path: str
    own_path: str
    tensors: Mapping[str, StoredTensor]
    names: Mapping[str, str]
    block: Block | None = None
    readings: tuple[Reading, ...] = ()
    notes: tuple[str, ...] = ()


class Checkpoint:
    """One side: its layers, in the file's order.

    Args:
        file: the open checkpoint.
        rename: the user's rules, as ``renaming.renamer`` takes them.
        spec: an ``MHASpec`` for all attention layers, or a mapping from prefixes to them.
        num_heads: of all attention layers.

    Raises:
        ArgumentError: a rule that is none or fits nothing, or a number of heads that no layer can have.
        CheckpointError: what travels with the file is not what we write there.
    """

    def __init__(self, file: StoredFile, rename: Any = None, spec: Any = None, num_heads: int | None = None) -> None:
        draft = Draft(file, rename)
        self.file, self.num_heads = file, num_heads
        self.tensors, self.old_names = dict(draft.tensors), draft.old_names
        self.specs = sidecar.known(file, self._own_specs(spec))
        self.dialects = source_dialects(file, self.specs)
        self.blocks: dict[str, Block] = {}
        self.unread: dict[str, MHABridgeError] = {}  # prefixes of what looks like attention, and why it is not read so
        self.borrowed: set[str] = set()  # prefixes whose sizes the other side told
        self._find_blocks()

    @property
    def framework(self) -> str:
        """Whose names the file has; "" where that cannot be told."""
        known = {one.partition(".")[0] for one in self.dialects}
        return known.pop() if len(known) == 1 else ""

    def _find_blocks(self) -> None:
        try:
            found = find_blocks(self.file, self.tensors, self.specs, self.num_heads, self.old_names)
            self.blocks = {block.prefix: block for block in found}
        except MHABridgeError as error:
            said = self.num_heads is not None and "num_heads" in f"{error.subject} {error.given}"
            if said and isinstance(error, ArgumentError):
                raise  # it is the user's word that is wrong
            prefixes = layouts.prefixes(self.tensors) + layouts.prefixes(self.tensors, refused=True)
            for prefix in dict.fromkeys(prefixes):
                below = next(iter(packing.below(prefix, {name: name for name in self.tensors}).values()))
                self.try_block(prefix, self.specs.of(prefix, self._old_path(prefix, below)))

    def _own_specs(self, spec: Any) -> Any:
        """Of specs by prefix those of layers that this side has: the other may call its layers otherwise."""
        if not isinstance(spec, Mapping):
            return spec
        return {prefix: one for prefix, one in spec.items() if packing.below(prefix, self.file)} or None

    def try_block(self, prefix: str, known: Mapping[str, Any]) -> bool:
        """Read what lies under a prefix as attention, knowing some fields of its spec; whether it is that."""
        specs = dataclasses.replace(self.specs, by_prefix={prefix: known} if known else {}, for_all={})
        below = [*packing.below(prefix, {name: name for name in self.tensors}).values()]
        try:
            own = {name: self.tensors[name] for name in below}
            found = find_blocks(self.file, own, specs, self.num_heads, self.old_names)
        except MHABridgeError as error:
            self.unread[prefix] = error
            return False
        self.blocks.update({block.prefix: block for block in found})
        self.unread.pop(prefix, None)
        return True

    def told(self, block: Block) -> Mapping[str, Any]:
        """What travels with the file, or what the user says, of an attention layer's spec."""
        return self.specs.of(block.prefix, self._old_path(block.prefix, block.names[0]))

    def drop_scalars(self, objects: Sequence[StoredObject]) -> dict[str, Any]:
        """Take out scalar tensors that are entries without a tensor on the other side; their values by name."""
        found = {}
        for entry in objects:
            tensor = self.tensors.get(entry.name)
            if tensor is not None and tensor.shape == () and as_tensor(entry) is not None:
                found[entry.name] = self.file.read(self.old_names[entry.name])
                del self.tensors[entry.name]
        return found

    def groups(self) -> list[Group]:
        """All layers, in the file's order."""
        place = {name: number for number, name in enumerate(self.tensors)}
        taken = {name for block in self.blocks.values() for name in block.names}
        found = [(place[block.names[0]], self._attention(block)) for block in self.blocks.values()]
        left = [name for name in self.tensors if name not in taken]
        lying = turned.paths_in_file(self.blocks.values(), self.old_names)
        for path, leaves in by_module(left).items():
            found.append((place[next(iter(leaves.values()))], self._layer(path, leaves, lying)))
        return [group for _, group in sorted(found, key=lambda pair: pair[0])]

    def _attention(self, block: Block) -> Group:
        own, added, notes = block.spec.parameter_shapes(), [], list(block.notes)
        for part, view in block.views.items():
            if part not in own and block.prefix not in self.borrowed and all_zero(self.file, view):
                added.append(part)
                notes.append(f"{part}: zeros that its layout asks for; the file's spec says that the layer has none")
        views = {part: block.views[part] for part in [*own, *block.views] if part in block.views and part not in added}
        names = {part: self.old_names.get(view.name, view.name) for part, view in views.items()}
        return Group(block.prefix, self._old_path(block.prefix, block.names[0]), views, names, block, (), tuple(notes))

    def _old_path(self, path: str, name: str) -> str:
        below, old = name[len(packing.join(path, "")) :], self.old_names[name]
        return old[: -len(below)].rstrip(".") if old.endswith(below) else path

    def _layer(self, path: str, leaves: Mapping[str, str], lying: Collection[str]) -> Group:
        """Another layer; ``lying``: the paths in the file at which linear maps lie the other way round."""
        tensors = {leaf: self.tensors[name] for leaf, name in leaves.items()}
        names = {leaf: self.old_names[name] for leaf, name in leaves.items()}
        old_path = self._old_path(path, next(iter(leaves.values())))
        if old_path in lying and turned.reading(shapes_of(tensors), turned=True):
            tensors["weight"] = turned.unturned(tensors["weight"])
        shapes = shapes_of(tensors)
        found = tuple(modules.readings(shapes, self.dialects) or modules.readings(shapes))
        return Group(path, old_path, tensors, names, None, found)

    def may_have(self, group: Group, kind: str, part: str) -> bool:
        """Whether a layer of this kind has such a parameter in a framework that has the layer's other names."""
        shapes = shapes_of(group.tensors)
        alike = [
            one
            for one in modules.known_dialects()
            if any(found.kind == kind for found in modules.readings(shapes, one))
        ]
        own = [one for one in alike if one in self.dialects] or alike
        return any(one.part == part for dialect in own for one in modules.kinds_of(dialect)[kind].parts)
