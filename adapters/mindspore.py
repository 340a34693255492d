"""MindSpore: ``mindspore.nn.MultiheadAttention``, from 2.0 on.

Why it is built so:
- Both masks travel as one float mask: a bool key_padding_mask beside a float attn_mask is *added* as 1.0 by the cell.
- query, key and value are passed by position (keywords raise IndexError) and are always three tensors: the cell
remembers from one
  call to the next whether they were one (in graph mode it then answers for the wrong ones).
- A cell is in evaluation mode when it is made; ``set_train`` says which, always.
- need_weights=False gives a 1-tuple.
- If the first gradient of a process is taken with a source of one position, 2.10 gives wrong gradients from then on,
  for any shape. So the first one here is a small known one; if that is already wrong, the process cannot be used.

This module also runs inside workers (Python 3.8).
"""

from __future__ import annotations

import functools
from typing import Any

import mindspore
import numpy as np

from mhabridge import dtypes, envelope, masks, reference
from mhabridge.calls import Call, Result
from mhabridge.dialects import spec_to_kwargs, translate_call
from mhabridge.errors import ArgumentError, BackendError, UnsupportedError, WeightsError
from mhabridge.native import NativeForm, flat_mask, full_mask, native_form, parameter_grads, swap
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights

FRAMEWORK = "mindspore"


def version() -> str:
    """MindSpore's version."""
    return str(mindspore.__version__)


def is_layer(layer: Any) -> bool:
    """Whether this is MindSpore's multi-head attention."""
    return isinstance(layer, mindspore.nn.MultiheadAttention)


def extract(layer: Any) -> tuple[MHASpec, MHAWeights]:
    """The spec and the weights (copies) of a native cell.

    Raises:
        WeightsError: parameters that such a cell does not have, or of another shape.
        UnsupportedError: a subclass with a construct of its own.
    """
    if type(layer).construct is not mindspore.nn.MultiheadAttention.construct:
        raise UnsupportedError(
            "layer",
            given=f"{type(layer).__qualname__}, whose construct is its own",
            expected="mindspore.nn.MultiheadAttention's",
            advice="What it computes is not known; only a cell that computes plain attention can be moved.",
        )
    parameters = _parameters(layer)
    named = {name: _to_numpy(parameter) for name, parameter in parameters.items()}
    spec = MHASpec(
        embed_dim=layer.embed_dim,
        num_heads=layer.num_heads,
        kdim=layer.kdim,
        vdim=layer.vdim,
        dropout=layer.dropout,
        bias="in_proj_bias" in named,
        out_bias="out_proj.bias" in named,
        add_bias_kv="bias_k" in named,
        add_zero_attn=layer.add_zero_attn,
        batch_first=layer.batch_first,
        dtype=dtypes.name_of(next(iter(named.values()))),
    )
    return spec, MHAWeights.from_layout("mindspore", named, spec)


def _parameters(layer: Any) -> dict[str, Any]:
    """The cell's own parameters by the names they have in it (a parameter's own name changes when the cell is put into
    another).
    """
    found = {}
    for name in (
        "in_proj_weight",
        "q_proj_weight",
        "k_proj_weight",
        "v_proj_weight",
        "in_proj_bias",
        "bias_k",
        "bias_v",
    ):
        found[name] = getattr(layer, name, None)
    found["out_proj.weight"] = layer.out_proj.weight
    found["out_proj.bias"] = getattr(layer.out_proj, "bias", None)
    return {name: item for name, item in found.items() if isinstance(item, mindspore.Parameter)}


def build(
    spec: MHASpec, weights: MHAWeights | None = None, *, device: Any = None, notes: list[str] | None = None
) -> Any:
    """A native cell; without weights it keeps the initial values that MindSpore gives it.

    ``device`` must be None: MindSpore's device belongs to the process (``mindspore.set_device``), not to a cell.

    Raises:
        UnsupportedError: the native class cannot express the spec.
    """
    if device is not None:
        raise ArgumentError(
            "device",
            given=repr(device),
            expected="None",
            advice="MindSpore's device belongs to the process: mindspore.set_device.",
        )
    return _build(spec, weights, native_form(spec, FRAMEWORK, version()), [] if notes is None else notes)


def _build(spec: MHASpec, weights: MHAWeights | None, form: NativeForm, notes: list[str]) -> Any:
    kwargs = spec_to_kwargs(form.spec.replace(dtype=spec.dtype), FRAMEWORK, version=version())  # 2.0 has no dtype
    if "dtype" in kwargs:
        kwargs["dtype"] = getattr(mindspore, spec.dtype)
    layer = mindspore.nn.MultiheadAttention(**kwargs)
    if weights is not None:
        _load(layer, weights.to_layout("mindspore", spec, notes=notes))
    return layer


