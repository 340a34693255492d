"""One call of a layer that the user holds: native where that is right, else composed."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from mhabridge import dropin, live, mapping
from mhabridge.checks import sizes_of
from mhabridge.errors import UnsupportedError
from mhabridge.live import Options
from mhabridge.masks import Sizes
from mhabridge.spec import MHASpec

from . import nested
from .native import version
from .ops import TorchOps
from .parameters import named_tensors, spec_of

_VERSION = mapping.version_key(version())


def attend(
    layer: torch.nn.MultiheadAttention,
    inputs: tuple[Any, Any, Any],
    key_padding_mask: Any,
    attn_mask: Any,
    options: Options,
    notes: list[str],
) -> tuple[Any, Any]:
    """One call of a live layer, native where that needs no look at the values, else composed."""
    if any(nested.is_nested(tensor) for tensor in (*inputs, key_padding_mask, attn_mask)):
        return nested.attend(layer, inputs, key_padding_mask, attn_mask, options, notes)
    spec = spec_of(layer)
    ops = TorchOps(layer.out_proj.weight.device)
    masked = key_padding_mask is not None or attn_mask is not None or options.is_causal
    reason = _why_composed(spec, options, masked) or _too_old(spec, inputs[0], options)
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
    ops: TorchOps,
    layer: torch.nn.MultiheadAttention,
    spec: MHASpec,
    inputs: tuple[Any, Any, Any],
    key_padding_mask: Any,
    attn_mask: Any,
    options: Options,
) -> tuple[Any, Any]:
    sizes = sizes_of(spec, inputs[0], inputs[1], live.check(ops, spec, inputs, options))
    plain = _plain_masks(key_padding_mask, attn_mask, options)
    blocked = live.placed(ops, sizes, key_padding_mask, attn_mask) if plain else {}
    asked = plain or _merged_masks(ops, spec, sizes, key_padding_mask, attn_mask, options)
    if not options.average_attn_weights:  # 1.8.1 has no such argument
        asked["average_attn_weights"] = False
    output, attention = torch.nn.MultiheadAttention.forward(layer, *inputs, need_weights=options.need_weights, **asked)
    if options.need_weights:
        return output, attention
    return _without_dead_rows(output, list(blocked.values()), spec, sizes), None


def _plain_masks(key_padding_mask: Any, attn_mask: Any, options: Options) -> dict[str, Any]:
    """The masks, if PyTorch may have them as they are: bool ones, which also its fast path takes.

    Without weights it answers fully masked rows in several ways, so they are written over; no gradient may go that way.
    """
    given = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask}
    found = {name: mask for name, mask in given.items() if mask is not None}
    if _VERSION < (2, 0) or options.is_causal or options.fully_masked == "error":
        return {}
    if not all(isinstance(mask, torch.Tensor) and mask.dtype == torch.bool for mask in found.values()):
        return {}
    return found if options.need_weights or not torch.is_grad_enabled() else {}


def _without_dead_rows(output: torch.Tensor, blocked: list[torch.Tensor], spec: MHASpec, sizes: Sizes) -> torch.Tensor:
    """NaN in the rows whose every position is blocked, for some head."""
    if not blocked or spec.extra_columns or not sizes.source:
        return output
    rows = functools.reduce(torch.logical_or, blocked).all(dim=-1)  # (N, H, L), each of them may be 1
    dead = rows[:, 0] if rows.shape[1] == 1 else rows.any(dim=1)
    if not sizes.batched:
        dead = dead[0]
    elif not spec.batch_first:
        dead = dead.transpose(0, 1)
    return output.masked_fill(dead.unsqueeze(-1), np.nan)


def _merged_masks(
    ops: TorchOps, spec: MHASpec, sizes: Sizes, key_padding_mask: Any, attn_mask: Any, options: Options
) -> dict[str, Any]:
    """All masks as one float argument of PyTorch's layer."""
    mask = live.merged(ops, spec, sizes, key_padding_mask, attn_mask, options)
    if mask is None:
        return {}
    live.refuse_fully_masked(ops, spec, sizes, mask, options)
    if key_padding_mask is not None or attn_mask is not None:
        return _native_mask(_with_dead_rows(mask, spec), sizes)
    # Every row has an open position. The hint spares the mask; with added columns it would block those too.
    hint = {"is_causal": True} if _VERSION >= (2, 0) and not spec.extra_columns else {}
    return {**_native_mask(mask, sizes), **hint}


def _with_dead_rows(mask: torch.Tensor, spec: MHASpec) -> torch.Tensor:
    """NaN instead of -inf in fully masked rows: without weights PyTorch answers -inf with the out bias."""
    if spec.extra_columns or not mask.shape[-1]:
        return mask
    largest = mask.detach().amax(dim=-1, keepdim=True)
    return mask + (largest - largest)  # -inf - -inf is NaN, all else is 0


def _native_mask(mask: torch.Tensor, sizes: Sizes) -> dict[str, torch.Tensor]:
    """A merged mask as the argument that holds it with the fewest elements.

    Before 2.0 that is never the key_padding_mask: 1.8.1 reads the bytes of a float one as if they were bool.
    """
    if len(mask) == mask.shape[1] == 1:
        return {"attn_mask": mask[0, 0].expand(sizes.target, -1)}
    if mask.shape[1] == mask.shape[2] == 1 and _VERSION >= (2, 0):
        return {"key_padding_mask": mask[:, 0, 0]}
    full = mask.expand(sizes.batch, sizes.heads, sizes.target, -1)
    return {"attn_mask": full.reshape(sizes.batch * sizes.heads, sizes.target, sizes.source)}
