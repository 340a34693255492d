"""MegEngine: ``megengine.module.MultiHeadAttention`` and ``megengine.functional.nn.multi_head_attention``, 1.13.

Why it is built so:
- Masks travel as one float mask built in NumPy: turning a bool mask into one inside MegEngine races (a tenth and more
of the
  conversions are wrong at the default async level), and cuDNN-style pairs are ignored on a CPU.
- The softmax does not subtract a negative row maximum: rows whose scores all lie below about -88 are NaN, and lose
digits before. So the
  scores' range is looked at first, and outside it the call is composed.
- Backward works only in training mode (in evaluation it fails late and corrupts the heap), so the operator is told
that it trains,
  with a dropout of 0, when gradients are wanted. A live call cannot know whether they are, so it always tells it that.
- Dropout is set after construction: the constructor sets it to zero.
- What the operator dislikes arrives later, as an AsyncError whose cause is the real one.
- So live layers are composed, and the operator answers only where mode="native" asks for it and the values allow it.

This module also runs inside workers (Python 3.8).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import types
from typing import Any, Iterator

import megengine
import megengine.functional
import megengine.module
import numpy as np
from megengine.autodiff import GradManager

from mhabridge import dtypes, envelope, live, mapping, masks, reference
from mhabridge.calls import Call, Result
from mhabridge.checks import sizes_of
from mhabridge.composed import Ops
from mhabridge.dialects import spec_to_kwargs, translate_call
from mhabridge.errors import ArgumentError, BackendError, UnsupportedError, WeightsError
from mhabridge.initial import initial_values
from mhabridge.live import Options, Traits
from mhabridge.native import NativeForm, flat_mask, native_form, parameter_grads, unsayable
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights

FRAMEWORK = "megengine"

# Below this row maximum exp() leaves float32's normal range, and the softmax loses digits before it gives NaN.
LOWEST_ROW_MAXIMUM = -80.0


def version() -> str:
    """MegEngine's version."""
    return str(megengine.__version__)


def is_layer(layer: Any) -> bool:
    """Whether this is MegEngine's multi-head attention, or the drop-in."""
    return isinstance(layer, (megengine.module.MultiHeadAttention, MultiheadAttention))


def extract(layer: Any) -> tuple[MHASpec, MHAWeights]:
    """The spec and the weights (copies) of a native module or a drop-in.

    Raises:
        WeightsError: the packed vector does not have the length that the module's sizes say.
        UnsupportedError: a subclass with a forward of its own.
    """
    if type(layer).forward not in (megengine.module.MultiHeadAttention.forward, MultiheadAttention.forward):
        raise UnsupportedError(
            "layer",
            given=f"{type(layer).__qualname__}, whose forward is its own",
            expected="megengine.module.MultiHeadAttention's",
            advice="What it computes is not known; only a module that computes plain attention can be moved.",
        )
    spec = _spec(layer)
    named = {"io_weight_bias": np.array(layer.io_weight_bias.numpy())}
    weights = MHAWeights.from_layout("megengine", named, _packed_part(spec))
    if spec.add_bias_kv:
        extra = {name: np.array(getattr(layer, name).numpy()).reshape(-1) for name in ("bias_k", "bias_v")}
        weights = dataclasses.replace(weights, **extra)
    return spec, weights


def _spec(layer: Any) -> MHASpec:
    own = isinstance(layer, MultiheadAttention)
    return MHASpec(
        embed_dim=layer.embed_dim,
        num_heads=layer.num_heads,
        kdim=layer.kdim,
        vdim=layer.vdim,
        dropout=layer.dropout if own else layer.attn_dropout,
        out_dropout=0.0 if own else layer.out_dropout,
        bias=layer.bias,
        add_bias_kv=layer.add_bias_kv,
        add_zero_attn=layer.add_zero_attn,
        batch_first=layer.batch_first if own else True,
        dtype=np.dtype(layer.io_weight_bias.dtype).name,
    )


def _packed_part(spec: MHASpec) -> MHASpec:
    """What of a layer lies in io_weight_bias: all but bias_k and bias_v."""
    return spec.replace(add_bias_kv=False)


