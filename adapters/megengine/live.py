"""One call of a layer that the user holds: native where that is right, else composed."""

from __future__ import annotations

import dataclasses
from typing import Any

import megengine
import megengine.functional
import megengine.module
import numpy as np

from mhabridge import dtypes, envelope, live, masks
from mhabridge.calls import Call
from mhabridge.checks import sizes_of
from mhabridge.errors import UnsupportedError
from mhabridge.live import Options
from mhabridge.native import flat_mask
from mhabridge.spec import MHASpec

from .native import FRAMEWORK, FUNCTIONAL, fused, unfit, version
from .ops import PackedOps
from .parameters import named_tensors, spec_of, weights_of


def attend(
    layer: Any,
    inputs: tuple[Any, Any, Any],
    key_padding_mask: Any,
    attn_mask: Any,
    options: Options,
    notes: list[str],
) -> tuple[Any, Any]:
    """One call of a live module, composed unless ``mode="native"`` asks for the operator and the values allow it."""
    spec = spec_of(layer)
    ops = PackedOps(layer.io_weight_bias.device)
    if options.mode == "native":
        return _attend_native(ops, layer, spec, inputs, key_padding_mask, attn_mask, options, notes)
    asked = options.mode == "composed"
    notes.append("composed: " + ("asked for" if asked else "The operator's softmax is NaN for rows of low scores."))
    return live.attend(ops, spec, named_tensors(layer, spec), inputs, key_padding_mask, attn_mask, options)


def _attend_native(
    ops: PackedOps,
    layer: Any,
    spec: MHASpec,
    inputs: tuple[Any, Any, Any],
    key_padding_mask: Any,
    attn_mask: Any,
    options: Options,
    notes: list[str],
) -> tuple[Any, Any]:
    if not isinstance(layer, megengine.module.MultiHeadAttention):
        raise _not_native({"layer": "A drop-in is always composed."})
    batched = live.check(ops, spec, inputs, options)
    if not batched:  # a native module is always batch first
        inputs = tuple(megengine.functional.expand_dims(x, 0) for x in inputs)
    call = _canonical_call(ops, spec, batched, inputs, key_padding_mask, attn_mask, options)
    weights = weights_of(layer, spec)
    broken = envelope.violations(FRAMEWORK, version(), spec, call)
    reasons = {limit.feature: limit.reason for limit in broken} or unfit(spec, weights, call)
    if reasons:
        raise _not_native(reasons)
    notes.extend([f"native: {FUNCTIONAL}", "no gradient goes through the returned weights or through masks"])
    active = spec if options.training else spec.replace(dropout=0.0, out_dropout=0.0)
    flat = flat_mask(masks.merge(call.blocked, call.added, spec.dtype), spec, call)
    output, attention = fused(active, layer.io_weight_bias, True)(
        *inputs,
        attn_mask=None if flat is None else ops.constant(flat, spec.dtype),
        need_weights=options.need_weights,
        average_attn_weights=options.average_attn_weights,
    )
    if options.need_weights and not options.average_attn_weights:
        attention = ops.reshape(attention, (call.query.shape[0], spec.num_heads, *attention.shape[1:]))
    answer = (output, attention if options.need_weights else None)
    return answer if batched else tuple(x if x is None else x[0] for x in answer)  # type: ignore[return-value]


def _canonical_call(
    ops: PackedOps,
    spec: MHASpec,
    batched: bool,
    inputs: tuple[Any, Any, Any],
    key_padding_mask: Any,
    attn_mask: Any,
    options: Options,
) -> Call:
    """The call with its values in NumPy, to hold it against the envelope; the masks are merged."""
    sizes = dataclasses.replace(sizes_of(spec, inputs[0], inputs[1], True), batched=batched)
    mask = live.merged(ops, spec, sizes, key_padding_mask, attn_mask, options)
    values = blocked = None
    if mask is not None:
        live.refuse_fully_masked(ops, spec, sizes, mask, options)
        values = dtypes.to_float64(ops.numpy(mask))
        blocked = np.isneginf(values)
        values = np.where(blocked, 0.0, values)
    query, key, value = (ops.numpy(x) for x in inputs)
    return Call(
        query,
        key,
        value,
        blocked=blocked,
        added=values,
        need_weights=options.need_weights,
        average_attn_weights=options.average_attn_weights,
        fully_masked="zero" if options.fully_masked == "zero" else "nan",
        training=options.training,
    )


def _not_native(reasons: dict[str, str]) -> UnsupportedError:
    return UnsupportedError(
        ", ".join(reasons),
        given='mode="native"',
        expected="a call that the operator answers rightly",
        advice=" ".join(f"{name}: {reason}" for name, reason in reasons.items()) + ' Use mode="auto" or "composed".',
    )
