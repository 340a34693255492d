"""Transformer layers of a checkpoint, and those of their parts that frameworks call otherwise (linear1, dense1)."""

from __future__ import annotations

from collections.abc import Iterable

from mhabridge import mapping
from mhabridge.checkpoint.planning.drafts import Paths
from mhabridge.checkpoint.planning.origins import Dialect

# The children of a transformer layer as PyTorch names them: with other ones it is somebody's own layer.
_ENCODER_LAYER = {"self_attn", "linear1", "linear2", "norm1", "norm2"}
_DECODER_LAYER = _ENCODER_LAYER | {"multihead_attn", "norm3"}


def transformer_parts(prefixes: Iterable[str], names: Iterable[str], to: Dialect) -> dict[str, str]:
    """The new path of every part of every transformer layer.

    Args:
        prefixes: of the attention layers.
        names: of all tensors.
        to: the target's framework.

    Example:
        >>> names = ["a.self_attn.in_proj_weight", *(f"a.{part}.weight" for part in _ENCODER_LAYER)]
        >>> parts = transformer_parts(["a.self_attn"], names, Dialect("mindspore"))
        >>> parts["a.linear1"], parts["a.norm1"]
        ('a.dense1', 'a.norm1')
    """
    children: dict[str, set[str]] = {prefix.rpartition(".")[0]: set() for prefix in prefixes}
    paths = Paths(children)
    for name in names:
        for parent in paths.above(name):
            child, dot, _ = name[len(parent) + bool(parent) :].partition(".")
            if dot:  # else it is a tensor of the layer itself
                children[parent].add(child)
    canonical, own = _canonical_names(), _own_names(to)
    return {
        _path(parent, child): _path(parent, own.get(canonical.get(child, child), canonical.get(child, child)))
        for parent, found in children.items()
        if {canonical.get(child, child) for child in found} in (_ENCODER_LAYER, _DECODER_LAYER)
        for child in found
    }


def _path(parent: str, child: str) -> str:
    return f"{parent}.{child}" if parent else child


def _canonical_names() -> dict[str, str]:
    """PyTorch's name of a part, by what any framework calls it."""
    return {
        entry["name"]: entry["canonical"]
        for framework in mapping.FRAMEWORKS
        for entry in mapping.table(framework)["transformer"].get("modules", [])
    }


def _own_names(to: Dialect) -> dict[str, str]:
    """What the target calls a part, by PyTorch's name."""
    return {
        entry["canonical"]: entry["name"]
        for entry in mapping.table(to.framework)["transformer"].get("modules", [])
        if to.version is None or mapping.version_key(to.version) >= mapping.version_key(entry.get("since", "0"))
    }
