"""Canonical calls on PyTorch's own layer, built for each of them."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch

from mhabridge import envelope, masks
from mhabridge.calls import Call, Result
from mhabridge.dialects import translate_call
from mhabridge.errors import ArgumentError
from mhabridge.native import NativeForm, flat_mask, full_mask, native_form, parameter_grads, swap, unsayable
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights

from .parameters import load
from .tensors import cast, leaf, to_numpy

FRAMEWORK = "torch"


def version() -> str:
    """PyTorch's version."""
    return str(torch.__version__)


def build_native(
    spec: MHASpec, weights: MHAWeights | None, form: NativeForm, device: Any, notes: list[str]
) -> torch.nn.MultiheadAttention:
    """The native layer in the form that can hold the spec; without weights it keeps its initial values."""
    layer = torch.nn.MultiheadAttention(**form.kwargs).to(dtype=getattr(torch, spec.dtype))
    if weights is not None:
        load(layer, weights.to_layout("torch", spec, notes=notes))
    return on_device(layer, device)


def on_device(module: torch.nn.Module, device: Any) -> Any:
    """The module on a device; None leaves it where it is.

    Raises:
        ArgumentError: PyTorch has no such device here.
    """
    if device is None:
        return module
    try:
        return module.to(device)
    except (RuntimeError, AssertionError) as error:  # an unknown name; no CUDA in this build
        raise ArgumentError(
            "device", given=repr(device), expected="a device that PyTorch has here", advice=str(error)
        ) from error


def unfit(spec: MHASpec, weights: MHAWeights, call: Call) -> dict[str, str]:
    """Why the native class cannot be used for a call, beyond the table's envelope; empty when it can."""
    return unsayable(spec, FRAMEWORK, version())


def run_native(spec: MHASpec, weights: MHAWeights, call: Call) -> Result:
    """One canonical call on the native layer, forward and, when asked for, backward."""
    form = native_form(spec, FRAMEWORK, version(), turn=True)
    notes = ["native: torch.nn.MultiheadAttention", *form.notes]
    layer = build_native(spec, weights, form, None, notes)
    layer.train(call.training)
    inputs = {name: leaf(swap(getattr(call, name), form.spec.batch_first), call) for name in ("query", "key", "value")}
    merged = masks.merge(call.blocked, call.added, spec.dtype)
    mask = None if merged is None else leaf(flat_mask(merged, spec, call), call)
    if merged is not None:
        notes.append("masks merged into one float mask")
    with torch.set_grad_enabled(call.wants_grads):
        output, attention = _forward(layer, inputs, mask, spec, call)
    grads = _grads(layer, inputs, mask, output, attention, form, spec, call) if call.wants_grads else {}
    attention = to_numpy(attention) if call.need_weights else None
    return Result(swap(to_numpy(output), form.spec.batch_first), attention, grads, tuple(notes))


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
        loss = loss + (output * cast(swap(call.grad_output, form.spec.batch_first), spec)).sum()
    if call.grad_attn_weights is not None:
        loss = loss + (attention * cast(call.grad_attn_weights, spec)).sum()
    parameters = dict(layer.named_parameters())
    leaves = {**inputs, **parameters, **({"mask": mask} if call.mask_grad else {})}
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    arrays = {
        name: to_numpy(torch.zeros_like(leaf) if grad is None else grad)
        for (name, leaf), grad in zip(leaves.items(), found)
    }
    named = {name: arrays[name] for name in parameters if form.spec.out_bias or name != "out_proj.bias"}
    grads = parameter_grads("torch", named, form.spec.replace(dtype=spec.dtype), spec)
    grads.update({name: swap(arrays[name], form.spec.batch_first) for name in inputs})
    if call.mask_grad:
        grads["mask"] = full_mask(arrays["mask"], spec, call)
    return grads
