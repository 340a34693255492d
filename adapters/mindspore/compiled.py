"""What MindSpore's compiler reads of the drop-in: plain operations, and what is resolved while compiling."""

from __future__ import annotations

from typing import Any, Callable, TypeVar

import mindspore
import numpy as np

from mhabridge import dtypes, masks
from mhabridge.checks import check_flag, check_shapes, sizes_of
from mhabridge.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from mhabridge.spec import MHASpec

from .tensors import dtype_name, to_tensor

_Function = TypeVar("_Function", bound=Callable[..., Any])


_while_compiling: Callable[[_Function], _Function] = mindspore.ops.constexpr


@_while_compiling
def compiled_sizes(spec: str, batch_first: bool, shapes: Any, kinds: Any, flags: Any) -> Any:
    """N, L, S and whether the call is batched; raises as a call from Python does."""
    layer = MHASpec.from_json(spec).replace(batch_first=batch_first)
    for name, flag in zip(("need_weights", "average_attn_weights", "is_causal"), flags):
        check_flag(flag, name)
    for name, kind in zip(("query", "key", "value"), kinds):
        if dtype_name(kind) != layer.dtype:
            raise ArgumentError(name, given=dtype_name(kind), expected=f"{layer.dtype}, as the layer's weights have")
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
def compiled_mask(name: str, shape: Any, kind: Any, sizes: Any) -> Any:
    """The four axes of a mask; raises for another shape, and for a dtype whose values would have to be looked at."""
    kind = dtype_name(kind)
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
def compiled_causal(sizes: Any, dtype: str) -> Any:
    """The causal mask to add, (1, 1, L, S)."""
    blocked = np.triu(np.ones((1, 1, sizes[2], sizes[3]), bool), k=1)
    return to_tensor(dtypes.round_to(np.where(blocked, -np.inf, 0.0), dtype))


@_while_compiling
def _is_float(kind: Any) -> bool:
    return dtype_name(kind) in dtypes.FLOATS


@_while_compiling
def _clip_to(kind: Any, dtype: str) -> float:
    """The largest number of ``dtype`` when ``kind`` goes beyond it, else 0."""
    return dtypes.LARGEST[dtype] if dtypes.LARGEST[dtype_name(kind)] > dtypes.LARGEST[dtype] else 0.0


@_while_compiling
def _kind(dtype: str) -> Any:
    return getattr(mindspore, dtype)


class _Shaped:
    """A tensor as far as a compiler knows it."""

    def __init__(self, shape: Any) -> None:
        self.shape = tuple(shape)
        self.ndim = len(self.shape)


def additive(mask: Any, dtype: str) -> Any:
    """A mask of any kind as one to add."""
    return narrow(mask, dtype) if _is_float(mask.dtype) else blocked(mask, dtype)


def narrow(x: Any, dtype: str) -> Any:
    """See ``Ops.narrow``."""
    limit = _clip_to(x.dtype, dtype)
    if limit > 0.0:
        inside = mindspore.ops.maximum(mindspore.ops.minimum(x, limit), -limit)
        x = mindspore.ops.select(x == float("-inf"), x, inside)
    return mindspore.ops.cast(x, _kind(dtype))


def blocked(x: Any, dtype: str) -> Any:
    """See ``Ops.blocked``."""
    zeros = mindspore.ops.zeros(x.shape, _kind(dtype))
    return mindspore.ops.select(mindspore.ops.cast(x, mindspore.bool_), zeros + float("-inf"), zeros)


def softmax(scores: Any) -> Any:
    """Softmax over the last axis by its formula: MindSpore's own leaves a fully masked row unwritten."""
    fixed = mindspore.ops.stop_gradient(scores)
    largest = mindspore.ops.stop_gradient(mindspore.ops.ReduceMax(keep_dims=True)(fixed, -1))
    exponentials = mindspore.ops.exp(scores - largest)
    return exponentials / mindspore.ops.ReduceSum(keep_dims=True)(exponentials, -1)


def rows_times(rows: Any, weight: Any, bias: Any) -> Any:
    """Y = X W^T + b."""
    y = mindspore.ops.matmul(rows, mindspore.ops.transpose(weight, (1, 0)))
    return y if bias is None else y + bias
