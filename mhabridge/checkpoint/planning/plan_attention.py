"""Plans the attention layers of a checkpoint: from the layout that they have to the one that they shall have."""

from __future__ import annotations

from collections.abc import Mapping

from mhabridge import mapping, packing
from mhabridge.checkpoint.planning.drafts import Check, Draft, Shape
from mhabridge.checkpoint.planning.layers import Block
from mhabridge.checkpoint.storage import views
from mhabridge.checkpoint.storage.comparing import all_zero
from mhabridge.checkpoint.storage.stored import StoredTensor
from mhabridge.errors import UnsupportedError, WeightsError
from mhabridge.packing import Layout, Tensor
from mhabridge.spec import MHASpec


def plan_attention(draft: Draft, block: Block, layout_name: str) -> None:
    """Bring one attention layer into a layout.

    Raises:
        UnsupportedError: the layout cannot hold such a layer.
        WeightsError: a bias that the spec does not have is not zero, and would be lost.
    """
    layout, start = packing.find(layout_name), packing.find(block.layout)
    _require_zeros(draft, block, start)
    active, filled, whole = _active(layout, block), layout.filled(block.spec), _whole(block, start)
    holders = {part: name for (_, parts), name in whole.items() for part in parts}
    rule = f"attention: {block.layout} -> {layout.name}"
    if start.tensors == layout.tensors and not filled.keys() ^ start.filled(block.spec).keys():
        rule = f"attention: {layout.name}, as it is"
    for tensor, parts in active:
        same = whole.get((tensor.steps, tuple(parts)))  # of the same shape, as the parts' are the spec's
        if same is not None and draft.tensors[same].plain and filled.keys().isdisjoint(parts):
            draft.carry(same, packing.join(block.prefix, tensor.name), draft.tensors[same].shape, rule)
            continue
        zeros = [part for part in parts if part in filled]
        more = f"; zeros for {', '.join(zeros)}, which it cannot be without" if zeros else ""
        sources = list(dict.fromkeys(holders[part] for part in parts if part in holders))
        _fill(draft, block, tensor, parts, filled, sources or list(block.names[:1]), rule + more)
    draft.use(block.names)


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


def _active(layout: Layout, block: Block) -> tuple[tuple[Tensor, Mapping[str, Shape]], ...]:
    """The tensors of the layout, each with the parameters that it holds; an error says of which layer it speaks."""
    try:
        return layout.active(block.spec)
    except UnsupportedError as error:
        said = f"{block.prefix or 'the attention layer'}: {error.subject}"
        raise UnsupportedError(said, given=error.given, expected=error.expected, advice=error.advice) from error


def _whole(block: Block, start: Layout) -> dict[tuple[tuple[str, ...], tuple[str, ...]], str]:
    """The full names of the source's tensors, by how they are packed and the parameters that they hold."""
    named = {(tensor.steps, tuple(parts)): tensor.name for tensor, parts in start.active(block.spec)}
    full = {key: packing.join(block.prefix, name) for key, name in named.items()}
    return {key: name for key, name in full.items() if name in block.tensors}


def _fill(
    draft: Draft,
    block: Block,
    tensor: Tensor,
    parts: Mapping[str, Shape],
    filled: Mapping[str, Shape],
    sources: list[str],
    rule: str,
) -> None:
    """One tensor of the target, and how its parts are held against the source."""
    name = packing.join(block.prefix, tensor.name)
    origins = [None if part in filled else block.views[part] for part in parts]
    shapes = list(parts.values())
    made = [
        views.zeros(name, block.spec.dtype, shape) if origin is None else origin
        for origin, shape in zip(origins, shapes, strict=True)
    ]
    draft.fill(sources, views.packed(draft.file, name, tensor.steps, made), rule)
    for number, origin in enumerate(origins):

        def view_of(stored: StoredTensor, number: int = number) -> StoredTensor:
            return views.part_of(stored, tensor.steps, shapes, number)

        draft.checks.append(Check(name, view_of, origin))


def _require_zeros(draft: Draft, block: Block, start: Layout) -> None:
    """A bias that the source's layout has and the spec has not is lost, so it must be what it stands for."""
    for part in start.filled(block.spec):
        if part in block.views and not all_zero(draft.file, block.views[part]):
            raise WeightsError(
                f"{block.prefix}: {part}",
                given="values other than zero, and a spec without it",
                expected="zeros there",
                advice=f"So that nothing is lost use a spec with {part}=True.",
            )