def build(
    spec: MHASpec, weights: MHAWeights | None = None, *, device: Any = None, notes: list[str] | None = None
) -> Any:
    """A native module; without weights it keeps MegEngine's initial values (11 times too small at E = 128).

    Args:
        spec: the layer.
        weights: its parameters.
        device: a MegEngine device name ("cpu0", "gpu0"), or None for the default one.
        notes: a list that is filled with what the module has beyond the spec.

    Raises:
        UnsupportedError: the native class cannot express the spec.
    """
    form = native_form(spec, FRAMEWORK, version())
    return _build(spec, weights, form, device, [] if notes is None else notes)


def _build(spec: MHASpec, weights: MHAWeights | None, form: NativeForm, device: Any, notes: list[str]) -> Any:
    _refuse_dtype(spec)
    kwargs = {name: item for name, item in form.kwargs.items() if not name.endswith("_dropout")}
    layer = megengine.module.MultiHeadAttention(**kwargs)
    layer.attn_dropout, layer.out_dropout = spec.dropout, spec.out_dropout
    packed = layer.io_weight_bias.numpy().astype(spec.dtype)
    if weights is not None:
        packed = _packed(weights, form.spec, spec, notes, packed.shape)
    layer.io_weight_bias = _parameter(packed, device)
    return layer


def _refuse_dtype(spec: MHASpec) -> None:
    if spec.dtype not in ("float32", "float16"):
        raise UnsupportedError(
            "dtype", given=spec.dtype, expected="float32 or float16", advice="MegEngine has no other."
        )


def _parameter(array: np.ndarray, device: Any) -> Any:
    try:
        return megengine.Parameter(array, device=device)
    except RuntimeError as error:  # an unknown name; no such device in this machine
        raise ArgumentError(
            "device", given=repr(device), expected="a device that MegEngine has here", advice=str(error).split("\n")[0]
        ) from error


def _packed(
    weights: MHAWeights, native: MHASpec, spec: MHASpec, notes: list[str], shape: tuple[int, ...] | None
) -> np.ndarray:
    packed = weights.to_layout("megengine", spec, notes=notes)["io_weight_bias"]
    if shape is not None and packed.shape != shape:
        raise WeightsError("io_weight_bias", given=f"shape {packed.shape}", expected=f"shape {shape}")
    return packed


def unfit(spec: MHASpec, weights: MHAWeights, call: Call) -> dict[str, str]:
    """Why the native module and the functional form cannot be used for a call, beyond the table's envelope.

    Rows whose scores are all very negative are among it, so this computes the scores, in NumPy.
    """
    reasons = unsayable(spec, FRAMEWORK, version())
    if reasons:
        reasons = unsayable(spec, "megengine.functional", version())
    return reasons or _low_scores(spec, weights, call)


def _low_scores(spec: MHASpec, weights: MHAWeights, call: Call) -> dict[str, str]:
    largest = reference.score_rows(spec, weights, call)
    low = (largest < LOWEST_ROW_MAXIMUM) & np.isfinite(largest)
    if not low.any():
        return {}
    return {
        "scores": f"A row's scores all lie below {LOWEST_ROW_MAXIMUM:g} (here {largest[low].min():.1f}): "
        "the softmax loses digits there and gives NaN below about -88."
    }


def run_native(spec: MHASpec, weights: MHAWeights, call: Call) -> Result:
    """One canonical call on the native module (or on the functional form, for what only that can express)."""
    with _explained():
        return _Run(spec, weights, call, []).result()


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """An AsyncError comes late, and its cause is what really happened."""
    try:
        yield
    except RuntimeError as error:
        raise BackendError(
            "megengine",
            given=f"{type(error).__name__}: {error.__cause__ or error}",
            expected="an answer",
            advice="The operator refused this call.",
        ) from error


