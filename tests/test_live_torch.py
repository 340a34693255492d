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
START, REST = torch.zeros(N, S, dtype=torch.bool), torch.zeros(L, S, dtype=torch.bool)
START[1, :2] = REST[3, 2:] = True  # neither blocks a whole row, both together do
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
    "padding and heads": {"key_padding_mask": PADDING, "attn_mask": HEADS},
    "rows and causal": {"attn_mask": ROWS, "is_causal": True},
    "heads and causal": {"attn_mask": HEADS, "is_causal": True},
    "start and rest": {"key_padding_mask": START, "attn_mask": REST},
    "start and causal": {"key_padding_mask": START, "is_causal": True},
    "start and causal rest": {"key_padding_mask": START, "attn_mask": REST, "is_causal": True},
}
DEAD = {
    "padding": [[2, row] for row in range(L)],
    "rows": [[sequence, 4] for sequence in range(N)],
    "one head's row": [[1, 2]],  # mask 5 is of batch 1, head 1
    "start and rest": [[1, 3]],
    "start and causal": [[1, 0], [1, 1]],
    "start and causal rest": [[1, 0], [1, 1], [1, 3]],
}


def answers(mode: str, call: dict[str, Any], lengths: tuple[int, int], gradients: bool, **layer: bool) -> list[Any]:
    """Output, weights, and the gradients of every input, parameter and float mask."""
    torch.manual_seed(0)
    layer = {"batch_first": True, **layer}
    attention = torch.nn.MultiheadAttention(E, H, **layer).train(gradients)
    inputs = (torch.randn(N, length, E) for length in lengths)
    inputs = (x if layer["batch_first"] else x.transpose(0, 1) for x in inputs)
    query, key = (x.requires_grad_(gradients) for x in inputs)
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


@pytest.mark.parametrize("layer", [{}, {"add_bias_kv": True}, {"batch_first": False}])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("name", list(CALLS))
def test_native_is_composed(name: str, need_weights: bool, gradients: bool, layer: dict[str, bool]) -> None:
    call = {**CALLS[name], "need_weights": need_weights}
    native, composed = (answers(mode, call, (L, S), gradients, **layer) for mode in ("native", "composed"))
    assert len(native) == len(composed)
    for one, other in zip(native, composed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)


def square(call: dict[str, Any]) -> dict[str, Any]:
    """The masks of a call for as many targets as sources: without the last columns, and with the same dead rows."""
    return {
        name: item[:, :L] if name == "key_padding_mask" else item[..., :L] if name == "attn_mask" else item
        for name, item in call.items()
    }


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("layer", [{}, {"add_bias_kv": True}, {"bias": False}, {"batch_first": False}])
@pytest.mark.parametrize("name", list(CALLS))
def test_self_attention_without_gradients(name: str, layer: dict[str, bool], need_weights: bool) -> None:
    """One tensor three times: where PyTorch takes its fast path."""
    call = {**square(CALLS[name]), "need_weights": need_weights}
    native, composed = (answers(mode, call, (L, L), False, **layer) for mode in ("native", "composed"))
    assert len(native) == len(composed) == 1 + need_weights
    for one, other in zip(native, composed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)


FAST = {
    "self-attention": ({}, True),
    "another key": ({}, False),
    "training": ({}, False),
    "batch second": ({"batch_first": False}, False),
    "no bias": ({"bias": False}, False),
    "an odd number of heads": ({"num_heads": 1}, False),
    "added columns": ({"add_zero_attn": True}, False),
}


