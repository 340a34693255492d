"""One call of a layer that the user holds: native where that is right, else composed."""

from __future__ import annotations

from typing import Any

import torch

from mhabridge import live, mapping
from mhabridge.checks import sizes_of
from mhabridge.errors import UnsupportedError
from mhabridge.live import Options
from mhabridge.spec import MHASpec

from .native import version
from .ops import TorchOps
from .parameters import named_tensors, spec_of


def attend(
    layer: torch.nn.MultiheadAttention,
    inputs: tuple[Any, Any, Any],
    key_padding_mask: Any,
    attn_mask: Any,
    options: Options,
    notes: list[str],
) -> tuple[Any, Any]:
    """One call of a live layer, native where that needs no look at the values, else composed."""
    spec = spec_of(layer)
    ops = TorchOps(layer.out_proj.weight.device)
    masked = key_padding_mask is not None or attn_mask is not None or options.is_causal
    reason = _why_composed(spec, options, masked)
    if not reason:
        notes.append("native: torch.nn.MultiheadAttention")
        return _attend_native(ops, layer, spec, inputs, key_padding_mask, attn_mask, options)
    if options.mode == "native":
        raise UnsupportedError("mode", given="'native'", expected="'auto' or 'composed'", advice=reason)
    notes.append(f"composed: {reason}")
    return live.attend(ops, spec, named_tensors(layer), inputs, key_padding_mask, attn_mask, options)


def _why_composed(spec: MHASpec, options: Options, masked: bool) -> str:
    if options.mode == "composed":
        return "asked for"
    if masked and options.fully_masked == "zero":
        return "The native layer has no answer of zeros for fully masked rows."
    if not options.average_attn_weights and mapping.version_key(version()) < (1, 11):
        return "PyTorch before 1.11 returns only the average over heads."
    return ""


def _attend_native(
    ops: TorchOps,
    layer: torch.nn.MultiheadAttention,
    spec: MHASpec,
    inputs: tuple[Any, Any, Any],
    key_padding_mask: Any,
    attn_mask: Any,
    options: Options,
) -> tuple[Any, Any]:
    batched = live.check(ops, spec, inputs, options)
    sizes = sizes_of(spec, inputs[0], inputs[1], batched)
    mask = live.merged(ops, spec, sizes, key_padding_mask, attn_mask, options)
    if mask is not None:
        live.refuse_fully_masked(ops, spec, sizes, mask, options)
        flat = mask[0, 0] if tuple(mask.shape[:2]) == (1, 1) else mask.expand(sizes.batch, sizes.heads, -1, -1)
        mask = flat if flat.dim() == 2 else flat.reshape(sizes.batch * sizes.heads, *flat.shape[2:])
    # Only with weights is a fully masked row NaN; without them it would be the out bias.
    asked = {"attn_mask": mask, "need_weights": options.need_weights or mask is not None}
    if not options.average_attn_weights:
        asked["average_attn_weights"] = False
    output, attention = torch.nn.MultiheadAttention.forward(layer, *inputs, **asked)
    return output, attention if options.need_weights else None