class _Ops(Ops):
    """MegEngine's operations, 1.13.

    Inside ``jit.trace`` a tensor's shape is a tensor itself, so shapes are made integers.
    """

    framework = "MegEngine"

    wider = types.MappingProxyType({"float16": "float32"})  # its autodiff has no float16 for some of these operations

    def __init__(self, device: Any = None) -> None:
        self.device = device

    def is_tensor(self, x: Any) -> bool:
        return isinstance(x, megengine.Tensor)

    def dtype(self, x: Any) -> str:
        name = str(np.dtype(x.dtype).name)
        return "bfloat16" if name == "pybfloat16" else name

    def narrow(self, x: Any, dtype: str) -> Any:
        if self.dtype(x) == dtype:
            return x
        wide, limit = x.astype("float32"), dtypes.LARGEST[dtype]
        clipped = megengine.functional.clip(wide, -limit, limit)
        return megengine.functional.where(wide == -np.inf, wide, clipped).astype(dtype)

    def blocked(self, x: Any, dtype: str) -> Any:
        # Never tensor[mask] = value: that write races at the default async level, and some elements keep their value.
        numbers = x.astype("float32")
        closed = megengine.functional.full_like(numbers, -np.inf)
        return megengine.functional.where(numbers != 0, closed, megengine.functional.zeros_like(numbers)).astype(dtype)

    def constant(self, array: np.ndarray, dtype: str) -> Any:
        return megengine.tensor(np.ascontiguousarray(dtypes.round_to(array, dtype)), device=self.device)

    def numpy(self, tensor: Any) -> np.ndarray:
        return np.array(tensor.numpy())

    def matmul(self, a: Any, b: Any) -> Any:
        if int(a.shape[-1]) == 0:  # MegEngine refuses a product over no terms
            shape = (*(int(size) for size in a.shape[:-1]), int(b.shape[-1]))
            return self.constant(np.zeros(shape), self.dtype(a))
        return megengine.functional.matmul(a, b)

    def transpose(self, x: Any, axes: tuple[int, ...]) -> Any:
        return megengine.functional.transpose(x, axes)

    def reshape(self, x: Any, shape: tuple[int, ...]) -> Any:
        return megengine.functional.reshape(x, tuple(int(size) for size in shape))

    def concat(self, parts: list[Any], axis: int) -> Any:
        return megengine.functional.concat(parts, axis)

    def broadcast(self, x: Any, shape: tuple[int, ...]) -> Any:
        return megengine.functional.broadcast_to(x, tuple(int(size) for size in shape))

    def exp(self, x: Any) -> Any:
        return megengine.functional.exp(x)

    def largest(self, x: Any) -> Any:
        if int(x.shape[-1]) == 0:  # without a source there is nothing to find; any number serves
            return self.constant(np.zeros((*(int(size) for size in x.shape[:-1]), 1)), self.dtype(x))
        return megengine.functional.max(x.detach(), axis=x.ndim - 1, keepdims=True)

    def total(self, x: Any, axes: tuple[int, ...]) -> Any:
        for axis in axes:
            x = megengine.functional.sum(x, axis=axis, keepdims=True)
        return x

    def replace(self, x: Any, value: float, by: float) -> Any:
        return megengine.functional.where(x == value, megengine.functional.full_like(x, by), x)

    def dropout(self, x: Any, probability: float) -> Any:
        return megengine.functional.dropout(x, probability, training=True)

    def run(
        self, function: Any, leaves: list[Any], seeds: tuple[np.ndarray | None, np.ndarray | None]
    ) -> tuple[Any, Any, list[np.ndarray]]:
        with _explained():
            if all(seed is None for seed in seeds):
                output, attention = function(*leaves)
                return megengine.tensor(output.numpy()), attention, []
            return self._with_grads(function, leaves, seeds)

    def _with_grads(
        self, function: Any, leaves: list[Any], seeds: tuple[np.ndarray | None, np.ndarray | None]
    ) -> tuple[Any, Any, list[np.ndarray]]:
        manager = GradManager()
        manager.attach(leaves)
        with manager:
            results = function(*leaves)
            pairs = [(result, seed) for result, seed in zip(results, seeds) if seed is not None]
            dys = [self.constant(seed, np.dtype(result.dtype).name) for result, seed in pairs]
            manager.backward([result for result, _ in pairs], dys)
        grads = [np.zeros(leaf.shape, leaf.dtype) if leaf.grad is None else leaf.grad.numpy() for leaf in leaves]
        return results[0], results[1], [np.array(grad) for grad in grads]


OPS = _Ops()

_FUNCTIONAL = "megengine.functional.nn.multi_head_attention"


def _fused(spec: MHASpec, packed: Any, training: bool) -> Any:
    """The functional form with everything bound that describes the layer."""
    kwargs = spec_to_kwargs(spec.replace(dtype="float32"), "megengine.functional", version=version())
    kwargs.update(attn_drop=spec.dropout, out_drop=spec.out_dropout, training=training)

    def attend(query: Any, key: Any, value: Any, **options: Any) -> Any:
        return megengine.functional.nn.multi_head_attention(
            query, key, value, io_weight_bias=packed, **kwargs, **options
        )

    return attend


