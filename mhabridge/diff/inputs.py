"""Inputs and masks to try a layer on, drawn by seed."""

from __future__ import annotations

from typing import Any

import numpy as np

from mhabridge import dtypes
from mhabridge.errors import ArgumentError
from mhabridge.spec import MHASpec

MASKS = ("none", "padding", "bool", "float", "per-head", "causal")


def random_inputs(
    spec: MHASpec, seed: int = 0, *, batch: int = 2, target: int = 5, source: int = 7
) -> dict[str, np.ndarray]:
    """Normally distributed query, key and value in the spec's axis order and dtype.

    Args:
        spec: the layer.
        seed: the same seed gives the same numbers, whatever the dtype.
        batch: N.
        target: L.
        source: S; other than L, so that a mix-up of the two shows.

    Example:
        >>> {name: array.shape for name, array in random_inputs(MHASpec(8, 2, kdim=4)).items()}
        {'query': (5, 2, 8), 'key': (7, 2, 4), 'value': (7, 2, 8)}
    """
    rng = np.random.default_rng([seed, 1])
    shapes = {
        "query": (target, spec.embed_dim),
        "key": (source, spec.key_features),
        "value": (source, spec.value_features),
    }
    arrays = {}
    for name, (length, features) in shapes.items():
        array = dtypes.round_to(rng.standard_normal((batch, length, features)), spec.dtype)
        arrays[name] = array if spec.batch_first else np.ascontiguousarray(array.swapaxes(0, 1))
    return arrays


def random_masks(
    names: str, spec: MHASpec, seed: int = 0, *, batch: int = 2, target: int = 5, source: int = 7
) -> dict[str, Any]:
    """Mask arguments by name; every row keeps at least its first position open.

    Args:
        names: one of ``MASKS``, or several joined by "+": "padding+causal".
        spec: the layer.
        seed: of the random ones.
        batch: N.
        target: L.
        source: S.

    Raises:
        ArgumentError: an unknown name, or two that are both an attn_mask.

    Example:
        >>> sorted(random_masks("padding+causal", MHASpec(8, 2)))
        ['is_causal', 'key_padding_mask']
    """
    rng = np.random.default_rng([seed, 2])
    masks: dict[str, Any] = {}
    for name in names.split("+"):
        if name not in MASKS:
            raise ArgumentError(
                "masks", given=repr(name), expected="some of " + ", ".join(MASKS), advice='Join with "+".'
            )
        made = _mask(name, spec, rng, (batch, target, source))
        twice = sorted(set(made) & set(masks))
        if twice:
            raise ArgumentError(
                "masks", given=names, expected=f"one {twice[0]}", advice="Choose one of bool, float, per-head."
            )
        masks.update(made)
    return masks


def _mask(name: str, spec: MHASpec, rng: np.random.Generator, sizes: tuple[int, int, int]) -> dict[str, Any]:
    batch, target, source = sizes
    if name == "none":
        return {}
    if name == "causal":
        return {"is_causal": True}
    if name == "padding":
        lengths = rng.integers(max(1, source // 2), source + 1, batch)
        lengths[0] = max(1, source - 2)
        return {"key_padding_mask": np.arange(source) >= lengths[:, None]}
    if name == "float":
        return {"attn_mask": dtypes.round_to(rng.standard_normal((target, source)), spec.dtype)}
    blocked = rng.random((batch * spec.num_heads if name == "per-head" else 1, target, source)) < 0.4
    blocked[..., 0] = False
    return {"attn_mask": blocked if name == "per-head" else blocked[0]}
