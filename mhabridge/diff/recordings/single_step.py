"""Single-step mode: the second side's layer, with its own settings and weights, on the inputs of the first.

An error early in a model spoils everything after it; here each layer starts from what the first side had there. The
layer is built and run on a backend, that of the second side's framework unless another is named, and its answer is held
against the reference of the *first* side's layer: what differs then is this layer.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from mhabridge import dtypes, mapping, masks
from mhabridge.backends.registry import Backend, backend
from mhabridge.calls import Result
from mhabridge.diff.comparing import compare
from mhabridge.diff.recordings.arrays import coarsest
from mhabridge.diff.recordings.attention_calls import Compared
from mhabridge.diff.recordings.canonical import AttentionCall
from mhabridge.diff.recordings.judging import Material, chosen, distances, known_accuracy
from mhabridge.errors import MHABridgeError


@dataclasses.dataclass
class SingleStep:
    """The backend that the second side's layers run on.

    Args:
        name: of the backend.
        notes: why it is another one than asked for.
    """

    name: str
    notes: list[str] = dataclasses.field(default_factory=list)
    _backend: Backend | None = None

    def add_to(self, compared: Compared, first: AttentionCall, second: AttentionCall, framework: str) -> None:
        """Run the second side's layer on the first side's inputs and add what comes out.

        Args:
            compared: of this call.
            first: the call on the first side.
            second: the call on the second.
            framework: of the first side.
        """
        if first.random or first.output is None:
            return
        try:
            result, ran = self._run(first, second)
        except MHABridgeError as error:
            compared.notes.append(f"single step: {error}")
            return
        material = Material.of(first)
        pieces = chosen(material, material, (first.output, result.output))
        own = known_accuracy(framework, first.dtype)
        dtype = coarsest((first.dtype, second.layer.spec.dtype))
        output = dtypes.round_to(result.output, dtype) if ran == mapping.REFERENCE else result.output
        judged = [
            distances(material, {"output": first.output}, own, pieces),
            distances(material, {"output": output}, known_accuracy(ran, dtype), pieces),
        ]
        found = judged[0].get("output"), judged[1].get("output")
        dead = first.masks.fully_masked(first.layer.spec.extra_columns).any(axis=1)[..., None]
        allowed = np.broadcast_to(dead, first.output.shape)
        output = dtypes.round_to(result.output, dtype) if ran == mapping.REFERENCE else result.output
        compared.add(
            "single_step.output", compare(first.output, output, distances=found, allowed=allowed), "single_step"
        )

    def _run(self, first: AttentionCall, second: AttentionCall) -> tuple[Result, str]:
        spec = second.layer.spec.replace(batch_first=True)
        arrays = [dtypes.round_to(array, spec.dtype) for array in (first.query, first.key, first.value)]
        options: dict[str, Any] = {"need_weights": False, "fully_masked": first.fully_masked}
        mask = _as_argument(first, spec.dtype)
        if mask is not None:
            options["attn_mask"] = mask
        ran = self._found()
        return ran.run(spec, second.layer.weights, *arrays, **options), ran.info.framework

    def _found(self) -> Backend:
        if self._backend is None:
            try:
                self._backend = backend(self.name)
                self._backend.call("describe", {})
            except MHABridgeError as error:
                self.notes.append(f"single step: {self.name} cannot be used here ({error}); the reference stands in")
                self._backend = backend(mapping.REFERENCE)
        return self._backend


def _as_argument(call: AttentionCall, dtype: str) -> np.ndarray | None:
    """All of a call's masks as one attn_mask, (L, S) or (N * H, L, S)."""
    blocked, added, sizes = call.masks.blocked, call.masks.added, call.masks.sizes
    mask = blocked if added is None else masks.merge(blocked, added, dtype)
    if mask is None:
        return None
    flat = (sizes.target, sizes.source)
    if mask.shape[0] == mask.shape[1] == 1:
        return np.ascontiguousarray(np.broadcast_to(mask[0, 0], flat))
    full = np.broadcast_to(mask, (sizes.batch, sizes.heads, *flat))
    return np.ascontiguousarray(full.reshape(sizes.batch * sizes.heads, *flat))
