"""Attention composed from a framework's own operations: what every backend can do, whatever its fused layer cannot.

One formula, that of ``reference``, in a dozen operations (``Ops``) that each adapter names. So a call that the native
layer cannot express or answers wrongly still runs in that framework, through its autograd, with the same parameters.
Larger steps (``linear``, ``scores``, ``softmax`` ...) are written here in smaller ones; an adapter writes again those
for which its framework has something faster.

This module also runs inside workers (Python 3.8).
"""

from __future__ import annotations

import dataclasses
import types
from typing import Any, Callable, Mapping

import numpy as np

from mhabridge import dtypes, masks, reference
from mhabridge.calls import Call, Result
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights

Tensor = Any
Function = Callable[..., "tuple[Tensor, Tensor]"]


class Ops:
    """The operations of one framework that the formula needs; an adapter fills them in.

    All of them are differentiable, but for ``largest``. Axes are counted as in NumPy.

    Attributes:
        framework: whose they are, for messages.
        wider: dtypes in which ``run`` computes in another one and rounds the results, with that one.
    """

    framework = ""
    wider: Mapping[str, str] = types.MappingProxyType({})

    def is_tensor(self, x: Any) -> bool:
        """Whether this is a tensor of the framework."""
        raise NotImplementedError

    def dtype(self, x: Tensor) -> str:
        """NumPy's name of the tensor's dtype."""
        raise NotImplementedError

    def casts(self) -> bool:
        """Whether the framework itself casts tensors at the moment (autocast), so that dtypes need not agree."""
        return False

    def traces(self, x: Tensor) -> bool:
        """Whether a tensor has no values that could be looked at: somebody records what is done with it."""
        return False

    def shape(self, x: Tensor) -> tuple[int, ...]:
        """The tensor's axes."""
        return tuple(int(size) for size in x.shape)

    def narrow(self, x: Tensor, dtype: str) -> Tensor:
        """A float tensor in ``dtype``; what is finite stays finite (clipped to the largest number), -inf stays -inf."""
        raise NotImplementedError

    def blocked(self, x: Tensor, dtype: str) -> Tensor:
        """-inf where a bool or integer tensor is not zero, else 0."""
        raise NotImplementedError

    def constant(self, array: np.ndarray, dtype: str) -> Tensor:
        """A tensor with these values, rounded to ``dtype``."""
        raise NotImplementedError

    def numpy(self, tensor: Tensor) -> np.ndarray:
        """The values, bfloat16 as words."""
        raise NotImplementedError

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """Matrix product over the last two axes; the axes before agree."""
        raise NotImplementedError

    def transpose(self, x: Tensor, axes: tuple[int, ...]) -> Tensor:
        """Reorder the axes."""
        raise NotImplementedError

    def reshape(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The same elements, in C order, in another shape."""
        raise NotImplementedError

    def concat(self, parts: list[Tensor], axis: int) -> Tensor:
        """Join along an axis."""
        raise NotImplementedError

    def broadcast(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Repeat axes of length 1."""
        raise NotImplementedError

    def exp(self, x: Tensor) -> Tensor:
        """The exponential."""
        raise NotImplementedError

    def largest(self, x: Tensor) -> Tensor:
        """The maximum over the last axis, kept, without a gradient."""
        raise NotImplementedError

    def total(self, x: Tensor, axes: tuple[int, ...]) -> Tensor:
        """The sum over some axes, kept."""
        raise NotImplementedError

    def replace(self, x: Tensor, value: float, by: float) -> Tensor:
        """The tensor with every element that equals ``value`` (it may be -inf) replaced."""
        raise NotImplementedError

    def dropout(self, x: Tensor, probability: float) -> Tensor:
        """Elements are zeroed with a probability in (0, 1), the others scaled by 1 / (1 - probability)."""
        raise NotImplementedError

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        """A tensor of zeros."""
        return self.constant(np.zeros(shape), dtype)

    def causal(self, target: int, source: int, dtype: str) -> Tensor:
        """(L, S): -inf where j > i, else 0."""
        return self.constant(np.where(np.triu(np.ones((target, source), bool), k=1), -np.inf, 0.0), dtype)

    def times(self, x: Tensor, factor: float) -> Tensor:
        """The product with a number."""
        return x * factor

    def linear(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(rows, in) times (out, in), turned, plus (out,)."""
        y = self.matmul(rows, self.transpose(weight, (1, 0)))
        return y if bias is None else y + bias

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """(N, H, L, D) times (N, H, S, D), turned."""
        return self.matmul(query, self.transpose(key, (0, 1, 3, 2)))

    def softmax(self, scores: Tensor) -> Tensor:
        """Over the last axis of four; a row of nothing but -inf is NaN (-inf - -inf), and so are its gradients."""
        exponentials = self.exp(scores - self.largest(scores))
        return exponentials / self.total(exponentials, (3,))

    def run(
        self, function: Function, leaves: list[Tensor], seeds: tuple[np.ndarray | None, np.ndarray | None]
    ) -> tuple[Tensor, Tensor, list[np.ndarray]]:
        """Call ``function(*leaves)``; with seeds also the gradients of sum(seed * result) for every leaf."""
        raise NotImplementedError


def run(ops: Ops, spec: MHASpec, weights: MHAWeights, call: Call) -> Result:
    """One canonical call, composed."""
    if 0 in (*call.query.shape[:2], call.key.shape[1]):
        return _empty(spec, weights, call)
    if spec.dtype in ops.wider:
        return _run_wider(ops, spec, weights, call)
    merged = masks.merge(call.blocked, call.added, spec.dtype)
    arrays = {"query": call.query, "key": call.key, "value": call.value, **weights.arrays()}
    if merged is not None:
        target, source = call.query.shape[1], call.key.shape[1]
        arrays["mask"] = np.ascontiguousarray(np.broadcast_to(merged, (*merged.shape[:2], target, source)))
    names = list(arrays)

    def function(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        tensors = dict(zip(names, leaves))
        return forward(ops, spec, tensors, call)

    leaves = [ops.constant(array, spec.dtype) for array in arrays.values()]
    output, attention, found = ops.run(function, leaves, (call.grad_output, call.grad_attn_weights))
    grads = dict(zip(names, found))
    if not call.mask_grad:
        grads.pop("mask", None)
    weights_out = ops.numpy(attention) if call.need_weights else None
    return Result(ops.numpy(output), weights_out, grads)


def _run_wider(ops: Ops, spec: MHASpec, weights: MHAWeights, call: Call) -> Result:
    """In a dtype that holds the inputs exactly; the results are rounded to the layer's."""
    wide = ops.wider[spec.dtype]
    query, key, value = (dtypes.round_to(array, wide) for array in (call.query, call.key, call.value))
    call = dataclasses.replace(call, query=query, key=key, value=value)
    result = run(ops, spec.replace(dtype=wide), weights.astype(wide), call)
    attention = None if result.attn_weights is None else dtypes.round_to(result.attn_weights, spec.dtype)
    grads = {name: dtypes.round_to(grad, spec.dtype) for name, grad in result.grads.items()}
    note = f"computed in {wide} and rounded to {spec.dtype}"
    return Result(dtypes.round_to(result.output, spec.dtype), attention, grads, (*result.notes, note))


def forward(ops: Ops, spec: MHASpec, tensors: dict[str, Tensor], call: Call) -> tuple[Tensor, Tensor]:
    """Output (N, L, out) and attention weights, (N, H, L, S') or, where they are asked for, averaged (N, L, S').

    Args:
        ops: the framework's operations.
        spec: the layer.
        tensors: "query", "key", "value", the parameters by canonical name, and "mask" (four axes) or not.
        call: what is asked for; its arrays are not used.
    """
    query = _project(ops, "q", tensors["query"], spec, tensors)
    key = _append(ops, "bias_k", _project(ops, "k", tensors["key"], spec, tensors), spec, tensors)
    value = _append(ops, "bias_v", _project(ops, "v", tensors["value"], spec, tensors), spec, tensors)
    scores = ops.scores(ops.times(query, spec.score_scale), key)
    if "mask" in tensors:
        scores = scores + _widen(ops, tensors["mask"], spec)
    probabilities = _softmax(ops, scores, call.fully_masked)
    attention = _dropout(ops, probabilities, spec.dropout, call)
    context = _join(ops, ops.matmul(attention, value))
    output = context if spec.out_proj_size == 0 else _linear(ops, "out", context, tensors)
    output = _dropout(ops, output, spec.out_dropout, call)
    if spec.residual:
        output = output + tensors["query"]
    if spec.out_proj_size == 0 and call.fully_masked == "nan":
        # Only a dead head's own features are NaN by themselves; NaN - NaN (elsewhere 0) makes it the whole row.
        n, _, length, _ = ops.shape(probabilities)
        sums = ops.reshape(ops.total(probabilities, (1, 3)), (n, length, 1))
        output = output + (sums - sums)
    if call.need_weights and call.average_attn_weights:
        n, heads, length, columns = ops.shape(attention)
        attention = ops.reshape(ops.times(ops.total(attention, (1,)), 1.0 / heads), (n, length, columns))
    return output, attention


def _linear(ops: Ops, name: str, x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """Y = X W^T + b, over rows: one large product, whose gradient keeps its axes in every framework."""
    n, length, features = ops.shape(x)
    y = ops.linear(ops.reshape(x, (n * length, features)), tensors[f"{name}_weight"], tensors.get(f"{name}_bias"))
    return ops.reshape(y, (n, length, ops.shape(y)[-1]))


def _project(ops: Ops, name: str, x: Tensor, spec: MHASpec, tensors: dict[str, Tensor]) -> Tensor:
    """(N, T, features) to (N, H, T, head size)."""
    n, length, features = ops.shape(x)
    if getattr(spec, f"{name}_proj_size") == 0:  # every head gets the whole tensor
        whole = ops.reshape(x, (n, 1, length, features))
        return ops.broadcast(whole, (n, spec.num_heads, length, features))
    y = _linear(ops, name, x, tensors)
    size = ops.shape(y)[-1] // spec.num_heads
    return ops.transpose(ops.reshape(y, (n, length, spec.num_heads, size)), (0, 2, 1, 3))


def _append(ops: Ops, bias: str, x: Tensor, spec: MHASpec, tensors: dict[str, Tensor]) -> Tensor:
    n, heads, _, size = ops.shape(x)
    columns = [x]
    if spec.add_bias_kv:
        columns.append(ops.broadcast(ops.reshape(tensors[bias], (1, heads, 1, size)), (n, heads, 1, size)))
    if spec.add_zero_attn:
        columns.append(ops.zeros((n, heads, 1, size), spec.dtype))
    return columns[0] if len(columns) == 1 else ops.concat(columns, 2)


def _widen(ops: Ops, mask: Tensor, spec: MHASpec) -> Tensor:
    """Open columns for what add_bias_kv and add_zero_attn appended."""
    if not spec.extra_columns:
        return mask
    shape = (*ops.shape(mask)[:3], spec.extra_columns)
    return ops.concat([mask, ops.zeros(shape, spec.dtype)], 3)


def _softmax(ops: Ops, scores: Tensor, fully_masked: str) -> Tensor:
    """Softmax over the last axis. A fully masked row is NaN, or 0 with the policy "zero"."""
    if fully_masked == "nan":
        return ops.softmax(scores)
    exponentials = ops.exp(scores - ops.replace(ops.largest(scores), -np.inf, 0.0))
    return exponentials / ops.replace(ops.total(exponentials, (3,)), 0.0, 1.0)


def _join(ops: Ops, x: Tensor) -> Tensor:
    n, heads, length, size = ops.shape(x)
    return ops.reshape(ops.transpose(x, (0, 2, 1, 3)), (n, length, heads * size))


def _dropout(ops: Ops, x: Tensor, probability: float, call: Call) -> Tensor:
    if not call.training or probability == 0.0:
        return x
    return ops.times(x, 0.0) if probability == 1.0 else ops.dropout(x, probability)


def _empty(spec: MHASpec, weights: MHAWeights, call: Call) -> Result:
    """Without a batch, a row or a source there is nothing to compute, and some frameworks cannot hold such tensors."""
    result = reference.attend(spec, weights, call)
    grads = {name: dtypes.round_to(grad, spec.dtype) for name, grad in result.grads.items()}
    attention = None if result.attn_weights is None else dtypes.round_to(result.attn_weights, spec.dtype)
    return Result(dtypes.round_to(result.output, spec.dtype), attention, grads, ("empty: nothing to compute",))
