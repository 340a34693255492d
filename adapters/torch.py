"""PyTorch: ``torch.nn.MultiheadAttention``, from 1.8.1 on.

Why it is built so:
- Both masks travel as one float mask of the layer's dtype: 1.8.1 reads the bytes of a float key_padding_mask as if
they were
  bool, and 2.x refuses a mask of another dtype than the query's.
- query, key and value are always three tensors: only a layer that sees one tensor three times takes the fast path,
which
  ignores is_causal and has its own answer for fully masked rows.
- A fully masked row is NaN only when weights are asked for (without them the row is the out bias), so they are asked
for.
- 1.8.1 keeps out_proj.bias, with random values, when bias is False; it is set to zero.

This module also runs inside workers (Python 3.8).
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch

from mhabridge import dtypes, envelope, masks
from mhabridge.calls import Call, Result
from mhabridge.dialects import translate_call
from mhabridge.errors import ArgumentError, UnsupportedError, WeightsError
from mhabridge.native import NativeForm, flat_mask, full_mask, native_form, parameter_grads, swap
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights

FRAMEWORK = "torch"


def version() -> str:
    """PyTorch's version."""
    return str(torch.__version__)


def is_layer(layer: Any) -> bool:
    """Whether this is PyTorch's multi-head attention."""
    return isinstance(layer, torch.nn.MultiheadAttention)


def extract(layer: torch.nn.MultiheadAttention) -> tuple[MHASpec, MHAWeights]:
    """The spec and the weights (copies) of a native layer.

    Raises:
        WeightsError: parameters that such a layer does not have, or of another shape, or without values (meta).
        UnsupportedError: a subclass with a forward of its own.
    """
    if type(layer).forward is not torch.nn.MultiheadAttention.forward:
        raise UnsupportedError(
            "layer",
            given=f"{type(layer).__qualname__}, whose forward is its own",
            expected="torch.nn.MultiheadAttention's",
            advice="What it computes is not known; only a layer that computes plain attention can be moved.",
        )
    named = {name: _to_numpy(tensor) for name, tensor in layer.state_dict().items()}
    first = next(iter(named.values()))
    spec = MHASpec(
        embed_dim=layer.embed_dim,
        num_heads=layer.num_heads,
        kdim=layer.kdim,
        vdim=layer.vdim,
        dropout=layer.dropout,
        bias=layer.in_proj_bias is not None,
        out_bias=layer.out_proj.bias is not None,
        add_bias_kv=layer.bias_k is not None,
        add_zero_attn=layer.add_zero_attn,
        batch_first=getattr(layer, "batch_first", False),
        dtype=dtypes.name_of(first),
    )
    return spec, MHAWeights.from_layout("torch", named, spec)


def build(
    spec: MHASpec, weights: MHAWeights | None = None, *, device: Any = None, notes: list[str] | None = None
) -> torch.nn.MultiheadAttention:
    """A native layer; without weights it keeps the initial values that PyTorch gives it.

    Raises:
        UnsupportedError: the native class cannot express the spec.
    """
    form = native_form(spec, FRAMEWORK, version())
    return _build(spec, weights, form, device, [] if notes is None else notes)


def _build(
    spec: MHASpec, weights: MHAWeights | None, form: NativeForm, device: Any, notes: list[str]
) -> torch.nn.MultiheadAttention:
    layer = torch.nn.MultiheadAttention(**form.kwargs).to(dtype=getattr(torch, spec.dtype))
    if weights is not None:
        _load(layer, weights.to_layout("torch", spec, notes=notes))
    if device is None:
        return layer
    try:
        return layer.to(device)
    except (RuntimeError, AssertionError) as error:  # an unknown name; no CUDA in this build
        raise ArgumentError(
            "device", given=repr(device), expected="a device that PyTorch has here", advice=str(error)
        ) from error


def _load(layer: torch.nn.MultiheadAttention, named: dict[str, np.ndarray]) -> None:
    state = {name: _to_tensor(array) for name, array in named.items()}
    own = layer.state_dict()
    for name in set(own) - set(state):
        if name != "out_proj.bias":
            raise WeightsError(name, given="nothing", expected=f"shape {tuple(own[name].shape)}")
        state[name] = torch.zeros_like(own[name])  # PyTorch 1.8.1's left-over
    layer.load_state_dict(state, strict=True)


