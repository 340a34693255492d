"""MegEngine: ``megengine.module.MultiHeadAttention`` and ``megengine.functional.nn.multi_head_attention``, 1.13.

Why it is built so:
- Masks travel as one float mask built in NumPy: turning a bool mask into one inside MegEngine races (a tenth and more
of the
  conversions are wrong at the default async level), and cuDNN-style pairs are ignored on a CPU.
- The softmax does not subtract a negative row maximum: rows whose scores all lie below about -88 are NaN, and lose
digits before. So the
  scores' range is looked at first.
- Backward works only in training mode (in evaluation it fails late and corrupts the heap), so the operator is told
that it trains,
  with a dropout of 0, when gradients are wanted.
- Dropout is set after construction: the constructor sets it to zero.
- What the operator dislikes arrives later, as an AsyncError whose cause is the real one.

This module also runs inside workers (Python 3.8).
"""

from __future__ import annotations

from typing import Any

import megengine
import megengine.functional
import megengine.module
import numpy as np
from megengine.autodiff import GradManager

from mhabridge import dtypes, envelope, masks, reference
from mhabridge.calls import Call, Result
from mhabridge.dialects import spec_to_kwargs, translate_call
from mhabridge.errors import BackendError, UnsupportedError, WeightsError
from mhabridge.native import NativeForm, flat_mask, native_form, parameter_grads
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights

FRAMEWORK = "megengine"

# Below this row maximum exp() leaves float32's normal range, and the softmax loses digits before it gives NaN.
LOWEST_ROW_MAXIMUM = -80.0


def version() -> str:
    """MegEngine's version."""
    return str(megengine.__version__)


def is_layer(layer: Any) -> bool:
    """Whether this is MegEngine's multi-head attention."""
    return isinstance(layer, megengine.module.MultiHeadAttention)


def extract(layer: Any) -> tuple[MHASpec, MHAWeights]:
    """The spec and the weights (copies) of a native module.

    Raises:
        WeightsError: the packed vector does not have the length that the module's sizes say.
        UnsupportedError: a subclass with a forward of its own.
    """
    if type(layer).forward is not megengine.module.MultiHeadAttention.forward:
        raise UnsupportedError(
            "layer",
            given=f"{type(layer).__qualname__}, whose forward is its own",
            expected="megengine.module.MultiHeadAttention's",
            advice="What it computes is not known; only a module that computes plain attention can be moved.",
        )
    packed = np.array(layer.io_weight_bias.numpy())
    spec = MHASpec(
        embed_dim=layer.embed_dim,
        num_heads=layer.num_heads,
        kdim=layer.kdim,
        vdim=layer.vdim,
        dropout=layer.attn_dropout,
        out_dropout=layer.out_dropout,
        bias=layer.bias,
        batch_first=True,
        dtype=dtypes.name_of(packed),
    )
    return spec, MHAWeights.from_layout("megengine", {"io_weight_bias": packed}, spec)


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
    if spec.dtype not in ("float32", "float16"):
        raise UnsupportedError(
            "dtype", given=spec.dtype, expected="float32 or float16", advice="MegEngine has no other."
        )
    kwargs = {name: item for name, item in form.kwargs.items() if not name.endswith("_dropout")}
    layer = megengine.module.MultiHeadAttention(**kwargs)
    layer.attn_dropout, layer.out_dropout = spec.dropout, spec.out_dropout
    packed = layer.io_weight_bias.numpy().astype(spec.dtype)
    if weights is not None:
        packed = _packed(weights, form.spec, spec, notes, packed.shape)
    layer.io_weight_bias = megengine.Parameter(packed, device=device)
    return layer


def _packed(
    weights: MHAWeights, native: MHASpec, spec: MHASpec, notes: list[str], shape: tuple[int, ...] | None
) -> np.ndarray:
    packed = weights.to_layout("megengine", spec, notes=notes)["io_weight_bias"]
    if shape is not None and packed.shape != shape:
        raise WeightsError("io_weight_bias", given=f"shape {packed.shape}", expected=f"shape {shape}")
    return packed


def run(spec: MHASpec, weights: MHAWeights, call: Call) -> Result:
    """One canonical call on the native module (or on the functional form, for what only that can express)."""
    envelope.refuse(FRAMEWORK, version(), spec, call)
    _refuse_low_scores(spec, weights, call)
    notes: list[str] = []
    try:
        return _Run(spec, weights, call, notes).result()
    except RuntimeError as error:  # AsyncError is one; its cause is what really happened
        raise BackendError(
            "megengine",
            given=f"{type(error).__name__}: {error.__cause__ or error}",
            expected="an answer",
            advice="The operator refused this call.",
        ) from error


def _refuse_low_scores(spec: MHASpec, weights: MHAWeights, call: Call) -> None:
    largest = reference.score_rows(spec, weights, call)
    low = (largest < LOWEST_ROW_MAXIMUM) & np.isfinite(largest)
    if low.any():
        index = tuple(int(axis[0]) for axis in np.nonzero(low))
        raise UnsupportedError(
            "query, key, attn_mask",
            given=f"a row whose scores all lie below {largest[index]:.1f} (batch, head, row {index})",
            expected=f"a largest score of at least {LOWEST_ROW_MAXIMUM:g} in every row",
            advice="MegEngine's CPU softmax loses digits there and gives NaN below about -88; use a mask that blocks "
            "(bool, or -inf) instead of large negative numbers, or another backend.",
        )


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
        kwargs = spec_to_kwargs(native.replace(dtype="float32"), "megengine.functional", version=version())
        self.notes.append("native: megengine.functional.nn.multi_head_attention")
        self.layout = "megengine.functional"
        packed = megengine.Parameter(weights.to_layout(self.layout, native)["io_weight_bias"])
        kwargs.update(attn_drop=self.spec.dropout, out_drop=self.spec.out_dropout, training=self.call.training)
        if self.call.wants_grads and not self.call.training:
            kwargs.update(attn_drop=0.0, out_drop=0.0, training=True)

        def attend(query: Any, key: Any, value: Any, **options: Any) -> Any:
            return megengine.functional.nn.multi_head_attention(
                query, key, value, io_weight_bias=packed, **kwargs, **options
            )

        return attend, packed, native

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