class _Run:
    """One call: the operator's inputs as tensors, and how its answers are read."""

    def __init__(self, spec: MHASpec, weights: MHAWeights, call: Call, notes: list[str]) -> None:
        self.spec, self.call, self.notes = spec, call, notes
        self.inputs = [megengine.tensor(np.ascontiguousarray(getattr(call, n))) for n in ("query", "key", "value")]
        merged = flat_mask(masks.merge(call.blocked, call.added, spec.dtype), spec, call)
        self.mask = None if merged is None else megengine.tensor(merged)
        self.layout = FRAMEWORK
        self.attend, self.parameter, self.native = self._operator(weights)
        if merged is not None:
            notes.append("masks merged into one float mask, built in NumPy")

    def _operator(self, weights: MHAWeights) -> tuple[Any, Any, MHASpec]:
        """What to call, its packed parameter, and the spec that this is packed by."""
        try:
            form = native_form(self.spec, FRAMEWORK, version(), turn=True)
        except UnsupportedError:
            return self._functional(weights)
        self.notes.extend(["native: megengine.module.MultiHeadAttention", *form.notes])
        layer = _build(self.spec, weights, form, None, self.notes)
        layer.train(self.call.training)
        if self.call.wants_grads and not self.call.training:
            layer.train(True)
            layer.attn_dropout = layer.out_dropout = 0.0
        return layer, layer.io_weight_bias, form.spec

    def _functional(self, weights: MHAWeights) -> tuple[Any, Any, MHASpec]:
        native = self.spec.replace(batch_first=True)
        self.notes.append(f"native: {_FUNCTIONAL}")
        self.layout = "megengine.functional"
        packed = megengine.Parameter(weights.to_layout(self.layout, native)["io_weight_bias"])
        evaluated = self.call.wants_grads and not self.call.training
        active = native.replace(dropout=0.0, out_dropout=0.0) if evaluated else native
        return _fused(active, packed, self.call.training or evaluated), packed, native

    def forward(self) -> tuple[Any, Any]:
        options = {
            "attn_mask": self.mask,
            "need_weights": self.call.need_weights,
            "average_attn_weights": self.call.average_attn_weights,
        }
        args, kwargs = translate_call("numpy", f"{FRAMEWORK}@{version()}", tuple(self.inputs), options)
        output, attention = self.attend(*args, **kwargs)
        return output, attention if self.call.need_weights else None

    def result(self) -> Result:
        grads: dict[str, np.ndarray] = {}
        if self.call.wants_grads:
            output, attention, grads = self._with_grads()
        else:
            output, attention = self.forward()
        array = np.array(output.numpy())
        weights = None if attention is None else np.array(attention.numpy())
        if weights is not None and not self.call.average_attn_weights:
            n, length, _ = self.call.query.shape
            weights = weights.reshape(n, self.spec.num_heads, length, -1)
        return Result(array, weights, grads, tuple(self.notes))

    def _with_grads(self) -> tuple[Any, Any, dict[str, np.ndarray]]:
        manager = GradManager()
        leaves = [*self.inputs, self.parameter]
        manager.attach(leaves)
        grad_output = self.call.grad_output
        with manager:
            output, attention = self.forward()
            if grad_output is not None:
                manager.backward(output, megengine.tensor(dtypes.round_to(grad_output, self.spec.dtype)))
        arrays = [np.zeros(leaf.shape, self.spec.dtype) if leaf.grad is None else leaf.grad.numpy() for leaf in leaves]
        grads = dict(zip(("query", "key", "value"), (np.array(array) for array in arrays[:3])))
        packed = {"io_weight_bias": np.array(arrays[3])}
        layout_spec = self.native.replace(dtype=self.spec.dtype)
        grads.update(parameter_grads(self.layout, packed, layout_spec, self.spec))
        return output, attention, grads


# -- live layers -----------------------------------------------------------------------------------------------------


def traits(layer: Any) -> Traits:
    """Training flag and kind of device.

    A parameter is frozen by leaving it out of ``GradManager.attach``, of which no layer knows.
    """
    spec = _spec(layer)
    device = str(layer.io_weight_bias.device)
    return Traits(layer.training, dict.fromkeys(spec.parameter_shapes(), True), "cpu" if "cpu" in device else "gpu")


