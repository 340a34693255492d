"""MindSpore: ``mindspore.nn.MultiheadAttention``, from 2.0 on.

Why it is built so:
- Both masks travel as one float mask: a bool key_padding_mask beside a float attn_mask is *added* as 1.0 by the cell.
- query, key and value are passed by position (keywords raise IndexError) and are always three tensors: the cell
remembers from one
  call to the next whether they were one (in graph mode it then answers for the wrong ones).
- A cell is in evaluation mode when it is made; ``set_train`` says which, always.
- need_weights=False gives a 1-tuple.
- A live native cell is composed in graph mode: what was compiled for one tensor given three times also answers for
  three.
- The drop-in has two forms. Called from Python in PyNative it is ``attend``, with every check and the native cell
  where that serves. Its construct is what a compiler reads (graph mode, ``jit``, a larger cell that is compiled): one
  formula in plain operations, with shapes, dtypes and flags resolved while compiling. 2.0 compiles also what a flag
  excludes, so construct must not mention the other form.
- If the first gradient of a process is taken with a source of one position, 2.10 gives wrong gradients from then on,
  for any shape. So the first one here is a small known one; if that is already wrong, the process cannot be used.

This module also runs inside workers (Python 3.8).
"""

from __future__ import annotations

import functools
import signal
import threading
from typing import Any, Callable, TypeVar

import mindspore
import numpy as np

from mhabridge import dtypes, envelope, live, masks, reference
from mhabridge.calls import Call, Result
from mhabridge.checks import check_flag, check_shapes, sizes_of
from mhabridge.composed import Ops
from mhabridge.dialects import spec_to_kwargs, translate_call
from mhabridge.errors import ArgumentError, ArgumentTypeError, BackendError, UnsupportedError, WeightsError
from mhabridge.initial import initial_values
from mhabridge.live import Options, Traits
from mhabridge.native import NativeForm, flat_mask, full_mask, native_form, parameter_grads, swap, unsayable
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
    if type(layer).construct not in (mindspore.nn.MultiheadAttention.construct, MultiheadAttention.construct):
        raise UnsupportedError(
            "layer",
            given=f"{type(layer).__qualname__}, whose construct is its own",
            expected="mindspore.nn.MultiheadAttention's",
            advice="What it computes is not known; only a cell that computes plain attention can be moved.",
        )
    named = {name: _to_numpy(parameter) for name, parameter in _parameters(layer).items()}
    spec = _spec(layer)
    return spec, MHAWeights.from_layout("mindspore", named, spec)


def _spec(layer: Any) -> MHASpec:
    return MHASpec(
        embed_dim=layer.embed_dim,
        num_heads=layer.num_heads,
        kdim=layer.kdim,
        vdim=layer.vdim,
        dropout=layer.dropout,
        bias=layer.in_proj_bias is not None,
        out_bias=layer.out_proj.bias is not None,
        add_bias_kv=layer.bias_k is not None,
        add_zero_attn=layer.add_zero_attn,
        batch_first=layer.batch_first,
        dtype=dtypes.canonical(layer.out_proj.weight.dtype),
    )


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
    _refuse_device(device)
    return _build(spec, weights, native_form(spec, FRAMEWORK, version()), [] if notes is None else notes)


def _refuse_device(device: Any) -> None:
    if device is not None:
        raise ArgumentError(
            "device",
            given=repr(device),
            expected="None",
            advice="MindSpore's device belongs to the process: mindspore.set_device.",
        )


def _build(spec: MHASpec, weights: MHAWeights | None, form: NativeForm, notes: list[str]) -> Any:
    layer = mindspore.nn.MultiheadAttention(**_kwargs(form.spec.replace(dtype=spec.dtype)))
    if weights is not None:
        _load(layer, weights.to_layout("mindspore", spec, notes=notes))
    return layer


def _kwargs(spec: MHASpec) -> dict[str, Any]:
    """The native constructor's arguments; 2.0 has no dtype."""
    kwargs = spec_to_kwargs(spec, FRAMEWORK, version=version())
    if "dtype" in kwargs:
        kwargs["dtype"] = getattr(mindspore, spec.dtype)
    return kwargs


