"""The ways in which ``mb.attend`` hands masks to PyTorch's own layer, each against the composed formula."""

from __future__ import annotations

from typing import Any

import pytest

import mhabridge as mb

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.frameworks

N, L, S, E, H = 3, 5, 6, 16, 4


def blocked(*shape: int, dead: tuple[int, ...]) -> Any:
    """A bool mask that blocks a position here and there, and one row whole."""
    mask = torch.arange(shape[-1]) >= 4 + torch.zeros(shape)
    mask[dead] = True
    return mask


def added(mask: Any) -> Any:
    return torch.zeros(mask.shape).masked_fill(mask, float("-inf"))


PADDING, ROWS, HEADS = blocked(N, S, dead=(2,)), blocked(L, S, dead=(4,)), blocked(N * H, L, S, dead=(5, 2))
CALLS = {
    "no mask": {},
    "causal": {"is_causal": True},
    "padding": {"key_padding_mask": PADDING},
    "rows": {"attn_mask": ROWS},
    "one head's row": {"attn_mask": HEADS},
    "padding and rows": {"key_padding_mask": PADDING, "attn_mask": ROWS},
    "padding and causal": {"key_padding_mask": PADDING, "is_causal": True},
    "float padding": {"key_padding_mask": added(PADDING)},
    "one head's row, float": {"attn_mask": added(HEADS)},
    "float padding and rows": {"key_padding_mask": added(PADDING), "attn_mask": ROWS},
}


def answers(mode: str, call: dict[str, Any], lengths: tuple[int, int], gradients: bool, **layer: bool) -> list[Any]:
    """Output, weights, and the gradients of every input, parameter and float mask."""
    torch.manual_seed(0)
    attention = torch.nn.MultiheadAttention(E, H, batch_first=True, **layer).train(gradients)
    query, key = (torch.randn(N, length, E, requires_grad=gradients) for length in lengths)
    key = query if lengths[0] == lengths[1] else key
    call = {
        name: item.clone().requires_grad_(gradients) if getattr(item, "dtype", None) == torch.float32 else item
        for name, item in call.items()
    }
    with torch.set_grad_enabled(gradients):
        output, weights = mb.attend(attention, query, key, key, mode=mode, **call)
    found = [output] if weights is None else [output, weights]
    if gradients:
        leaves = [query, *([] if key is query else [key]), *attention.parameters()]
        leaves += [item for item in call.values() if getattr(item, "requires_grad", False)]
        seed = torch.arange(output.numel()).reshape(output.shape) / output.numel()
        found += torch.autograd.grad((output * seed).sum(), leaves)
    return found


@pytest.mark.parametrize("layer", [{}, {"add_bias_kv": True}])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("name", list(CALLS))
def test_native_is_composed(name: str, need_weights: bool, gradients: bool, layer: dict[str, bool]) -> None:
    call = {**CALLS[name], "need_weights": need_weights}
    native, composed = (answers(mode, call, (L, S), gradients, **layer) for mode in ("native", "composed"))
    assert len(native) == len(composed)
    for one, other in zip(native, composed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("name", ["no mask", "causal", "padding", "padding and causal", "float padding"])
def test_self_attention_without_gradients(name: str, need_weights: bool) -> None:
    """One tensor three times: where PyTorch takes its fast path."""
    call = {**CALLS[name], "need_weights": need_weights}
    native, composed = (answers(mode, call, (S, S), False) for mode in ("native", "composed"))
    for one, other in zip(native, composed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_dead_rows_are_nan_and_no_others(need_weights: bool, gradients: bool) -> None:
    output = answers("native", {**CALLS["one head's row"], "need_weights": need_weights}, (L, S), gradients)[0]
    assert output.isnan().any(-1).nonzero().tolist() == [[1, 2]]  # mask 5 is of batch 1, head 1