@pytest.mark.parametrize("case", list(FAST))
def test_weights_are_asked_for_beyond_the_call_only_where_they_cost_nothing(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the fast path, which has them anyway: PyTorch takes it where it is expected, and nowhere else."""
    arguments, expected = FAST[case]
    layer = torch.nn.MultiheadAttention(**{"embed_dim": E, "num_heads": H, "batch_first": True, **arguments})
    layer.train(case == "training")
    x = torch.randn((L, N, E) if case == "batch second" else (N, L, E))
    forward, fast_path = torch.nn.MultiheadAttention.forward, torch._native_multi_head_attention
    asked, fast = [], []

    def watched(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["need_weights"])
        return forward(*args, **kwargs)

    monkeypatch.setattr(torch.nn.MultiheadAttention, "forward", watched)
    monkeypatch.setattr(torch, "_native_multi_head_attention", lambda *args: fast.append(True) or fast_path(*args))
    with torch.no_grad():
        key = x.clone() if case == "another key" else x
        _, weights = mb.attend(layer, x, key, x, need_weights=False, **square(CALLS["padding"]))
    assert weights is None
    assert asked == [expected]
    assert bool(fast) == expected


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", list(DEAD))
def test_dead_rows_are_nan_and_no_others(name: str, need_weights: bool, gradients: bool) -> None:
    call = {**CALLS[name], "need_weights": need_weights}
    output = answers("native", call, (L, S), gradients)[0]
    assert output.isnan().any(-1).nonzero().tolist() == DEAD[name]
    turned = answers("native", call, (L, S), gradients, batch_first=False)[0].transpose(0, 1)
    torch.testing.assert_close(turned, output, equal_nan=True)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", [*DEAD, "padding and heads", "float padding and rows"])
def test_unbatched_is_a_batch_of_one(name: str, batch_first: bool, gradients: bool) -> None:
    attention = torch.nn.MultiheadAttention(E, H, batch_first=batch_first)
    query, key = torch.randn(L, E), torch.randn(S, E)
    axis = 0 if batch_first else 1
    for sequence in range(N):
        call = {"need_weights": False, **CALLS[name]}
        if "key_padding_mask" in call:
            call["key_padding_mask"] = call["key_padding_mask"][sequence]
        if call.get("attn_mask", ROWS).ndim == 3:
            call["attn_mask"] = call["attn_mask"][sequence * H : (sequence + 1) * H]
        whole = {k: v[None] if k == "key_padding_mask" else v for k, v in call.items()}
        with torch.set_grad_enabled(gradients):
            output, _ = mb.attend(attention, query, key, key, mode="native", **call)
            inputs = (x.unsqueeze(axis) for x in (query, key, key))
            batch, _ = mb.attend(attention, *inputs, mode="composed", **whole)
        torch.testing.assert_close(output, batch.squeeze(axis), rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_an_empty_batch_with_masks(need_weights: bool, gradients: bool) -> None:
    attention, x = torch.nn.MultiheadAttention(E, H, batch_first=True), torch.randn(0, S, E)
    call = {"key_padding_mask": PADDING[:0], "attn_mask": HEADS[:0, :1].expand(0, S, S), "need_weights": need_weights}
    with torch.set_grad_enabled(gradients):
        output, weights = mb.attend(attention, x, x, x, **call)
    assert output.shape == (0, S, E)
    assert (None if weights is None else weights.shape) == ((0, S, S) if need_weights else None)


def test_what_is_known_of_a_call_is_not_taken_for_another() -> None:
    """The same sizes asked for with a setting, a dtype or a layer that is wrong: still refused, or composed."""
    layer, x = torch.nn.MultiheadAttention(E, H), torch.randn(L, N, E)
    mb.attend(layer, x, x, x)
    for wrong in (x.half(), x.numpy(), x.tolist()):
        with pytest.raises(mb.MHABridgeError, match=r"query|key"):
            mb.attend(layer, wrong, x, x)
    with pytest.raises(mb.MHABridgeError, match="need_weights"):
        mb.attend(layer, x, x, x, need_weights=1)
    with torch.autocast("cpu"):
        mb.attend(layer, x.bfloat16(), x, x)
    with pytest.raises(mb.MHABridgeError, match="query"):
        mb.attend(layer, x.bfloat16(), x, x)
    for options in ({"mode": "composed"}, {"fully_masked": "zero", "is_causal": True}):
        notes: list[str] = []
        mb.attend(layer, x, x, x, notes=notes, **options)
        assert notes[0].startswith("composed")
    layer.batch_first = True
    assert mb.attend(layer, x, x, x)[1].shape == (L, N, N)


def test_what_is_known_of_a_call_is_kept_once() -> None:
    from mhabridge.adapters.torch import live

    x = torch.randn(L, N, E)
    for layer in (mb.build(mb.MHASpec(E, H, scale=0.3), "torch"), torch.nn.MultiheadAttention(E, H)):
        mb.attend(layer, x, x, x)
        known = len(live._PLANS)
        mb.attend(layer, x, x, x)
        assert len(live._PLANS) == known


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["padding", "rows", "padding and rows", "padding and causal", "one head's row"])
def test_masks_under_autocast(name: str, dtype: Any, known: bool) -> None:
    """Also where the call is known from before, when PyTorch took its fast path."""
    layer, x = torch.nn.MultiheadAttention(E, H, batch_first=True).eval(), torch.randn(N, L, E)
    call = {**square(CALLS[name]), "need_weights": False}
    with torch.no_grad():
        exact, _ = mb.attend(layer, x, x, x, mode="composed", **call)
        if known:
            mb.attend(layer, x, x, x, **call)
        with torch.autocast("cpu", dtype=dtype):
            for one in (x, x.to(dtype)):
                output, weights = mb.attend(layer, one, one, one, **call)
                assert weights is None
                torch.testing.assert_close(output.float(), exact, rtol=0.05, atol=0.05, equal_nan=True)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("name", list(CALLS))
def test_in_inference_mode(name: str, need_weights: bool) -> None:
    layer, x = torch.nn.MultiheadAttention(E, H, batch_first=True).eval(), torch.randn(N, L, E)
    call = {**square(CALLS[name]), "need_weights": need_weights}
    with torch.no_grad():
        expected = mb.attend(layer, x, x, x, **call)
    with torch.inference_mode():
        found = mb.attend(layer, x, x, x, **call)
    torch.testing.assert_close(found, expected, equal_nan=True)