def _load(layer: Any, named: dict[str, np.ndarray]) -> None:
    parameters = _parameters(layer)
    if set(parameters) != set(named):
        odd = sorted(set(parameters) ^ set(named))
        raise WeightsError(", ".join(odd), given="on one side only", expected="the same parameters on both sides")
    for name, array in named.items():
        if parameters[name].shape != array.shape:
            raise WeightsError(name, given=f"shape {array.shape}", expected=f"shape {parameters[name].shape}")
        parameters[name].set_data(_to_tensor(array))


def unfit(spec: MHASpec, weights: MHAWeights, call: Call) -> dict[str, str]:
    """Why the native class cannot be used for a call, beyond the table's envelope; empty when it can."""
    return unsayable(spec, FRAMEWORK, version())


def run_native(spec: MHASpec, weights: MHAWeights, call: Call) -> Result:
    """One canonical call on the native cell, forward and, when asked for, backward."""
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


class _Ops(Ops):
    """MindSpore's operations, from 2.0 on."""

    framework = "MindSpore"

    def is_tensor(self, x: Any) -> bool:
        return isinstance(x, mindspore.Tensor)

    def dtype(self, x: Any) -> str:
        return _name(x.dtype)

    def narrow(self, x: Any, dtype: str) -> Any:
        return _narrow(x, dtype)

    def blocked(self, x: Any, dtype: str) -> Any:
        return _blocked(x, dtype)

    def constant(self, array: np.ndarray, dtype: str) -> Any:
        return _to_tensor(dtypes.round_to(array, dtype))

    def numpy(self, tensor: Any) -> np.ndarray:
        return _to_numpy(tensor)

    def matmul(self, a: Any, b: Any) -> Any:
        # The gradient of ops.matmul fails when all axes in front have length 1 (2.10).
        return mindspore.ops.BatchMatMul()(a, b) if a.ndim > 2 else mindspore.ops.MatMul()(a, b)

    def transpose(self, x: Any, axes: tuple[int, ...]) -> Any:
        return mindspore.ops.transpose(x, axes)

    def reshape(self, x: Any, shape: tuple[int, ...]) -> Any:
        return mindspore.ops.reshape(x, shape)

    def concat(self, parts: list[Any], axis: int) -> Any:
        return mindspore.ops.concat(tuple(parts), axis)

    def broadcast(self, x: Any, shape: tuple[int, ...]) -> Any:
        return mindspore.ops.broadcast_to(x, shape)

    def exp(self, x: Any) -> Any:
        return mindspore.ops.exp(x)

    def largest(self, x: Any) -> Any:
        return mindspore.ops.stop_gradient(mindspore.ops.ReduceMax(keep_dims=True)(mindspore.ops.stop_gradient(x), -1))

    def total(self, x: Any, axes: tuple[int, ...]) -> Any:
        return mindspore.ops.ReduceSum(keep_dims=True)(x, axes)

    def replace(self, x: Any, value: float, by: float) -> Any:
        return mindspore.ops.select(x == value, mindspore.ops.ones_like(x) * by, x)

    def dropout(self, x: Any, probability: float) -> Any:
        return mindspore.ops.dropout(x, probability, training=True)

    def run(
        self, function: Any, leaves: list[Any], seeds: tuple[np.ndarray | None, np.ndarray | None]
    ) -> tuple[Any, Any, list[np.ndarray]]:
        results = function(*leaves)
        if all(seed is None for seed in seeds):
            return (*results, [])
        _prove_gradients()
        weights = [None if s is None else self.constant(s, dtypes.canonical(r.dtype)) for r, s in zip(results, seeds)]

        def loss(*tensors: Any) -> Any:
            terms = [
                (result * weight).sum() for result, weight in zip(function(*tensors), weights) if weight is not None
            ]
            return sum(terms[1:], terms[0])

        found = mindspore.grad(loss, tuple(range(len(leaves))))(*leaves)
        found = found if isinstance(found, tuple) else (found,)
        return (*results, [_to_numpy(grad) for grad in found])


