"""A canonical call, and its result: what crosses the border between the core and an adapter.

A ``Call`` is already valid and always batched and batch first: query (N, L, E), key (N, S, kdim), value (N, S, vdim).
What the user
gave is turned into it by ``prepare`` in ``backends/running.py``, and the answer is turned back there. So an adapter,
here or in a worker,
never sees an unbatched array, a byte mask or a wrong shape.

This module also runs inside workers (Python 3.8).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Call:
    """One canonical call.

    Args:
        query: (N, L, E), in the spec's dtype.
        key: (N, S, kdim).
        value: (N, S, vdim).
        blocked: bool, True where attention is forbidden (masks and is_causal together); four axes, each of them 1 or
            the
            full size of (N, H, L, S); None when nothing is blocked.
        added: float64 and finite, added to the scores; the same kind of shape; None when nothing is added.
        need_weights: also return the attention weights.
        average_attn_weights: averaged over heads.
        fully_masked: "nan" or "zero" ("error" was dealt with before).
        mode: "auto", "native" or "composed".
        training: dropout is active.
        grad_output: (N, L, out_features) or None: the gradient of the loss with respect to the output.
        grad_attn_weights: the same for the returned weights, in their shape, or None.
        mask_grad: also return the gradient with respect to the added mask.
    """

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    blocked: np.ndarray | None = None
    added: np.ndarray | None = None
    need_weights: bool = True
    average_attn_weights: bool = True
    fully_masked: str = "nan"
    mode: str = "auto"
    training: bool = False
    grad_output: np.ndarray | None = None
    grad_attn_weights: np.ndarray | None = None
    mask_grad: bool = False

    @property
    def wants_grads(self) -> bool:
        """Whether any gradient is asked for."""
        return self.grad_output is not None or self.grad_attn_weights is not None

    def to_tree(self) -> dict[str, Any]:
        """The fields by name: plain values and arrays."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> Call:
        """The inverse of ``to_tree``."""
        return cls(**tree)


@dataclasses.dataclass(frozen=True)
class Result:
    """What a call gives.

    Args:
        output: the attention's output; from an adapter always (N, L, out_features), to a user in the layout of the
            query.
        attn_weights: (N, H, L, S) or averaged (N, L, S); without the N for an unbatched call; None when not asked for.
            S counts the
            columns that add_bias_kv and add_zero_attn append.
        grads: by name: "query", "key", "value", each parameter's canonical name, and for float masks "attn_mask" and
            "key_padding_mask" (from an adapter: "mask", (N, H, L, S)). Empty when not asked for.
        notes: what was native, lowered or composed, and why.
    """

    output: np.ndarray
    attn_weights: np.ndarray | None = None
    grads: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_tree(self) -> dict[str, Any]:
        """The fields by name: plain values and arrays."""
        return {
            "output": self.output,
            "attn_weights": self.attn_weights,
            "grads": dict(self.grads),
            "notes": list(self.notes),
        }

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> Result:
        """The inverse of ``to_tree``."""
        return cls(tree["output"], tree["attn_weights"], dict(tree["grads"]), tuple(tree["notes"]))
