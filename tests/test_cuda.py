"""``mb.attend`` and the drop-in on CUDA: the same answers, nothing waited for, nothing moved to the host.

Skipped where PyTorch sees no such device; the project builds and passes without one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import mhabridge as mb
from mhabridge.calls import Result
from mhabridge.diff.judge import judge
from mhabridge.diff.rounding import accuracy, bounds, named
from tests.cases import N, masks_of, material, reference_answer

pytestmark = pytest.mark.frameworks
torch = pytest.importorskip("torch", reason="PyTorch is not importable here")
if not torch.cuda.is_available():
    pytest.skip("PyTorch sees no CUDA device", allow_module_level=True)

from mhabridge.adapters.torch import MultiheadAttention  # noqa: E402  (PyTorch may not be there)

SPECS = {
    "plain": mb.MHASpec(16, 4, batch_first=True),
    "other features": mb.MHASpec(16, 4, kdim=12, vdim=20, batch_first=True),
    "added columns": mb.MHASpec(16, 4, add_bias_kv=True, add_zero_attn=True, batch_first=True),
}
MASKS = ("none", "padding bool", "attn float", "attn per head bool", "padding bool and attn float", "causal")
DTYPES = ("float32", "float16", "bfloat16", "float64")


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Everything that would make the host wait for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def on_device(array: Any) -> Any:
    if array is None:
        return None
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.astype(np.float32)).to("cuda", torch.bfloat16)
    return torch.from_numpy(np.array(array)).to("cuda")


def layer_of(spec: mb.MHASpec, weights: mb.MHAWeights, dropin: bool) -> Any:
    return mb.build(spec, "torch", weights, mode="composed" if dropin else "native", device="cuda").eval()


def numpy(tensor: Any) -> np.ndarray:
    return tensor.detach().to("cpu", torch.float64).numpy()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("form", ["native", "composed", "drop-in"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_answers(name: str, masks: str, dtype: str, form: str, need_weights: bool) -> None:
    spec = SPECS[name].replace(dtype=dtype)
    weights, inputs = material(spec)
    call = masks_of(masks, spec.num_heads)
    layer = layer_of(spec, weights, form == "drop-in")
    tensors = [on_device(array) for array in inputs]
    given = {key: value if isinstance(value, bool) else on_device(value) for key, value in call.items()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        if form == "drop-in":
            output, attention = layer(*tensors, need_weights=need_weights, **given)
        else:
            output, attention = mb.attend(layer, *tensors, need_weights=need_weights, mode=form, **given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert output.device.type == "cuda"
    prepared, exact = reference_answer(spec, weights, inputs, need_weights=need_weights, **call)
    limits = bounds(prepared, weights, named(exact), accuracy("torch", dtype))
    found = named(Result(numpy(output), None if attention is None else numpy(attention), {}))
    distances = {key: judge(found[key], array, limits[key]) for key, array in named(exact).items()}
    assert not {key: str(distance) for key, distance in distances.items() if not distance.ok}


@pytest.mark.parametrize("policy", ["nan", "zero"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_fully_masked_rows_without_a_look(no_waiting: None, policy: str, need_weights: bool) -> None:
    torch.cuda.set_sync_debug_mode("default")
    spec = SPECS["plain"]
    layer = layer_of(spec, mb.MHAWeights.random(spec), dropin=False)
    x = torch.randn(N, 3, 16, device="cuda")
    padding = torch.tensor([[True] * 3, *[[False] * 3] * (N - 1)], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    output, _ = mb.attend(layer, x, x, x, key_padding_mask=padding, need_weights=need_weights, fully_masked=policy)
    torch.cuda.set_sync_debug_mode("default")
    if policy == "nan":
        assert output[0].isnan().all()
    else:
        assert torch.allclose(output[0], layer.out_proj.bias.expand(3, -1))
    assert output[1:].isfinite().all()


def test_the_policy_error_looks() -> None:
    spec = SPECS["plain"]
    layer = layer_of(spec, mb.MHAWeights.random(spec), dropin=False)
    x = torch.randn(N, 3, 16, device="cuda")
    padding = torch.zeros(N, 3, dtype=torch.bool, device="cuda")
    padding[1] = True
    with pytest.raises(mb.ArgumentError, match="batch 1"):
        mb.attend(layer, x, x, x, key_padding_mask=padding, fully_masked="error")


def test_gradients_and_autocast(no_waiting: None) -> None:
    torch.cuda.set_sync_debug_mode("default")
    layer = MultiheadAttention(16, 4, batch_first=True, device="cuda")
    x = torch.randn(N, 3, 16, device="cuda", requires_grad=True)
    mask = torch.zeros(3, 3, device="cuda", requires_grad=True)
    torch.cuda.set_sync_debug_mode("error")
    with torch.autocast("cuda", torch.bfloat16):
        output, _ = layer(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)
    output.float().sum().backward()
    torch.cuda.set_sync_debug_mode("default")
    assert output.dtype == torch.bfloat16
    for tensor in (x, mask, *layer.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()


def test_convert_keeps_the_kind_of_device() -> None:
    layer = torch.nn.MultiheadAttention(16, 4, device="cuda")
    moved = mb.convert(layer, to="torch")
    assert moved.out_proj.weight.device.type == "cuda"
    assert mb.extract(moved) == mb.extract(layer)
    stack = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(16, 4, 8, device="cuda"), 2)
    assert {parameter.device.type for parameter in mb.convert(stack, to="torch").parameters()} == {"cuda"}


def test_another_device_than_the_weights() -> None:
    layer = MultiheadAttention(16, 4, device="cuda")
    x = torch.randn(3, N, 16)
    with pytest.raises((mb.ArgumentError, RuntimeError), match=r"device|cuda"):
        layer(x, x, x)
