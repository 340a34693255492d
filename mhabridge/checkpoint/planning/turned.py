"""Linear maps whose weights lie the other way round, (in, out), because the attention beside them has such a layout.

GPT-2 has a class of its own (Conv1D) for all its linear maps; a square one has the shape of everybody else's, so only
the attention beside it tells. Which layouts, and the paths beside them, is data: ``[turned_beside]`` in layouts.toml.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from mhabridge import mapping, packing
from mhabridge.checkpoint.planning.modules import Reading, Shape
from mhabridge.checkpoint.storage import views
from mhabridge.checkpoint.storage.stored import StoredTensor
from mhabridge.checkpoint.storage.views import View

if TYPE_CHECKING:
    from mhabridge.checkpoint.planning.layers import Block

STEPS = ("transpose",)  # from (out, in) to what is stored


def paths(attention: Iterable[tuple[str, str]]) -> set[str]:
    """The paths at which such linear maps may be.

    Args:
        attention: prefix and layout of each attention layer.

    Example:
        >>> sorted(paths([("h.0.attn", "gpt2"), ("h.1.attn", "torch")]))
        ['h.0.mlp.c_fc', 'h.0.mlp.c_proj']
    """
    declared = mapping.table("layouts")["turned_beside"]
    return {
        packing.join(prefix.rpartition(".")[0], path)
        for prefix, layout in attention
        if prefix
        for path in declared.get(layout, ())
    }


def paths_in_file(blocks: Iterable[Block], old_names: Mapping[str, str]) -> set[str]:
    """The paths in the file at which such linear maps may be.

    Args:
        blocks: its attention layers.
        old_names: the names that tensors have in the file, by those that rules gave them.
    """
    declared = mapping.table("layouts")["turned_beside"]
    return paths(
        (shared_path(old_names[name] for name in block.names), block.layout)
        for block in blocks
        if block.layout in declared
    )


def shared_path(names: Iterable[str]) -> str:
    """What the names of an attention layer's tensors have in common: its prefix in the file, whatever rules make of it.

    Example:
        >>> shared_path(["h.0.attn.c_attn.weight", "h.0.attn.c_proj.bias"])
        'h.0.attn'
    """
    paths = [name.split(".")[:-1] for name in names]
    alike = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in alike)


def reading(shapes: Mapping[str, Shape], turned: bool) -> Reading | None:
    """The linear map that a layer's own tensors are, stored this way or the other; None if they are none with a bias.

    Example:
        >>> reading({"weight": (4, 16), "bias": (16,)}, turned=True).sizes
        {'O': 16, 'I': 4}
        >>> reading({"weight": (4, 16), "bias": (16,)}, turned=False) is None
        True
    """
    if shapes.keys() != {"weight", "bias"} or len(shapes["weight"]) != 2:
        return None
    outputs, inputs = shapes["weight"][::-1] if turned else shapes["weight"]
    if shapes["bias"] != (outputs,):
        return None
    return Reading("linear", {"weight": "weight", "bias": "bias"}, {"O": outputs, "I": inputs})


def unturned(weight: StoredTensor) -> View:
    """A stored (in, out) weight as one of (out, in)."""
    return views.split(weight, STEPS, [weight.shape[::-1]])[0]
