"""The masks of a call as PyTorch's own layer takes them, so that each of its paths gives the one answer.

Bool masks go to it as they are where that is right, because its fast path takes no others. With weights all paths
answer a fully masked row with NaN. Without, ``scaled_dot_product_attention`` makes it the out bias and its gradients
zero, so the NaN comes from here: inside a float mask where gradients are recorded (then they are NaN where the
formula's are), else written into the output, which keeps the fast path. Nothing here waits for the device; and as each
operation takes some microseconds, the usual masks, one of two axes, have a way with few of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mhabridge import live, mapping
from mhabridge.live import Options
from mhabridge.masks import Sizes
from mhabridge.spec import MHASpec

from .native import version
from .ops import OPS, TorchOps

_VERSION = mapping.version_key(version())


def lower(
    spec: MHASpec, sizes: Sizes, key_padding_mask: Any, attn_mask: Any, options: Options, device: Any
) -> tuple[dict[str, Any], bool]:
    """The native call's arguments for these masks, and whether ``with_dead_rows`` has to finish its output.

    Args:
        spec: the layer.
        sizes: what the masks have to fit.
        key_padding_mask: (N, S) or (S,), or None.
        attn_mask: (L, S) or (N * H, L, S), or None.
        options: what is asked for.
        device: the layer's.

    Raises:
        ArgumentError: a wrong shape; a fully masked row with the policy "error".
        ArgumentTypeError: not a tensor of PyTorch, or of a dtype that is no mask's.
    """
    given = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask}
    asked = {name: mask for name, mask in given.items() if mask is not None}
    if not _bool_will_do(asked, options):
        return _merged(TorchOps(device), spec, sizes, key_padding_mask, attn_mask, options), False
    live.mask_shapes(OPS, sizes, key_padding_mask, attn_mask)
    alone = options.is_causal and not asked
    if options.is_causal:
        causal = torch.ones((sizes.target, sizes.source), dtype=torch.bool, device=device).triu_(1)
        asked["attn_mask"] = causal if attn_mask is None else attn_mask | causal
    if options.need_weights or spec.extra_columns or not sizes.source:
        return asked, False
    if alone:  # its first column is open; the hint spares scaled_dot_product_attention the mask
        return {**asked, "is_causal": True}, False
    if not torch.is_grad_enabled():
        return asked, True
    return _added(asked, spec, sizes), False


def _bool_will_do(asked: dict[str, Any], options: Options) -> bool:
    """Whether no mask needs to be made a number here. Before 2.0 the layer had one path, and other rules for masks."""
    if _VERSION < (2, 0) or (options.fully_masked == "error" and asked):
        return False
    return all(isinstance(mask, torch.Tensor) and mask.dtype == torch.bool for mask in asked.values())


def with_dead_rows(output: torch.Tensor, asked: dict[str, Any], spec: MHASpec, sizes: Sizes) -> torch.Tensor:
    """The output, in place, with NaN in the rows whose every position is blocked for some head."""
    blocked = _joined(asked, sizes)
    if _by_head(blocked, sizes):
        rows = blocked.amin(-1, keepdim=True)  # a vectorised all
        rows = rows.view(sizes.batch, sizes.heads, sizes.target, 1).amax(1)
        rows = rows if sizes.batched else rows[0]
    else:
        rows = blocked.all(-1, keepdim=True)
    if rows.dim() == 3:
        rows = rows if spec.batch_first else rows.transpose(0, 1)
    elif sizes.batched and ("attn_mask" not in asked) == spec.batch_first:  # one value a sequence, or one a target row
        rows = rows.unsqueeze(1)
    return output.masked_fill_(rows, np.nan)


def _added(asked: dict[str, Any], spec: MHASpec, sizes: Sizes) -> dict[str, torch.Tensor]:
    """Bool masks as one float argument: -inf where they block, NaN in fully masked rows."""
    blocked = _joined(asked, sizes)
    mask = torch.zeros_like(blocked, dtype=getattr(torch, spec.dtype)).masked_fill_(blocked, -np.inf)
    if _by_head(blocked, sizes):
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


def _by_head(blocked: torch.Tensor, sizes: Sizes) -> bool:
    return blocked.dim() == 3 and len(blocked) == sizes.batch * sizes.heads


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
    if len(mask) == mask.shape[1] == 1:
        return {"attn_mask": mask[0, 0].expand(sizes.target, -1)}
    if mask.shape[1] == mask.shape[2] == 1 and _VERSION >= (2, 0):
        return {"key_padding_mask": mask[:, 0, 0]}
    full = mask.expand(sizes.batch, sizes.heads, sizes.target, -1)
    return {"attn_mask": full.reshape(sizes.batch * sizes.heads, sizes.target, sizes.source)}