def set_traits(layer: Any, wanted: Traits) -> None:
    """The inverse of ``traits``.

    Raises:
        UnsupportedError: a parameter is frozen; see there.
    """
    frozen = [name for name, trainable in wanted.trainable.items() if not trainable]
    if frozen:
        raise UnsupportedError(
            ", ".join(frozen),
            given="frozen",
            expected="parameters that take part in training",
            advice="MegEngine freezes by leaving a parameter out of GradManager.attach; unfreeze it before converting.",
        )
    layer.train(wanted.training)


def attend(
    layer: Any,
    inputs: tuple[Any, Any, Any],
    key_padding_mask: Any,
    attn_mask: Any,
    options: Options,
    notes: list[str],
) -> tuple[Any, Any]:
    """One call of a live module, composed unless ``mode="native"`` asks for the operator and the values allow it."""
    spec = _spec(layer)
    ops = _Ops(layer.io_weight_bias.device)
    if options.mode == "native":
        return _attend_native(ops, layer, spec, inputs, key_padding_mask, attn_mask, options, notes)
    asked = options.mode == "composed"
    notes.append("composed: " + ("asked for" if asked else "The operator's softmax is NaN for rows of low scores."))
    return live.attend(ops, spec, _tensors(layer, spec), inputs, key_padding_mask, attn_mask, options)


def _attend_native(
    ops: _Ops,
    layer: Any,
    spec: MHASpec,
    inputs: tuple[Any, Any, Any],
    key_padding_mask: Any,
    attn_mask: Any,
    options: Options,
    notes: list[str],
) -> tuple[Any, Any]:
    if isinstance(layer, MultiheadAttention):
        raise _not_native({"layer": "A drop-in is always composed."})
    batched = live.check(ops, spec, inputs, options)
    if not batched:  # a native module is always batch first
        inputs = tuple(megengine.functional.expand_dims(x, 0) for x in inputs)
    call = _canonical_call(ops, spec, batched, inputs, key_padding_mask, attn_mask, options)
    weights = extract(layer)[1]
    broken = envelope.violations(FRAMEWORK, version(), spec, call)
    reasons = {limit.feature: limit.reason for limit in broken} or unfit(spec, weights, call)
    if reasons:
        raise _not_native(reasons)
    notes.extend([f"native: {_FUNCTIONAL}", "no gradient goes through the returned weights or through masks"])
    active = spec if options.training else spec.replace(dropout=0.0, out_dropout=0.0)
    flat = flat_mask(masks.merge(call.blocked, call.added, spec.dtype), spec, call)
    output, attention = _fused(active, layer.io_weight_bias, True)(
        *inputs,
        attn_mask=None if flat is None else ops.constant(flat, spec.dtype),
        need_weights=options.need_weights,
        average_attn_weights=options.average_attn_weights,
    )
    if options.need_weights and not options.average_attn_weights:
        attention = ops.reshape(attention, (call.query.shape[0], spec.num_heads, *attention.shape[1:]))
    answer = (output, attention if options.need_weights else None)
    return answer if batched else tuple(x if x is None else x[0] for x in answer)  # type: ignore[return-value]


def _canonical_call(
    ops: _Ops,
    spec: MHASpec,
    batched: bool,
    inputs: tuple[Any, Any, Any],
    key_padding_mask: Any,
    attn_mask: Any,
    options: Options,
) -> Call:
    """The call with its values in NumPy, to hold it against the envelope; the masks are merged."""
    sizes = dataclasses.replace(sizes_of(spec, inputs[0], inputs[1], True), batched=batched)
    mask = live.merged(ops, spec, sizes, key_padding_mask, attn_mask, options)
    values = blocked = None
    if mask is not None:
        live.refuse_fully_masked(ops, spec, sizes, mask, options)
        values = dtypes.to_float64(ops.numpy(mask))
        blocked = np.isneginf(values)
        values = np.where(blocked, 0.0, values)
    query, key, value = (ops.numpy(x) for x in inputs)
    return Call(
        query,
        key,
        value,
        blocked=blocked,
        added=values,
        need_weights=options.need_weights,
        average_attn_weights=options.average_attn_weights,
        fully_masked="zero" if options.fully_masked == "zero" else "nan",
        training=options.training,
    )


