"""NestedTensors, whose sequences have lengths of their own: for PyTorch's own layer, or refused by name.

Measured with PyTorch 2.13 on a CPU: only the fast path takes them, that is one NestedTensor of the strided layout as
query, key and value, without masks, in evaluation and without gradients, for a layer that is batch first, has an even
num_heads, one packed projection with a bias, and no added columns. What it answers then is each sequence's own answer.
The layer ignores is_causal there, so is_causal is refused too.
"""

from __future__ import annotations

from typing import Any

import torch

from mhabridge.errors import UnsupportedError
from mhabridge.live import Options

_PAD = (
    "PyTorch takes one NestedTensor as query, key and value, without masks, by a layer with batch_first=True in "
    "evaluation and under torch.no_grad(). Otherwise pad it with torch.nested.to_padded_tensor(x, 0.0), and pass a "
    "key_padding_mask that is True behind each sequence's end."
)


def is_nested(tensor: Any) -> bool:
    """Whether this is a NestedTensor; PyTorch before 1.13 has none."""
    return bool(getattr(tensor, "is_nested", False))


def among(*tensors: Any) -> bool:
    """Whether any of a call's tensors is nested; a loop, because every call comes by."""
    for tensor in tensors:  # noqa: SIM110
        if getattr(tensor, "is_nested", False):
            return True
    return False


def attend(
    layer: torch.nn.MultiheadAttention,
    inputs: tuple[Any, Any, Any],
    key_padding_mask: Any,
    attn_mask: Any,
    options: Options,
    notes: list[str],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One call of which at least one tensor is nested.

    Returns:
        The output, nested as the query is, and the weights of all sequences in one tensor, (N, L, S) or (N, H, L, S)
        with the longest lengths and 0.0 beyond a sequence's own; None when not asked for.

    Raises:
        UnsupportedError: PyTorch's own layer cannot answer this call, or not by mhabridge's rules.
    """
    options.check()
    reason = _why_refused(layer, inputs, (key_padding_mask, attn_mask), options)
    if not reason:
        flags = {"need_weights": options.need_weights, "average_attn_weights": options.average_attn_weights}
        try:
            output, attention = torch.nn.MultiheadAttention.forward(layer, *inputs, **flags)
        except (AssertionError, RuntimeError) as error:
            reason = " ".join(str(error).split())
        else:
            notes.append("native: torch.nn.MultiheadAttention")
            notes.append("NestedTensor: the fast path answers; weights are padded with zeros to the longest sequence")
            return output, attention
    named = {
        **dict(zip(("query", "key", "value"), inputs)),
        "key_padding_mask": key_padding_mask,
        "attn_mask": attn_mask,
    }
    raise UnsupportedError(
        ", ".join(name for name, tensor in named.items() if is_nested(tensor)),
        given="a NestedTensor",
        expected=f"a call of one that PyTorch's own layer takes: {reason}",
        advice=_PAD,
    )


def _why_refused(
    layer: torch.nn.MultiheadAttention, inputs: tuple[Any, Any, Any], masks: tuple[Any, Any], options: Options
) -> str:
    if options.mode == "composed":
        return "the composed form does not"
    if getattr(layer, "beyond", {}):
        return "it computes none of " + ", ".join(layer.beyond)
    if options.is_causal:
        return "there it ignores is_causal"
    if any(mask is not None for mask in masks):
        return "there it takes no masks"
    if any(getattr(tensor, "layout", None) is not torch.strided for tensor in inputs):
        return "it has no other layout than torch.strided"
    if layer.in_proj_bias is None:
        return "there it needs a bias"  # PyTorch's own error ends in "because"
    return ""