OPS = _Ops()


def traits(layer: Any) -> Traits:
    """Training flag, requires_grad of each parameter, and kind of device (the process's)."""
    parameters = _parameters(layer)
    trainable = {name: bool(parameters[own].requires_grad) for name, own in _owners(layer).items()}
    return Traits(bool(layer.training), trainable, _device())


def set_traits(layer: Any, wanted: Traits) -> None:
    """The inverse of ``traits``.

    Raises:
        UnsupportedError: another kind of device than the process's, or a packed parameter that is frozen in part.
    """
    if wanted.device != _device():
        raise UnsupportedError(
            "device",
            given=wanted.device,
            expected=f"{_device()}, the device of this process",
            advice="Move the layer there first, or choose MindSpore's device (mindspore.set_device).",
        )
    owners = _owners(layer)
    for own, parameter in _parameters(layer).items():
        names = [name for name in owners if owners[name] == own and name in wanted.trainable]
        parameter.requires_grad = wanted.all_alike(names, own)
    layer.set_train(wanted.training)


def _device() -> str:
    return "cpu" if mindspore.get_context("device_target") == "CPU" else "gpu"


def _owners(layer: Any) -> dict[str, str]:
    """The native parameter that holds each canonical one."""
    packed = layer.in_proj_weight is not None
    found = {f"{x}_weight": "in_proj_weight" if packed else f"{x}_proj_weight" for x in "qkv"}
    found["out_weight"] = "out_proj.weight"
    if layer.in_proj_bias is not None:
        found.update({f"{x}_bias": "in_proj_bias" for x in "qkv"}, out_bias="out_proj.bias")
    if layer.bias_k is not None:
        found.update(bias_k="bias_k", bias_v="bias_v")
    return found


# -- live layers -----------------------------------------------------------------------------------------------------


def attend(
    layer: Any,
    inputs: tuple[Any, Any, Any],
    key_padding_mask: Any,
    attn_mask: Any,
    options: Options,
    notes: list[str],
) -> tuple[Any, Any]:
    """One call of a live cell: native without masks (a fully masked row would have to be looked for), else composed.

    Raises:
        UnsupportedError: the mode is "native" and the call is not one for the native cell, or the dtype has no kernels.
    """
    spec = _spec(layer)
    sizes = sizes_of(spec, inputs[0], inputs[1], live.check(OPS, spec, inputs, options))
    empty = 0 in (sizes.batch, sizes.target, sizes.source)
    if sizes.source == 0 and not spec.extra_columns and sizes.batch * sizes.target:
        raise UnsupportedError(
            "key, value",
            given="no source position",
            expected="at least one",
            advice="A product over none is left unwritten in MindSpore 2.10; the output would be the out bias.",
        )
    masked = key_padding_mask is not None or attn_mask is not None or options.is_causal
    reason = _why_composed(spec, sizes, options, masked and not empty)
    if reason and options.mode == "native":
        raise UnsupportedError("mode", given="'native'", expected="'auto' or 'composed'", advice=reason)
    if reason:
        notes.append(f"composed: {reason}")
        return live.attend(OPS, spec, _tensors(layer), inputs, key_padding_mask, attn_mask, options)
    if empty:
        _check_masks(key_padding_mask, attn_mask, sizes)
    notes.append("native: mindspore.nn.MultiheadAttention")
    return _attend_native(layer, inputs, options)


def _why_composed(spec: MHASpec, sizes: masks.Sizes, options: Options, masked: bool) -> str:
    found = _violations(spec, sizes, options)
    impossible = [limit for limit in found if not limit.composable]
    if impossible and mindspore.get_context("device_target") == "CPU":  # what the envelope was measured on
        raise UnsupportedError(
            ", ".join(limit.feature for limit in impossible),
            given=f"a layer that MindSpore {version()} does not compute",
            expected="one inside its envelope",
            advice=" ".join(limit.reason for limit in impossible),
        )
    if options.mode == "composed":
        return "asked for"
    if masked:
        return "MindSpore may leave a fully masked row unwritten, and whether there is one shows only in the values."
    if mindspore.get_context("mode") == mindspore.GRAPH_MODE:
        return "A native cell that was compiled for one tensor given three times answers for three tensors as for one."
    if sizes.source == 1:
        return "A native gradient over one source position, if it is the first, spoils all later ones in the process."
    return "; ".join(limit.reason for limit in found if limit.composable)


