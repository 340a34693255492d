"""Canonical calls on MindSpore's own layer, built for each of them."""

from __future__ import annotations

import functools
from typing import Any

import mindspore
import numpy as np

from mhabridge import masks
from mhabridge.calls import Call, Result
from mhabridge.dialects import spec_to_kwargs, translate_call
from mhabridge.errors import ArgumentError
from mhabridge.native import NativeForm, flat_mask, full_mask, native_form, parameter_grads, swap, unsayable
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights

from .gradients import believed
from .parameters import load, own_parameters
from .tensors import cast, to_numpy, to_tensor

FRAMEWORK = "mindspore"


def version() -> str:
    """MindSpore's version."""
    return str(mindspore.__version__)


def compiles_cells() -> bool:
    """Whether MindSpore is in graph mode.

    Asked as MindSpore's own ``Cell.__call__`` asks, where it can be: that is a tenth of what ``get_context`` takes.
    """
    return bool(_ask_mode() == mindspore.GRAPH_MODE)


_ask_mode = getattr(mindspore.context, "_get_mode", None) or functools.partial(mindspore.get_context, "mode")


def build_native(spec: MHASpec, weights: MHAWeights | None, form: NativeForm, notes: list[str]) -> Any:
    """The native layer in the form that can hold the spec; without weights it keeps its initial values."""
    layer = mindspore.nn.MultiheadAttention(**constructor_kwargs(form.spec.replace(dtype=spec.dtype)))
    if weights is not None:
        load(layer, weights.to_layout("mindspore", spec, notes=notes))
    return layer


def constructor_kwargs(spec: MHASpec) -> dict[str, Any]:
    """The native constructor's arguments; 2.0 has no dtype."""
    kwargs = spec_to_kwargs(spec, FRAMEWORK, version=version())
    if "dtype" in kwargs:
        kwargs["dtype"] = getattr(mindspore, spec.dtype)
    return kwargs


def refuse_device(device: Any) -> None:
    """Raise for any device but None."""
    if device is not None:
        raise ArgumentError(
            "device",
            given=repr(device),
            expected="None",
            advice="MindSpore's device belongs to the process: mindspore.set_device.",
        )


def unfit(spec: MHASpec, weights: MHAWeights, call: Call) -> dict[str, str]:
    """Why the native class cannot be used for a call, beyond the table's envelope; empty when it can."""
    return unsayable(spec, FRAMEWORK, version())


def run_native(spec: MHASpec, weights: MHAWeights, call: Call) -> Result:
    """One canonical call on the native cell, forward and, when asked for, backward."""
    form = native_form(spec, FRAMEWORK, version(), turn=True)
    notes = ["native: mindspore.nn.MultiheadAttention", *form.notes]
    layer = build_native(spec, weights, form, notes)
    layer.set_train(call.training)
    inputs = [to_tensor(swap(getattr(call, name), form.spec.batch_first)) for name in ("query", "key", "value")]
    merged = flat_mask(masks.merge(call.blocked, call.added, spec.dtype), spec, call)
    if merged is not None:
        notes.append("masks merged into one float mask")
        inputs.append(to_tensor(merged))
    output, attention = _forward(layer, inputs, call)
    grads = _grads(layer, inputs, form, spec, call) if call.wants_grads else {}
    output = swap(to_numpy(output), form.spec.batch_first)
    return Result(output, None if attention is None else to_numpy(attention), grads, tuple(notes))


def _forward(layer: Any, inputs: list[Any], call: Call) -> tuple[Any, Any]:
    options = {
        "attn_mask": inputs[3] if len(inputs) > 3 else None,
        "need_weights": call.need_weights,
        "average_attn_weights": call.average_attn_weights,
    }
    args, kwargs = translate_call("numpy", f"{FRAMEWORK}@{version()}", tuple(inputs[:3]), options)
    answer = layer(*args, **kwargs)
    return answer[0], answer[1] if call.need_weights else None


def _grads(layer: Any, inputs: list[Any], form: NativeForm, spec: MHASpec, call: Call) -> dict[str, np.ndarray]:
    def loss(*tensors: Any) -> Any:
        output, attention = _forward(layer, list(tensors), call)
        total = 0.0
        if call.grad_output is not None:
            total = total + (output * cast(swap(call.grad_output, form.spec.batch_first), spec)).sum()
        if call.grad_attn_weights is not None:
            total = total + (attention * cast(call.grad_attn_weights, spec)).sum()
        return total

    parameters = own_parameters(layer)
    wanted = mindspore.ParameterTuple(parameters.values())
    with believed():
        of_inputs, of_parameters = mindspore.grad(loss, tuple(range(len(inputs))), wanted)(*inputs)
        arrays = [to_numpy(grad) for grad in of_inputs]
        named = {name: to_numpy(grad) for name, grad in zip(parameters, of_parameters)}
    grads = parameter_grads("mindspore", named, form.spec.replace(dtype=spec.dtype), spec)
    grads.update({name: swap(array, form.spec.batch_first) for name, array in zip(("query", "key", "value"), arrays)})
    if call.mask_grad:
        grads["mask"] = full_mask(arrays[3], spec, call)
    return grads
