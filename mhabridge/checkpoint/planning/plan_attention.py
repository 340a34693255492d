"""Plans the attention layers of a checkpoint: from the layout that they have to the one that they shall have."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

from mhabridge import mapping, packing
from mhabridge.checkpoint.planning.drafts import Check, Draft, Shape
from mhabridge.checkpoint.planning.layers import Block
from mhabridge.checkpoint.storage import views
from mhabridge.checkpoint.storage.comparing import all_zero
from mhabridge.checkpoint.storage.stored import StoredTensor
from mhabridge.errors import UnsupportedError, WeightsError
from mhabridge.packing import Tensor
from mhabridge.spec import MHASpec

_MOST_KNOWN = 256  # kinds of layers


def plan_attention(draft: Draft, block: Block, layout_name: str) -> None:
    """Bring one attention layer into a layout.

    Raises:
        UnsupportedError: the layout cannot hold such a layer.
        WeightsError: a bias that the spec does not have is not zero, and would be lost.
    """
    path = packing.join(block.prefix, "")
    own = tuple([name[len(path) :] for name in block.tensors])
    _require_zeros(draft, block)
    try:
        steps = _steps(block.layout, layout_name, block.spec, own)
    except UnsupportedError as error:
        said = f"{block.prefix or 'the attention layer'}: {error.subject}"
        raise UnsupportedError(said, given=error.given, expected=error.expected, advice=error.advice) from error
    for step in steps:
        same = None if step.same is None else path + step.same
        if same is not None and draft.tensors[same].plain:
            draft.carry(same, path + step.tensor.name, draft.tensors[same].shape, step.rule)
        else:
            _fill(draft, block, step, path)
    draft.use(block.tensors)


@dataclasses.dataclass(frozen=True)
class _Step:
    """How one tensor of the target is made; names are those below the layer's path.

    Args:
        tensor: the target's.
        parts: the parameters that it holds, and their shapes.
        same: the tensor of the source that holds just these, packed in the same way; None if there is none.
        sources: those that hold some of them.
        zeros: the parameters that the source does not have.
        rule: by which rule.
    """

    tensor: Tensor
    parts: Mapping[str, Shape]
    same: str | None
    sources: tuple[str, ...]
    zeros: tuple[str, ...]
    rule: str


@functools.lru_cache(maxsize=_MOST_KNOWN)
def _steps(start_name: str, layout_name: str, spec: MHASpec, own: tuple[str, ...]) -> tuple[_Step, ...]:
    """How a layer is brought from one layout into another; most layers of a model are alike.

    Raises:
        UnsupportedError: the layout cannot hold such a layer.
    """
    layout, start = packing.find(layout_name), packing.find(start_name)
    active, filled = layout.active(spec), layout.filled(spec)
    whole = {(tensor.steps, tuple(parts)): tensor.name for tensor, parts in start.active(spec) if tensor.name in own}
    holders = {part: name for (_, parts), name in whole.items() for part in parts}
    rule = f"attention: {start.name} -> {layout.name}"
    if start.tensors == layout.tensors and not filled.keys() ^ start.filled(spec).keys():
        rule = f"attention: {layout.name}, as it is"
    found = []
    for tensor, parts in active:
        zeros = tuple(part for part in parts if part in filled)
        more = f"; zeros for {', '.join(zeros)}, which it cannot be without" if zeros else ""
        # Its shape is the target's too, since those of the parts are the spec's.
        same = None if zeros else whole.get((tensor.steps, tuple(parts)))
        sources = tuple(dict.fromkeys(holders[part] for part in parts if part in holders))
        found.append(_Step(tensor, parts, same, sources or own[:1], zeros, rule + more))
    return tuple(found)


def holds(layout_name: str, spec: MHASpec) -> bool:
    """Whether a layout has a place for all parameters of a layer.

    Example:
        >>> [holds("megengine", MHASpec(4, 2, add_bias_kv=also)) for also in (False, True)]
        [True, False]
    """
    try:
        return bool(packing.find(layout_name).active(spec))
    except UnsupportedError:
        return False


def drop_in(framework: str) -> str | None:
    """The layout of our drop-in, where it holds more than the framework's own layer.

    Example:
        >>> drop_in("megengine"), drop_in("torch")
        ('megengine-dropin', None)
    """
    found: str | None = mapping.table("layouts")["drop_ins"].get(framework)
    return found


def _fill(draft: Draft, block: Block, step: _Step, path: str) -> None:
    """One tensor of the target, and how its parts are held against the source."""
    name, tensor = path + step.tensor.name, step.tensor
    origins = [None if part in step.zeros else block.views[part] for part in step.parts]
    shapes = list(step.parts.values())
    made = [
        views.zeros(name, block.spec.dtype, shape) if origin is None else origin
        for origin, shape in zip(origins, shapes, strict=True)
    ]
    sources = [path + one for one in step.sources]
    draft.fill(sources, views.packed(draft.file, name, tensor.steps, made), step.rule)
    for number, origin in enumerate(origins):

        def view_of(stored: StoredTensor, number: int = number) -> StoredTensor:
            return views.part_of(stored, tensor.steps, shapes, number)

        draft.checks.append(Check(name, view_of, origin))


def _require_zeros(draft: Draft, block: Block) -> None:
    """A bias that the source's layout has and the spec has not is lost, so it must be what it stands for."""
    for part in packing.find(block.layout).filled(block.spec):
        if part in block.views and not all_zero(draft.file, block.views[part]):
            raise WeightsError(
                f"{block.prefix}: {part}",
                given="values other than zero, and a spec without it",
                expected="zeros there",
                advice=f"So that nothing is lost use a spec with {part}=True.",
            )
