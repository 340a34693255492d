"""Canonical calls on MegEngine's own layer, built for each of them."""

from __future__ import annotations

from typing import Any

import megengine
import megengine.functional
import megengine.module
import numpy as np
from megengine.autodiff import GradManager

from mhabridge import dtypes, masks, reference
from mhabridge.calls import Call, Result
from mhabridge.dialects import spec_to_kwargs, translate_call
from mhabridge.errors import UnsupportedError, WeightsError
from mhabridge.native import NativeForm, flat_mask, native_form, parameter_grads, unsayable
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights

from .ops import explained
from .parameters import parameter, refuse_dtype

FRAMEWORK = "megengine"


# Below this row maximum exp() leaves float32's normal range, and the softmax loses digits before it gives NaN.
LOWEST_ROW_MAXIMUM = -80.0


def version() -> str:
    """MegEngine's version."""
    return str(megengine.__version__)


def build_native(spec: MHASpec, weights: MHAWeights | None, form: NativeForm, device: Any, notes: list[str]) -> Any:
    """The native layer in the form that can hold the spec; without weights it keeps its initial values."""
    refuse_dtype(spec)
    kwargs = {name: item for name, item in form.kwargs.items() if not name.endswith("_dropout")}
    layer = megengine.module.MultiHeadAttention(**kwargs)
    layer.attn_dropout, layer.out_dropout = spec.dropout, spec.out_dropout
    packed = layer.io_weight_bias.numpy().astype(spec.dtype)
    if weights is not None:
        packed = _packed(weights, form.spec, spec, notes, packed.shape)
    layer.io_weight_bias = parameter(packed, device)
    return layer


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
    with explained():
        return _Run(spec, weights, call, []).result()


FUNCTIONAL = "megengine.functional.nn.multi_head_attention"


def fused(spec: MHASpec, packed: Any, training: bool) -> Any:
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
        layer = build_native(self.spec, weights, form, None, self.notes)
        layer.train(self.call.training)
        if self.call.wants_grads and not self.call.training:
            layer.train(True)
            layer.attn_dropout = layer.out_dropout = 0.0
        return layer, layer.io_weight_bias, form.spec

    def _functional(self, weights: MHAWeights) -> tuple[Any, Any, MHASpec]:
        native = self.spec.replace(batch_first=True)
        self.notes.append(f"native: {FUNCTIONAL}")
        self.layout = "megengine.functional"
        packed = megengine.Parameter(weights.to_layout(self.layout, native)["io_weight_bias"])
        evaluated = self.call.wants_grads and not self.call.training
        active = native.replace(dropout=0.0, out_dropout=0.0) if evaluated else native
        return fused(active, packed, self.call.training or evaluated), packed, native

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
        # Of float16 its operator returns weights in float32; PyTorch's have the layer's dtype.
        weights = None if attention is None else dtypes.round_to(attention.numpy(), self.spec.dtype)
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