def _violations(spec: MHASpec, sizes: masks.Sizes, options: Options) -> list[envelope.Limit]:
    """The limits that a call without masks goes beyond; it may be part of a gradient, which nobody says beforehand."""
    query, key, value, grad = (
        np.broadcast_to(np.float32(0), (sizes.batch, length, features))
        for length, features in (
            (sizes.target, spec.embed_dim),
            (sizes.source, spec.key_features),
            (sizes.source, spec.value_features),
            (sizes.target, spec.out_features),
        )
    )
    call = Call(query, key, value, training=options.training, grad_output=grad)
    return envelope.violations(FRAMEWORK, version(), spec, call)


def _attend_native(layer: Any, inputs: tuple[Any, Any, Any], options: Options) -> tuple[Any, Any]:
    layer.q_is_k = layer.k_is_v = False  # of an earlier call; with both False the cell is right for any tensors
    answer = mindspore.nn.MultiheadAttention.construct(
        layer,
        *inputs,
        need_weights=options.need_weights,
        average_attn_weights=options.average_attn_weights,
    )
    return answer[0], answer[1] if options.need_weights else None


def _check_masks(key_padding_mask: Any, attn_mask: Any, sizes: masks.Sizes) -> None:
    """The shapes of masks that have nothing to mask."""
    if key_padding_mask is not None:
        masks.padding_shape(key_padding_mask, sizes)
    if attn_mask is not None:
        masks.attention_shape(attn_mask, sizes)


def _tensors(layer: Any) -> dict[str, Any]:
    """The cell's own parameters, differentiable, by canonical name."""
    size = layer.embed_dim
    thirds = [slice(start, start + size) for start in (0, size, 2 * size)]
    found = {"out_weight": layer.out_proj.weight}
    for name, third in zip("qkv", thirds):
        packed = layer.in_proj_weight
        found[f"{name}_weight"] = getattr(layer, f"{name}_proj_weight") if packed is None else packed[third]
        if layer.in_proj_bias is not None:
            found[f"{name}_bias"] = layer.in_proj_bias[third]
    if layer.out_proj.bias is not None:
        found["out_bias"] = layer.out_proj.bias
    if layer.bias_k is not None:
        found.update(bias_k=layer.bias_k.reshape(-1), bias_v=layer.bias_v.reshape(-1))
    return found