def _not_native(reasons: dict[str, str]) -> UnsupportedError:
    return UnsupportedError(
        ", ".join(reasons),
        given='mode="native"',
        expected="a call that the operator answers rightly",
        advice=" ".join(f"{name}: {reason}" for name, reason in reasons.items()) + ' Use mode="auto" or "composed".',
    )


def _tensors(layer: Any, spec: MHASpec) -> dict[str, Any]:
    """The module's own parameters, differentiable, by canonical name: the packed vector's parts, turned."""
    functional, shapes = megengine.functional, spec.parameter_shapes()
    (entry,) = mapping.table(FRAMEWORK)["layouts"][FRAMEWORK]["tensors"]
    names = [name for name in entry["parts"] if name in shapes]
    ends = list(itertools.accumulate(math.prod(shapes[name]) for name in names))[:-1]
    parts = functional.split(functional.reshape(layer.io_weight_bias, (-1,)), ends)
    found = {}
    for name, part in zip(names, parts):
        turned = functional.reshape(part, shapes[name][::-1])
        found[name] = functional.transpose(turned, (1, 0)) if len(shapes[name]) == 2 else turned
    if spec.add_bias_kv:
        found.update({name: functional.reshape(getattr(layer, name), (-1,)) for name in ("bias_k", "bias_v")})
    return found


class MultiheadAttention(megengine.module.Module):  # type: ignore[misc]
    """PyTorch's multi-head attention as a MegEngine module: its constructor, its call and its defaults.

    The trainable parameter is ``io_weight_bias`` (1, n), packed as ``megengine.module.MultiHeadAttention`` packs it, so
    a state dict goes both ways; with ``add_bias_kv``, which that module does not have, also ``bias_k`` and ``bias_v``
    (1, 1, E). Initial values are PyTorch's (see ``mhabridge.manual_seed``).

    Under ``megengine.jit.trace`` a trace is of one set of shapes; a call with others is a TraceError.

    Args:
        embed_dim: E.
        num_heads: H.
        dropout: on the attention weights, in training.
        bias: all four projections have one.
        add_bias_kv: a learned position is appended to the keys and values.
        add_zero_attn: a position of zeros is appended.
        kdim: features of the keys; None for E.
        vdim: features of the values; None for E.
        batch_first: tensors are (N, L, E) instead of (L, N, E).
        device: a MegEngine device name; None for the default one.
        dtype: float32 (None) or float16.

    Raises:
        ArgumentError: a size, a probability or a device that cannot be.
        UnsupportedError: a dtype that MegEngine does not have.

    Example:
        >>> layer = MultiheadAttention(8, 2, batch_first=True)
        >>> x = megengine.functional.ones((1, 3, 8))
        >>> output, weights = layer(x, x, x, is_causal=True)
        >>> weights.numpy()[0, 0].tolist()
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
        super().__init__()
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
        _refuse_dtype(spec)
        self.embed_dim, self.num_heads = spec.embed_dim, spec.num_heads
        self.kdim, self.vdim = spec.key_features, spec.value_features
        self.dropout, self.bias, self.batch_first = spec.dropout, bool(spec.bias), spec.batch_first
        self.add_bias_kv, self.add_zero_attn = spec.add_bias_kv, spec.add_zero_attn
        self._set_parameters(initial_values(spec), spec, device)

    def _set_parameters(self, weights: MHAWeights, spec: MHASpec, device: Any) -> None:
        packed = dataclasses.replace(weights, bias_k=None, bias_v=None).to_layout("megengine", _packed_part(spec))
        self.io_weight_bias = _parameter(packed["io_weight_bias"], device)
        for name in ("bias_k", "bias_v"):
            array = getattr(weights, name)
            setattr(self, name, None if array is None else _parameter(array.reshape(1, 1, -1), device))

    def forward(
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
        """PyTorch's call; see ``mhabridge.attend`` for what the arguments mean."""
        options = Options(is_causal, need_weights, average_attn_weights, training=self.training)
        return attend(self, (query, key, value), key_padding_mask, attn_mask, options, [])

    def _module_info_string(self) -> str:
        text = f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, dropout={self.dropout}, bias={self.bias}"
        return f"{text}, kdim={self.kdim}, vdim={self.vdim}, batch_first={self.batch_first}"