def _load(layer: Any, named: dict[str, np.ndarray]) -> None:
    parameters = _parameters(layer)
    if set(parameters) != set(named):
        odd = sorted(set(parameters) ^ set(named))
        raise WeightsError(", ".join(odd), given="on one side only", expected="the same parameters on both sides")
    for name, array in named.items():
        if parameters[name].shape != array.shape:
            raise WeightsError(name, given=f"shape {array.shape}", expected=f"shape {parameters[name].shape}")
        parameters[name].set_data(_to_tensor(array))


def run(spec: MHASpec, weights: MHAWeights, call: Call) -> Result:
    """One canonical call on the native cell, forward and, when asked for, backward."""
    envelope.refuse(FRAMEWORK, version(), spec, call)
    form = native_form(spec, FRAMEWORK, version(), turn=True)
    notes = ["native: mindspore.nn.MultiheadAttention", *form.notes]
    layer = _build(spec, weights, form, notes)
    layer.set_train(call.training)
    inputs = [_to_tensor(swap(getattr(call, name), form.spec.batch_first)) for name in ("query", "key", "value")]
    merged = flat_mask(masks.merge(call.blocked, call.added, spec.dtype), spec, call)
    if merged is not None:
        notes.append("masks merged into one float mask")
        inputs.append(_to_tensor(merged))
    output, attention = _forward(layer, inputs, call)
    grads = _grads(layer, inputs, form, spec, call) if call.wants_grads else {}
    output = swap(_to_numpy(output), form.spec.batch_first)
    return Result(output, None if attention is None else _to_numpy(attention), grads, tuple(notes))


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
            total = total + (output * _cast(swap(call.grad_output, form.spec.batch_first), spec)).sum()
        if call.grad_attn_weights is not None:
            total = total + (attention * _cast(call.grad_attn_weights, spec)).sum()
        return total

    _prove_gradients()
    parameters = _parameters(layer)
    wanted = mindspore.ParameterTuple(parameters.values())
    of_inputs, of_parameters = mindspore.grad(loss, tuple(range(len(inputs))), wanted)(*inputs)
    named = {name: _to_numpy(grad) for name, grad in zip(parameters, of_parameters)}
    grads = parameter_grads("mindspore", named, form.spec.replace(dtype=spec.dtype), spec)
    for name, grad in zip(("query", "key", "value"), of_inputs):
        grads[name] = swap(_to_numpy(grad), form.spec.batch_first)
    if call.mask_grad:
        grads["mask"] = full_mask(_to_numpy(of_inputs[3]), spec, call)
    return grads


@functools.lru_cache(maxsize=None)
def _prove_gradients() -> None:
    """Take a small known gradient, once in a process: d(sum(softmax(x w) y)) / dx, with three positions.

    Raises:
        BackendError: it is wrong: something took a gradient over one source position first.
    """
    rng = np.random.RandomState(0)
    query, key, value = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 2, 4), (3, 2, 4), (3, 2, 4)))
    layer = mindspore.nn.MultiheadAttention(4, 2)
    spec, weights = extract(layer)
    grad = mindspore.grad(lambda q: layer(q, mindspore.Tensor(key), mindspore.Tensor(value))[0].sum())
    found = _to_numpy(grad(mindspore.Tensor(query)))
    arrays = [np.ascontiguousarray(array.swapaxes(0, 1)) for array in (query, key, value)]
    call = Call(arrays[0], arrays[1], arrays[2], grad_output=np.ones((2, 2, 4)))
    known = reference.attend(spec, weights, call).grads["query"]
    if not np.allclose(found, known.swapaxes(0, 1), rtol=1e-3, atol=1e-4):
        raise BackendError(
            "mindspore",
            given="wrong gradients for a small known layer, in this process",
            expected="right ones",
            advice="MindSpore 2.10 does that after a first gradient over one source position. Start a new process.",
        )


def _cast(array: np.ndarray, spec: MHASpec) -> Any:
    return _to_tensor(dtypes.round_to(array, spec.dtype))


def _to_tensor(array: np.ndarray) -> Any:
    """A tensor of its own; bfloat16 goes over as float32, which holds it exactly."""
    if dtypes.name_of(array) == "bfloat16":
        return mindspore.Tensor(dtypes.to_float64(array).astype(np.float32)).astype(mindspore.bfloat16)
    return mindspore.Tensor(np.array(array, order="C"))


def _to_numpy(tensor: Any) -> np.ndarray:
    return dtypes.to_words(np.array(tensor.asnumpy()))
