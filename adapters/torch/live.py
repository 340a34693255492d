"""One call of a layer that the user holds: native where that is right, else composed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from mhabridge import dropin, live, mapping
from mhabridge.checks import sizes_of
from mhabridge.errors import UnsupportedError
from mhabridge.live import Options
from mhabridge.masks import Sizes
from mhabridge.spec import MHASpec

from . import native_masks, nested
from .native import version
from .ops import OPS, TorchOps
from .parameters import named_tensors, spec_of
from .tensors import compiling

_VERSION = mapping.version_key(version())


class _Plan(NamedTuple):
    """What is known of a call without its numbers: why it is composed, if it is, its sizes, how masks are lowered."""

    spec: MHASpec
    reason: str
    sizes: Sizes
    masks: native_masks.Way | None


_PLANS: dict[tuple[Any, ...], _Plan] = {}
_MOST_PLANS = 4096


def attend(
    layer: torch.nn.MultiheadAttention,
    inputs: tuple[Any, Any, Any],
    key_padding_mask: Any,
    attn_mask: Any,
    options: Options,
    notes: list[str],
) -> tuple[Any, Any]:
    """One call of a live layer, native where that needs no look at the values, else composed."""
    if nested.among(*inputs, key_padding_mask, attn_mask):
        return nested.attend(layer, inputs, key_padding_mask, attn_mask, options, notes)
    plan = _plan(spec_of(layer), inputs, (key_padding_mask, attn_mask), options)
    if not plan.reason:
        notes.append("native: torch.nn.MultiheadAttention")
        return _attend_native(layer, plan, inputs, key_padding_mask, attn_mask, options)
    if options.mode == "native":
        raise UnsupportedError("mode", given="'native'", expected="'auto' or 'composed'", advice=plan.reason)
    notes.append(f"composed: {plan.reason}")
    ops = TorchOps(layer.out_proj.weight.device)
    return live.attend(ops, plan.spec, named_tensors(layer), inputs, key_padding_mask, attn_mask, options)


def _plan(spec: MHASpec, inputs: tuple[Any, Any, Any], masks: tuple[Any, Any], options: Options) -> _Plan:
    """The plan of a call, once all is known to be right but the numbers in its masks, and the masks of a composed one.

    It is remembered for calls of the same kind: small ones take no longer than all these checks. A plan keeps its spec,
    so no other spec has the same id.
    """
    options.check()
    if compiling():
        return _made_plan(spec, inputs, masks, options)
    query, key, value = inputs
    try:
        # A shape takes longer to make than to look up, so those of self-attention are told by how many there are.
        others = () if query is key and key is value else (key.shape, value.shape, key.dtype, value.dtype)
        asked = (options.mode, options.fully_masked, options.average_attn_weights, options.need_weights)
        flags = (options.is_causal, options.training)
        kind = (id(spec), query.shape, query.dtype, *others, *asked, *flags, *map(_kind_of, masks))
        found = _PLANS.get(kind)
    except (AttributeError, TypeError):  # no tensors: to be refused
        return _made_plan(spec, inputs, masks, options)
    if found is None:
        found = _made_plan(spec, inputs, masks, options)
        if not OPS.casts():  # which lets through what is wrong otherwise
            if len(_PLANS) >= _MOST_PLANS:
                _PLANS.clear()
            _PLANS[kind] = found
    return found


def _kind_of(mask: Any) -> Any:
    return None if mask is None else (mask.shape, mask.dtype)


def _made_plan(spec: MHASpec, inputs: tuple[Any, Any, Any], masks: tuple[Any, Any], options: Options) -> _Plan:
    batched = live.check(OPS, spec, inputs, options)
    sizes = sizes_of(spec, inputs[0], inputs[1], batched)
    masked = options.is_causal or any(mask is not None for mask in masks)
    reason = _why_composed(spec, options, masked) or _too_old(spec, inputs[0], options)
    if not reason and masked and not compiling() and sizes.batch == 0:
        reason = "PyTorch's own layer cannot shape a mask for an empty batch."
    if reason or not masked:
        return _Plan(spec, reason, sizes, None)
    itself = not compiling() and inputs[0] is inputs[1] and inputs[1] is inputs[2]
    return _Plan(spec, "", sizes, native_masks.way(spec, sizes, *masks, options, itself))


def _why_composed(spec: MHASpec, options: Options, masked: bool) -> str:
    if options.mode == "composed":
        return "asked for"
    if masked and options.fully_masked == "zero":
        return "The native layer has no answer of zeros for fully masked rows."
    return dropin.why_composed(spec)


def _too_old(spec: MHASpec, query: Any, options: Options) -> str:
    """What this version's layer does not have, though its drop-in does."""
    if _VERSION < (1, 9) and spec.batch_first:
        return "PyTorch before 1.9 has layers of (L, N, E) only."
    if _VERSION < (1, 11) and getattr(query, "ndim", 3) == 2:
        return "PyTorch before 1.11 takes batches only."
    if _VERSION < (1, 11) and not options.average_attn_weights:
        return "PyTorch before 1.11 returns only the average over heads."
    return ""


def _attend_native(
    layer: torch.nn.MultiheadAttention,
    plan: _Plan,
    inputs: tuple[Any, Any, Any],
    key_padding_mask: Any,
    attn_mask: Any,
    options: Options,
) -> tuple[Any, Any]:
    flags = {"need_weights": options.need_weights}
    if not options.average_attn_weights:  # 1.8.1 has no such argument
        flags["average_attn_weights"] = False
    spec, _, sizes, way = plan
    if way is None:
        answer: tuple[Any, Any] = torch.nn.MultiheadAttention.forward(layer, *inputs, **flags)
        return answer
    device = inputs[0].device
    asked, finish = native_masks.lower(way, spec, sizes, key_padding_mask, attn_mask, options, device)
    output, attention = torch.nn.MultiheadAttention.forward(layer, *inputs, **{**flags, **asked})
    if finish:
        output = native_masks.with_dead_rows(output, asked, way, spec, sizes)
    return output, attention if options.need_weights else None
