"""A NestedTensor goes to PyTorch's own layer, which then gives each sequence's own answer, or is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import mhabridge as mb
from mhabridge.errors import ArgumentTypeError, UnsupportedError

pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
]
torch = pytest.importorskip("torch", reason="PyTorch is not importable here")

from mhabridge.adapters.torch import MultiheadAttention  # noqa: E402  (needs PyTorch)

LENGTHS = (3, 5, 1, 5)
CLOSE = {torch.bfloat16: {"rtol": 0.05, "atol": 0.02}}  # without weights the single call takes another kernel


def nested(features: int = 16, dtype: Any = None, lengths: tuple[int, ...] = LENGTHS, layout: Any = None) -> Any:
    generator = torch.Generator().manual_seed(5)
    parts = [torch.randn(length, features, generator=generator, dtype=dtype) for length in lengths]
    return torch.nested.nested_tensor(parts, layout=torch.strided if layout is None else layout)


def native(heads: int = 4, **more: Any) -> Callable[..., Any]:
    layer = torch.nn.MultiheadAttention(16, heads, **{"batch_first": True, **more}).eval()
    return lambda *args, **kwargs: mb.attend(layer, *args, **kwargs)


def dropin(heads: int = 4, **more: Any) -> Callable[..., Any]:
    return MultiheadAttention(16, heads, **{"batch_first": True, **more}).eval()  # type: ignore[no-any-return]


def hold(layer: Any, x: Any, output: Any, weights: Any, **flags: bool) -> None:
    """Each sequence's part is that sequence's own answer, and the weights beyond it are 0."""
    assert output.is_nested
    parts = x.unbind()
    assert [tuple(part.shape) for part in output.unbind()] == [tuple(part.shape) for part in parts]
    for i, (part, found) in enumerate(zip(parts, output.unbind(), strict=True)):
        single, attention = layer(part, part, part, **flags)
        torch.testing.assert_close(found, single, **CLOSE.get(found.dtype, {}))
        if weights is not None:
            n = len(part)
            torch.testing.assert_close(weights[i, ..., :n, :n], attention)
            assert float(weights[i].sum()) == pytest.approx(float(attention.sum()))


@pytest.mark.parametrize("make", [native, dropin])
@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("flags", [{}, {"need_weights": False}, {"average_attn_weights": False}])
@pytest.mark.parametrize("lengths", [LENGTHS, (2, 0, 3), (4,)])
@torch.no_grad()
def test_each_sequence_has_its_own_answer(
    make: Callable[..., Any], dtype: Any, flags: dict[str, bool], lengths: tuple[int, ...]
) -> None:
    layer, x = make(dtype=dtype), nested(dtype=dtype, lengths=lengths)
    output, weights = layer(x, x, x, **flags)
    assert (weights is None) == (flags.get("need_weights") is False)
    hold(layer, x, output, weights, **flags)


@torch.no_grad()
def test_another_answer_is_seen() -> None:
    layer, x = dropin(), nested()
    output, weights = layer(x, x, x)
    with pytest.raises(AssertionError):
        hold(layer, x, output * 1.01, weights)
    with pytest.raises(AssertionError):
        hold(layer, x, output, weights.flip(0))


@torch.no_grad()
def test_the_notes_and_the_policies() -> None:
    x, layer = nested(), native()
    for mode in ("auto", "native"):
        notes: list[str] = []
        layer(x, x, x, mode=mode, fully_masked="zero", notes=notes)
        assert notes[0] == "native: torch.nn.MultiheadAttention"
        assert "NestedTensor" in notes[1]


MASK = torch.zeros(5, 5, dtype=torch.bool)
PADDING = torch.zeros(len(LENGTHS), 5, dtype=torch.bool)
REFUSED: dict[str, tuple[dict[str, Any], Callable[[Any], dict[str, Any]], str]] = {
    "a mask": ({}, lambda x: {"attn_mask": MASK}, "no masks"),
    "padding": ({}, lambda x: {"key_padding_mask": PADDING}, "no masks"),
    "causal": ({}, lambda x: {"is_causal": True}, "is_causal"),
    "another key": ({}, lambda x: {"key": nested(), "value": nested()}, "not the same Tensor"),
    "a dense query": ({}, lambda x: {"query": torch.zeros(4, 5, 16)}, "not the same Tensor"),
    "batch second": ({"batch_first": False}, lambda x: {}, "batch_first was not True"),
    "no bias": ({"bias": False}, lambda x: {}, "needs a bias"),
    "an odd number of heads": ({"heads": 1}, lambda x: {}, "num_heads is not even"),
    "added columns": ({"add_bias_kv": True}, lambda x: {}, "bias_k"),
    "another dtype": ({"dtype": torch.float64}, lambda x: {}, "dtypes of query"),
}


@pytest.mark.parametrize("make", [native, dropin])
@pytest.mark.parametrize("what", REFUSED)
@torch.no_grad()
def test_the_rest_is_refused_by_name(make: Callable[..., Any], what: str) -> None:
    layer, change, words = REFUSED[what]
    x = nested()
    with pytest.raises(UnsupportedError, match=words) as found:
        make(**layer)(**{"query": x, "key": x, "value": x, **change(x)})
    assert found.value.given == "a NestedTensor"
    assert "query" in found.value.subject or what == "a dense query"
    assert "to_padded_tensor" in found.value.advice
    assert "key_padding_mask" in found.value.advice


@pytest.mark.parametrize("make", [native, dropin])
def test_what_pytorch_cannot_serve_is_refused(make: Callable[..., Any]) -> None:
    x, layer = nested(), make()
    with pytest.raises(UnsupportedError, match="grad is enabled"):
        layer(x, x, x)
    with torch.no_grad():
        jagged, wide, turned = nested(layout=torch.jagged), nested(8), nested().transpose(1, 2)
        for tensor, words in ((jagged, "torch.strided"), (wide, "Shape mismatch"), (turned, "contiguous")):
            with pytest.raises(UnsupportedError, match=words):
                layer(tensor, tensor, tensor)
        dense = torch.zeros(4, 5, 16)
        with pytest.raises(UnsupportedError, match="key_padding_mask: given a NestedTensor"):
            layer(dense, dense, dense, key_padding_mask=nested(5))
        with pytest.raises(ArgumentTypeError, match="need_weights"):
            layer(x, x, x, need_weights=1)


@torch.no_grad()
def test_the_composed_form_refuses() -> None:
    x = nested()
    with pytest.raises(UnsupportedError, match="composed"):
        native()(x, x, x, mode="composed")


def test_training_is_refused() -> None:
    x, layer = nested(), dropin().train()  # type: ignore[attr-defined]
    with torch.no_grad(), pytest.raises(UnsupportedError, match="training is enabled"):
        layer(x, x, x)


@torch.no_grad()
def test_the_advice_works() -> None:
    """Padded, with the mask that the error asks for, the answer is the same."""
    x, layer = nested(), dropin()
    output, _ = layer(x, x, x)
    padded = torch.nested.to_padded_tensor(x, 0.0)
    behind = torch.arange(padded.shape[1]) >= torch.tensor(LENGTHS)[:, None]
    found, _ = layer(padded, padded, padded, key_padding_mask=behind)
    for i, part in enumerate(output.unbind()):
        torch.testing.assert_close(found[i, : len(part)], part)