class MultiheadAttention(mindspore.nn.MultiheadAttention):  # type: ignore[misc]
    """``torch.nn.MultiheadAttention`` as a MindSpore cell: PyTorch's constructor, call, defaults and answers.

    The parameters have the names and shapes of ``mindspore.nn.MultiheadAttention``, so checkpoints go both ways. It is
    in training mode when it is made, always returns a pair, and may be called with keywords. In a compiled graph masks
    must be bool, byte or float: those of wider integers need a look at their values. A function that ``mindspore.jit``
    compiled keeps the training flag that the cell had then (so does every MindSpore cell in one).

    Args:
        embed_dim: E.
        num_heads: H.
        dropout: on the attention weights, in training.
        bias: for all four projections.
        add_bias_kv: a learned key and value behind the source.
        add_zero_attn: a key and value of zeros behind the source.
        kdim: features of the key; None for E.
        vdim: features of the value; None for E.
        batch_first: (N, L, E) instead of (L, N, E).
        device: None: MindSpore's device belongs to the process.
        dtype: of the parameters; None for float32.

    Raises:
        ArgumentError: a size or probability that is wrong, or a device.
        UnsupportedError: a dtype that this version's cell cannot have.

    Example:
        >>> layer = MultiheadAttention(8, 2, batch_first=True)
        >>> x = mindspore.Tensor(np.ones((1, 3, 8), np.float32))
        >>> output, weights = layer(x, x, x, is_causal=True)
        >>> weights[0, 0].asnumpy().tolist()
        [1.0, 0.0, 0.0]
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        _refuse_device(device)
        spec = MHASpec(
            embed_dim,
            num_heads,
            kdim,
            vdim,
            dropout,
            bias,
            add_bias_kv=add_bias_kv,
            add_zero_attn=add_zero_attn,
            batch_first=batch_first,
            dtype="float32" if dtype is None else dtype,
        )
        super().__init__(**_kwargs(spec))
        self._spec = spec.to_json()
        self._dtype = spec.dtype
        self._scale = spec.score_scale
        self.set_train(True)
        _load(self, initial_values(spec).to_layout("mindspore", spec))
        if mindspore.get_context("mode") == mindspore.PYNATIVE_MODE:
            _prove_gradients()

    def __call__(
        self,
        query: Any,
        key: Any,
        value: Any,
        key_padding_mask: Any = None,
        need_weights: bool = True,
        attn_mask: Any = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Any, Any]:
        """PyTorch's call; see ``mhabridge.attend`` for what the arguments mean. Compilers do not come here."""
        args = (query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        if mindspore.get_context("mode") == mindspore.PYNATIVE_MODE:
            self.__dict__["construct"] = self._answer  # for this call: a compiler shall find the class's own
        try:
            answer: tuple[Any, Any] = mindspore.nn.Cell.__call__(self, *args)
            return answer
        finally:
            self.__dict__.pop("construct", None)

    def _answer(
        self,
        query: Any,
        key: Any,
        value: Any,
        key_padding_mask: Any,
        need_weights: bool,
        attn_mask: Any,
        average_attn_weights: bool,
        is_causal: bool,
    ) -> tuple[Any, Any]:
        options = Options(is_causal, need_weights, average_attn_weights, training=self.training)
        return attend(self, (query, key, value), key_padding_mask, attn_mask, options, [])

    def construct(
        self,
        query: Any,
        key: Any,
        value: Any,
        key_padding_mask: Any = None,
        need_weights: bool = True,
        attn_mask: Any = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Any, Any]:
        """The call as a compiler reads it."""
        batch, target, source, batched = _compiled_sizes(
            self._spec,
            (query.shape, key.shape, value.shape),
            (query.dtype, key.dtype, value.dtype),
            (need_weights, average_attn_weights, is_causal),
        )
        sizes = (batch, self.num_heads, target, source, batched)
        q, k, v = self._projected(query, key, value, batch, batched)
        mask = self._mask(key_padding_mask, attn_mask, is_causal, sizes)
        scores = mindspore.ops.matmul(q * self._scale, mindspore.ops.transpose(k, (0, 1, 3, 2)))
        attention = _softmax(scores if mask is None else scores + mask)
        if self.training and self.dropout == 1.0:
            attention = attention * 0.0
        elif self.training and self.dropout > 0.0:
            attention = mindspore.ops.dropout(attention, self.dropout, training=True)
        context = mindspore.ops.transpose(mindspore.ops.matmul(attention, v), (0, 2, 1, 3))
        rows = mindspore.ops.reshape(context, (batch * target, self.embed_dim))
        output = _rows_times(rows, self.out_proj.weight, self.out_proj.bias)
        output = self._turned(mindspore.ops.reshape(output, (batch, target, self.embed_dim)), batched)
        if not batched:
            output = mindspore.ops.reshape(output, (target, self.embed_dim))
        if not need_weights:
            return output, None
        if average_attn_weights:
            attention = attention.sum(1) * (1.0 / self.num_heads)
        return output, attention if batched else attention[0]

    def _turned(self, x: Any, batched: bool) -> Any:
        """Between the user's order of axes and (N, L, E), either way."""
        return mindspore.ops.transpose(x, (1, 0, 2)) if batched and not self.batch_first else x

    def _projected(self, query: Any, key: Any, value: Any, batch: int, batched: bool) -> tuple[Any, Any, Any]:
        """The heads' queries, keys and values, (N, H, T, E / H), with the columns that the layer appends."""
        size = self.embed_dim
        if self.in_proj_weight is None:
            q_weight, k_weight, v_weight = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        else:
            packed = self.in_proj_weight
            q_weight, k_weight, v_weight = packed[:size], packed[size : 2 * size], packed[2 * size :]
        q_bias, k_bias, v_bias = None, None, None
        if self.in_proj_bias is not None:
            packed_bias = self.in_proj_bias
            q_bias, k_bias, v_bias = packed_bias[:size], packed_bias[size : 2 * size], packed_bias[2 * size :]
        q = self._heads(self._turned(query, batched), batch, q_weight, q_bias)
        k = self._appended(self._heads(self._turned(key, batched), batch, k_weight, k_bias), self.bias_k)
        v = self._appended(self._heads(self._turned(value, batched), batch, v_weight, v_bias), self.bias_v)
        return q, k, v

    def _heads(self, x: Any, batch: int, weight: Any, bias: Any) -> Any:
        rows = _rows_times(mindspore.ops.reshape(x, (-1, x.shape[-1])), weight, bias)
        heads = mindspore.ops.reshape(rows, (batch, -1, self.num_heads, self.head_dim))
        return mindspore.ops.transpose(heads, (0, 2, 1, 3))

    def _appended(self, x: Any, bias: Any) -> Any:
        shape = (x.shape[0], self.num_heads, 1, self.head_dim)
        if bias is not None:
            column = mindspore.ops.reshape(bias, (1, self.num_heads, 1, self.head_dim))
            x = mindspore.ops.concat((x, mindspore.ops.broadcast_to(column, shape)), 2)
        if self.add_zero_attn:
            x = mindspore.ops.concat((x, mindspore.ops.zeros(shape, x.dtype)), 2)
        return x

    def _mask(self, key_padding_mask: Any, attn_mask: Any, is_causal: bool, sizes: Any) -> Any:
        """All masks as one to add, with open columns for those that the layer appends; None without any."""
        mask = None
        if key_padding_mask is not None:
            shape = _compiled_mask("key_padding_mask", key_padding_mask.shape, key_padding_mask.dtype, sizes)
            mask = mindspore.ops.reshape(_additive(key_padding_mask, self._dtype), shape)
        if attn_mask is not None:
            shape = _compiled_mask("attn_mask", attn_mask.shape, attn_mask.dtype, sizes)
            added = mindspore.ops.reshape(_additive(attn_mask, self._dtype), shape)
            mask = added if mask is None else mask + added
        if is_causal:
            causal = _compiled_causal(sizes, self._dtype)
            mask = causal if mask is None else mask + causal
        if mask is not None:
            extra = (1 if self.bias_k is not None else 0) + (1 if self.add_zero_attn else 0)
            if extra > 0:
                shape = (mask.shape[0], mask.shape[1], mask.shape[2], extra)
                mask = mindspore.ops.concat((mask, mindspore.ops.zeros(shape, mask.dtype)), 3)
        return mask


# -- read by MindSpore's compiler: plain operations, and what is resolved while compiling ------------------------------

_Function = TypeVar("_Function", bound=Callable[..., Any])
_while_compiling: Callable[[_Function], _Function] = mindspore.ops.constexpr


@_while_compiling
def _compiled_sizes(spec: str, shapes: Any, kinds: Any, flags: Any) -> Any:
    """N, L, S and whether the call is batched; raises as a call from Python does."""
    layer = MHASpec.from_json(spec)
    for name, flag in zip(("need_weights", "average_attn_weights", "is_causal"), flags):
        check_flag(flag, name)
    for name, kind in zip(("query", "key", "value"), kinds):
        if _name(kind) != layer.dtype:
            raise ArgumentError(name, given=_name(kind), expected=f"{layer.dtype}, as the layer's weights have")
    query, key, value = (_Shaped(shape) for shape in shapes)
    batched = check_shapes(layer, query, key, value)
    sizes = sizes_of(layer, query, key, batched)
    if min(sizes.batch, sizes.target, sizes.source) < 1:
        raise UnsupportedError(
            "query, key",
            given=f"shapes {query.shape} and {key.shape} in a compiled graph",
            expected="sizes that are known and not zero",
            advice="Call the layer in PyNative mode, or compile with fixed shapes.",
        )
    return sizes.batch, sizes.target, sizes.source, batched


@_while_compiling
def _compiled_mask(name: str, shape: Any, kind: Any, sizes: Any) -> Any:
    """The four axes of a mask; raises for another shape, and for a dtype whose values would have to be looked at."""
    kind = _name(kind)
    if kind not in ("bool", "uint8", *dtypes.FLOATS):
        advice = "Convert it to bool (True: may not attend), or call the layer in PyNative mode."
        if "int" not in kind:
            raise ArgumentTypeError(name, given=kind, expected="bool, uint8 or float", advice=advice)
        raise UnsupportedError(
            name, given=f"a mask of {kind} in a compiled graph", expected="bool, uint8 or float", advice=advice
        )
    place = masks.padding_shape if name == "key_padding_mask" else masks.attention_shape
    return place(_Shaped(shape), masks.Sizes(*sizes))


@_while_compiling
def _compiled_causal(sizes: Any, dtype: str) -> Any:
    blocked = np.triu(np.ones((1, 1, sizes[2], sizes[3]), bool), k=1)
    return _to_tensor(dtypes.round_to(np.where(blocked, -np.inf, 0.0), dtype))


@_while_compiling
def _is_float(kind: Any) -> bool:
    return _name(kind) in dtypes.FLOATS


@_while_compiling
def _clip_to(kind: Any, dtype: str) -> float:
    """The largest number of ``dtype`` when ``kind`` goes beyond it, else 0."""
    return dtypes.LARGEST[dtype] if dtypes.LARGEST[_name(kind)] > dtypes.LARGEST[dtype] else 0.0


@_while_compiling
def _kind(dtype: str) -> Any:
    return getattr(mindspore, dtype)


class _Shaped:
    """A tensor as far as a compiler knows it."""

    def __init__(self, shape: Any) -> None:
        self.shape = tuple(shape)
        self.ndim = len(self.shape)


def _name(kind: Any) -> str:
    """NumPy's name of MindSpore's dtype."""
    return str(kind).lower()


def _additive(mask: Any, dtype: str) -> Any:
    return _narrow(mask, dtype) if _is_float(mask.dtype) else _blocked(mask, dtype)


def _narrow(x: Any, dtype: str) -> Any:
    limit = _clip_to(x.dtype, dtype)
    if limit > 0.0:
        inside = mindspore.ops.maximum(mindspore.ops.minimum(x, limit), -limit)
        x = mindspore.ops.select(x == float("-inf"), x, inside)
    return mindspore.ops.cast(x, _kind(dtype))


def _blocked(x: Any, dtype: str) -> Any:
    zeros = mindspore.ops.zeros(x.shape, _kind(dtype))
    return mindspore.ops.select(mindspore.ops.cast(x, mindspore.bool_), zeros + float("-inf"), zeros)


def _softmax(scores: Any) -> Any:
    """Softmax over the last axis by its formula: MindSpore's own leaves a fully masked row unwritten."""
    fixed = mindspore.ops.stop_gradient(scores)
    largest = mindspore.ops.stop_gradient(mindspore.ops.ReduceMax(keep_dims=True)(fixed, -1))
    exponentials = mindspore.ops.exp(scores - largest)
    return exponentials / mindspore.ops.ReduceSum(keep_dims=True)(exponentials, -1)


def _rows_times(rows: Any, weight: Any, bias: Any) -> Any:
    y = mindspore.ops.matmul(rows, mindspore.ops.transpose(weight, (1, 0)))
    return y if bias is None else y + bias


# -- gradients that can be believed ------------------------------------------------------------------------------------


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
    array = np.array(tensor.asnumpy())
    _keep_ctrl_c()
    return dtypes.to_words(array)


def _keep_ctrl_c() -> None:
    """MindSpore's first operation takes SIGINT over and ends the process with it; give it back to Python's handler."""
    handler = signal.getsignal(signal.SIGINT)
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, handler)