def run(spec: MHASpec, weights: MHAWeights, call: Call) -> Result:
    """One canonical call on the native layer, forward and, when asked for, backward."""
    envelope.refuse(FRAMEWORK, version(), spec, call)
    form = native_form(spec, FRAMEWORK, version(), turn=True)
    notes = ["native: torch.nn.MultiheadAttention", *form.notes]
    layer = _build(spec, weights, form, None, notes)
    layer.train(call.training)
    inputs = {name: _leaf(swap(getattr(call, name), form.spec.batch_first), call) for name in ("query", "key", "value")}
    merged = masks.merge(call.blocked, call.added, spec.dtype)
    mask = None if merged is None else _leaf(flat_mask(merged, spec, call), call)
    if merged is not None:
        notes.append("masks merged into one float mask")
    with torch.set_grad_enabled(call.wants_grads):
        output, attention = _forward(layer, inputs, mask, spec, call)
    grads = _grads(layer, inputs, mask, output, attention, form, spec, call) if call.wants_grads else {}
    attention = _to_numpy(attention) if call.need_weights else None
    return Result(swap(_to_numpy(output), form.spec.batch_first), attention, grads, tuple(notes))


def _forward(
    layer: torch.nn.MultiheadAttention, inputs: dict[str, Any], mask: Any, spec: MHASpec, call: Call
) -> tuple[Any, Any]:
    options = {
        "attn_mask": mask,
        "need_weights": call.need_weights or bool(envelope.fully_masked(spec, call).any()),
        "average_attn_weights": call.average_attn_weights or not call.need_weights,
    }
    args, kwargs = translate_call("numpy", f"{FRAMEWORK}@{version()}", tuple(inputs.values()), options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 1.8.1 warns about its own integer division
        output, attention = layer(*args, **kwargs)
    return output, attention


def _grads(
    layer: torch.nn.MultiheadAttention,
    inputs: dict[str, Any],
    mask: Any,
    output: Any,
    attention: Any,
    form: NativeForm,
    spec: MHASpec,
    call: Call,
) -> dict[str, np.ndarray]:
    loss = torch.zeros((), dtype=output.dtype)
    if call.grad_output is not None:
        loss = loss + (output * _cast(swap(call.grad_output, form.spec.batch_first), spec)).sum()
    if call.grad_attn_weights is not None:
        loss = loss + (attention * _cast(call.grad_attn_weights, spec)).sum()
    parameters = dict(layer.named_parameters())
    leaves = {**inputs, **parameters, **({"mask": mask} if call.mask_grad else {})}
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    arrays = {
        name: _to_numpy(torch.zeros_like(leaf) if grad is None else grad)
        for (name, leaf), grad in zip(leaves.items(), found)
    }
    named = {name: arrays[name] for name in parameters if form.spec.out_bias or name != "out_proj.bias"}
    grads = parameter_grads("torch", named, form.spec.replace(dtype=spec.dtype), spec)
    grads.update({name: swap(arrays[name], form.spec.batch_first) for name in inputs})
    if call.mask_grad:
        grads["mask"] = full_mask(arrays["mask"], spec, call)
    return grads


def _leaf(array: np.ndarray | None, call: Call) -> Any:
    assert array is not None
    return _to_tensor(array).requires_grad_(call.wants_grads)


def _cast(array: np.ndarray, spec: MHASpec) -> Any:
    return _to_tensor(dtypes.round_to(array, spec.dtype))


def _to_tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor of its own (never a view of the caller's memory); bfloat16 goes over as its bits."""
    array = dtypes.to_words(np.array(array, order="C"))
    if array.dtype == dtypes.BFLOAT16_WORDS:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.device.type == "meta":
        raise WeightsError(
            "layer", given="a meta tensor", expected="values", advice="Load the weights before extracting."
        )
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return np.array(tensor.view(torch.int16).numpy()).view(dtypes.BFLOAT16_WORDS)
    return np.array(tensor.numpy())
