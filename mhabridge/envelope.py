"""Where a framework's native layer can be trusted: the limits in mappings/, and how a call is held against them.

A layer and a call are described by *features*, a fixed list of short names. A table's ``[[envelope]]`` entries name the
features that the native layer of some versions cannot express or is known to answer wrongly, each with its reason.
``lowering`` composes a call with such a feature from the framework's operations, or refuses it; it is never answered
with a wrong number.

This module also runs inside workers (Python 3.8).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Callable

import numpy as np

from mhabridge import mapping
from mhabridge.calls import Call
from mhabridge.masks import Masks, Sizes
from mhabridge.spec import MHASpec


@dataclasses.dataclass(frozen=True)
class Limit:
    """One entry of a table's envelope.

    Args:
        feature: a name in ``FEATURES``.
        reason: what the native layer does instead, as measured.
        since: first version that does, or None for all before ``until``.
        until: first version that does not any more, or None.
        composable: the framework's own operations can do it all the same.
    """

    feature: str
    reason: str
    since: str | None = None
    until: str | None = None
    composable: bool = True

    def applies(self, version: str) -> bool:
        """Whether a version is in the limit's range."""
        key = mapping.version_key(version)
        after = self.since is None or key >= mapping.version_key(self.since)
        return after and (self.until is None or key < mapping.version_key(self.until))


def fully_masked(spec: MHASpec, call: Call) -> np.ndarray:
    """Which rows of a call are fully masked: bool (N, H, L)."""
    n, target, _ = call.query.shape
    sizes = Sizes(n, spec.num_heads, target, call.key.shape[1])
    return Masks(sizes, call.blocked).fully_masked(spec.extra_columns)


FEATURES: dict[str, Callable[[MHASpec, Call], bool]] = {
    "float16": lambda spec, call: spec.dtype == "float16",
    "bfloat16": lambda spec, call: spec.dtype == "bfloat16",
    "float64": lambda spec, call: spec.dtype == "float64",
    "add_bias_kv": lambda spec, call: spec.add_bias_kv,
    "add_zero_attn": lambda spec, call: spec.add_zero_attn,
    "residual": lambda spec, call: spec.residual,
    "scale": lambda spec, call: spec.scale is not None,
    "projection_sizes": lambda spec, call: any(
        getattr(spec, f"{name}_proj_size") is not None for name in ("q", "k", "v", "out")
    ),
    "half_precision_projection_sizes": lambda spec, call: (
        spec.dtype == "float16" and FEATURES["projection_sizes"](spec, call)
    ),
    "no_parameters": lambda spec, call: not spec.parameter_shapes(),
    "out_dropout": lambda spec, call: spec.out_dropout > 0.0,
    "dropout_of_one": lambda spec, call: spec.dropout == 1.0,
    "per_head_weights": lambda spec, call: call.need_weights and not call.average_attn_weights,
    "attn_weights_gradient": lambda spec, call: call.grad_attn_weights is not None,
    "mask_gradient": lambda spec, call: call.mask_grad,
    "gradient_of_one_row": lambda spec, call: (
        call.wants_grads and len(call.query) == 1 and 1 in (*call.query.shape[1:], call.key.shape[1])
    ),
    "empty": lambda spec, call: 0 in (*call.query.shape[:2], call.key.shape[1]),
    "empty_target": lambda spec, call: call.query.shape[1] == 0,
    "empty_source": lambda spec, call: call.key.shape[1] == 0,
    "fully_masked_nan": lambda spec, call: call.fully_masked == "nan" and bool(fully_masked(spec, call).any()),
    "fully_masked_nan_without_projection": lambda spec, call: (
        spec.out_proj_size == 0 and FEATURES["fully_masked_nan"](spec, call)
    ),
    "fully_masked_zero": lambda spec, call: call.fully_masked == "zero" and bool(fully_masked(spec, call).any()),
    "fully_masked_gradient": lambda spec, call: call.wants_grads and bool(fully_masked(spec, call).any()),
}


def limits(framework: str, version: str) -> list[Limit]:
    """The limits of a framework's native layer in a version."""
    entries: list[dict[str, Any]] = mapping.table(framework).get("envelope", [])
    return [limit for limit in (Limit(**entry) for entry in entries) if limit.applies(version)]


def violations(framework: str, version: str, spec: MHASpec, call: Call) -> list[Limit]:
    """The limits that a call goes beyond."""
    return [limit for limit in limits(framework, version) if FEATURES[limit.feature](spec, call)]
