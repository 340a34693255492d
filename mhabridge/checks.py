"""What is checked of any call before a framework is asked, so that the error is the same on all of them.

Nothing here looks at values: arrays and tensors of any framework are known by ``ndim`` and ``shape``.

This module also runs inside workers (Python 3.8).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mhabridge import masks
from mhabridge.errors import ArgumentError, ArgumentTypeError
from mhabridge.spec import MHASpec

MODES = ("auto", "native", "composed")


def check_mode(mode: Any) -> None:
    """Raise unless the mode is one of ``MODES``."""
    if mode not in MODES:
        raise ArgumentError("mode", given=repr(mode), expected="one of " + ", ".join(MODES))


def check_shapes(spec: MHASpec, query: Any, key: Any, value: Any) -> bool:
    """Whether the call is batched, once its three shapes are known to fit.

    Raises:
        ArgumentError: naming the one that does not fit.
    """
    shapes = {"query": tuple(query.shape), "key": tuple(key.shape), "value": tuple(value.shape)}
    axes = len(shapes["query"])
    if axes not in (2, 3):
        letters = "(L, E), or (N, L, E)" if spec.batch_first else "(L, E), or (L, N, E)"
        raise ArgumentError("query", given=f"shape {shapes['query']}", expected=f"two or three axes: {letters}")
    features = {"query": spec.embed_dim, "key": spec.key_features, "value": spec.value_features}
    for name, shape in shapes.items():
        if len(shape) != axes:
            raise ArgumentError(name, given=f"shape {shape}", expected=f"{axes} axes, as the query has")
        if shape[-1] != features[name]:
            raise ArgumentError(
                name, given=f"{shape[-1]} features (shape {shape})", expected=f"{features[name]} features"
            )
    if shapes["key"][:-1] != shapes["value"][:-1]:
        raise ArgumentError(
            "value",
            given=f"shape {shapes['value']} with a key of {shapes['key']}",
            expected="as many positions as the key",
        )
    axis = 0 if spec.batch_first else 1
    if axes == 3 and shapes["key"][axis] != shapes["query"][axis]:
        raise ArgumentError(
            "key",
            given=f"batch {shapes['key'][axis]} with a query of batch {shapes['query'][axis]}",
            expected="the same batch",
            advice=f"With batch_first={spec.batch_first} the batch is axis {axis}.",
        )
    return axes == 3


def check_flag(value: Any, name: str) -> None:
    """Raise unless the value is True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise ArgumentTypeError(name, given=repr(value), expected="True or False")


def sizes_of(spec: MHASpec, query: Any, key: Any, batched: bool) -> masks.Sizes:
    """N, H, L and S of a call in the user's axis order."""
    if not batched:
        return masks.Sizes(1, spec.num_heads, query.shape[0], key.shape[0], False)
    batch, length = (0, 1) if spec.batch_first else (1, 0)
    return masks.Sizes(query.shape[batch], spec.num_heads, query.shape[length], key.shape[length])
