"""The masks of a call as PyTorch's own layer takes them, so that each of its paths gives the one answer.

Bool masks go to it as they are where that is right, because its fast path takes no others. With weights all paths
answer a fully masked row with NaN. Without, ``scaled_dot_product_attention`` makes it the out bias and its gradients
zero, so the NaN comes from here: inside a float mask where gradients are recorded (then they are NaN where the
formula's are); else from weights that are asked for all the same where they cost nothing, on the fast path on a CPU,
which has them anyway; else put into the output. Nothing here waits for the device; and as each operation takes some
microseconds, the usual masks, one of two axes, have a way with few of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from mhabridge import live, mapping
from mhabridge.live import Options
from mhabridge.masks import Sizes
from mhabridge.spec import MHASpec

from .native import version
from .ops import OPS, TorchOps

_VERSION = mapping.version_key(version())
_NAN = float("nan")


class Way(NamedTuple):
    """How the masks of one kind of call are lowered: what shapes, dtypes and options decide, worked out once.

    Args:
        merged: as numbers, in one argument; else as they are.
        causal: with a bool mask of its own for ``is_causal``; "hinted" where it is all there is, and without weights.
        dead: fully masked rows have to be made NaN here.
        by_head: all masks together have an axis of (N * H).
        spread: rows that are fully masked need an axis more to fit the output.
        fast: on a CPU the layer is expected to take its fast path; where it does not, the answer is the same.
    """

    merged: bool
    causal: str = ""
    dead: bool = False
    by_head: bool = False
    spread: bool = False
    fast: bool = False


def way(
    spec: MHASpec, sizes: Sizes, key_padding_mask: Any, attn_mask: Any, options: Options, itself: bool = False
) -> Way:
    """How masks like these are lowered.

    Args:
        spec: the layer.
        sizes: what the masks have to fit.
        key_padding_mask: (N, S) or (S,), or None.
        attn_mask: (L, S) or (N * H, L, S), or None.
        options: what is asked for.
        itself: query, key and value are one tensor.

    Raises:
        ArgumentError: a wrong shape.
        ArgumentTypeError: not a tensor of PyTorch.
    """
    live.mask_shapes(OPS, sizes, key_padding_mask, attn_mask)
    given = [mask for mask in (key_padding_mask, attn_mask) if mask is not None]
    # Before 2.0 the layer had one path, and other rules for masks.
    if _VERSION < (2, 0) or (options.fully_masked == "error" and given):
        return Way(merged=True)
    if any(mask.dtype != torch.bool for mask in given):
        return Way(merged=True)
    silent = options.need_weights or spec.extra_columns or not sizes.source
    # Alone it leaves the first column open; the hint spares scaled_dot_product_attention the mask.
    hinted = options.is_causal and not given and not silent
    causal = "hinted" if hinted else "mask" if options.is_causal else ""
    axes = 0 if attn_mask is None else attn_mask.dim()
    by_head = axes == 3 and attn_mask.shape[0] == sizes.batch * sizes.heads
    across = attn_mask is not None or options.is_causal  # one value a target row
    alone = (key_padding_mask is None) == across and axes < 3
    spread = sizes.batched and alone and across != spec.batch_first
    fast = itself and sizes.batched and not options.training and _has_fast_path(spec)
    return Way(False, causal, not (silent or hinted), by_head, spread, fast)


def _has_fast_path(spec: MHASpec) -> bool:
    packed = spec.key_features == spec.value_features == spec.embed_dim
    return bool(packed and spec.bias and spec.batch_first and spec.num_heads % 2 == 0 and not spec.extra_columns)


def lower(
    way: Way, spec: MHASpec, sizes: Sizes, key_padding_mask: Any, attn_mask: Any, options: Options, device: Any
) -> tuple[dict[str, Any], bool]:
    """The native call's arguments for these masks, and whether ``with_dead_rows`` has to finish its output.

    The arguments go over those that were asked for: weights that nobody asked for are to be dropped.

    Args:
        way: what ``way`` says of such masks.
        spec: the layer.
        sizes: what the masks fit.
        key_padding_mask: (N, S) or (S,), or None.
        attn_mask: (L, S) or (N * H, L, S), or None.
        options: what is asked for.
        device: the layer's.

    Raises:
        ArgumentError: a fully masked row with the policy "error".
        ArgumentTypeError: of a dtype that is no mask's.
    """
    if way.merged:
        return _merged(TorchOps(device), spec, sizes, key_padding_mask, attn_mask, options), False
    asked = {} if key_padding_mask is None else {"key_padding_mask": key_padding_mask}
    if way.causal:
        causal = torch.ones((sizes.target, sizes.source), dtype=torch.bool, device=device).triu_(1)
        asked["attn_mask"] = causal if attn_mask is None else attn_mask | causal
        if way.causal == "hinted":
            asked["is_causal"] = True
    elif attn_mask is not None:
        asked["attn_mask"] = attn_mask
    if not way.dead:
        return asked, False
    if torch.is_grad_enabled():
        return _added(asked, way, spec, sizes), False
    if way.fast and device.type == "cpu":
        return {**asked, "need_weights": True, "average_attn_weights": False}, False
    return asked, True


def with_dead_rows(output: torch.Tensor, asked: dict[str, Any], way: Way, spec: MHASpec, sizes: Sizes) -> torch.Tensor:
    """The output with NaN in the rows whose every position is blocked for some head.

    Not in place: compilers cannot write into a view that is turned, nor ``vmap`` one mask of many into one output.
    """
    blocked = _joined(asked, sizes)
    if way.by_head:
        rows = blocked.amin(-1, keepdim=True)  # a vectorised all
        rows = rows.view(sizes.batch, sizes.heads, sizes.target, 1).amax(1)
        rows = rows if sizes.batched else rows[0]
    else:
        rows = blocked.all(-1, keepdim=True)
    if rows.dim() == 3:
        rows = rows if spec.batch_first else rows.transpose(0, 1)
    elif way.spread:
        rows = rows.unsqueeze(1)
    return output.masked_fill(rows, _NAN)


def _added(asked: dict[str, Any], way: Way, spec: MHASpec, sizes: Sizes) -> dict[str, torch.Tensor]:
    """Bool masks as one float argument: -inf where they block, NaN in fully masked rows."""
    blocked = _joined(asked, sizes)
    mask = torch.zeros_like(blocked, dtype=getattr(torch, spec.dtype)).masked_fill_(blocked, -np.inf)
    if way.by_head:
        mask = _with_nan(mask)
    else:
        mask = mask.masked_fill_(blocked.all(-1, keepdim=True), np.nan)
        if mask.dim() == 3:
            mask = mask.unsqueeze(1).expand(-1, sizes.heads, -1, -1).reshape(-1, sizes.target, sizes.source)
    return {"attn_mask" if "attn_mask" in asked else "key_padding_mask": mask}


def _joined(asked: dict[str, Any], sizes: Sizes) -> torch.Tensor:
    """What any of the bool masks blocks: (N, S), (L, S), (N, L, S) or (N * H, L, S).

    Of an unbatched call (S,), (L, S) or (H, L, S).
    """
    if len(asked) == 1:
        (blocked,) = asked.values()
        return blocked
    padding, mask = asked["key_padding_mask"], asked["attn_mask"]
    if mask.dim() == 2:
        return padding.unsqueeze(-2) | mask
    by_head = mask.view(sizes.batch, sizes.heads, sizes.target, sizes.source)
    return (by_head | padding.view(sizes.batch, 1, 1, sizes.source)).reshape(mask.shape)


def _with_nan(mask: torch.Tensor) -> torch.Tensor:
    """NaN in fully masked rows; for large masks faster than ``masked_fill_``."""
    largest = mask.detach().amax(dim=-1, keepdim=True)
    return mask + (largest - largest)  # -inf - -inf is NaN, all else is 0


def _merged(
    ops: TorchOps, spec: MHASpec, sizes: Sizes, key_padding_mask: Any, attn_mask: Any, options: Options
) -> dict[str, torch.Tensor]:
    """Masks of any dtype as one float argument, through which gradients go back to float ones."""
    mask = live.merged(ops, spec, sizes, key_padding_mask, attn_mask, options)
    if mask is None:
        return {}
    live.refuse_fully_masked(ops, spec, sizes, mask, options)
    if not spec.extra_columns and sizes.source:
        mask = _with_nan(mask)
    return _as_argument(mask, sizes)


def _as_argument(mask: torch.Tensor, sizes: Sizes) -> dict[str, torch.Tensor]:
    """A mask of four axes as the argument that holds it with the fewest elements.

    Before 2.0 that is never the key_padding_mask: 1.8.1 reads the bytes of a float one as if they were bool.
    """
    if mask.shape[0] == mask.shape[1] == 1:
        return {"attn_mask": mask[0, 0].expand(sizes.target, -1)}
    if mask.shape[1] == mask.shape[2] == 1 and _VERSION >= (2, 0):
        return {"key_padding_mask": mask[:, 0, 0]}
    full = mask.expand(sizes.batch, sizes.heads, sizes.target, -1)
    return {"attn_mask": full.reshape(sizes.batch * sizes.heads, sizes.target, sizes.source)}
