"""MindSpore's operations, for the composed formula."""

from __future__ import annotations

from typing import Any

import mindspore
import numpy as np

from mhabridge import dtypes
from mhabridge.composed import Ops

from .compiled import blocked, narrow
from .gradients import believed
from .tensors import dtype_name, to_numpy, to_tensor

# Made once: making one takes as long as using it.
_MATMUL, _MATMUL_TURNED = mindspore.ops.MatMul(), mindspore.ops.MatMul(transpose_b=True)
# The gradient of ops.matmul fails when all axes in front have length 1 (2.10).
_BATCH_MATMUL, _BATCH_MATMUL_TURNED = mindspore.ops.BatchMatMul(), mindspore.ops.BatchMatMul(transpose_b=True)
_BIAS_ADD = mindspore.ops.BiasAdd()  # ten times faster than a sum that repeats the bias (2.10, CPU)
_MAX, _SUM = mindspore.ops.ReduceMax(keep_dims=True), mindspore.ops.ReduceSum(keep_dims=True)


class MindSporeOps(Ops):
    """MindSpore's operations, from 2.0 on."""

    framework = "MindSpore"

    def is_tensor(self, x: Any) -> bool:
        return isinstance(x, mindspore.Tensor)

    def dtype(self, x: Any) -> str:
        return dtype_name(x.dtype)

    def narrow(self, x: Any, dtype: str) -> Any:
        return narrow(x, dtype)

    def blocked(self, x: Any, dtype: str) -> Any:
        return blocked(x, dtype)

    def constant(self, array: np.ndarray, dtype: str) -> Any:
        return to_tensor(dtypes.round_to(array, dtype))

    def numpy(self, tensor: Any) -> np.ndarray:
        return to_numpy(tensor)

    def matmul(self, a: Any, b: Any) -> Any:
        return _BATCH_MATMUL(a, b) if a.ndim > 2 else _MATMUL(a, b)

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
        return mindspore.ops.stop_gradient(_MAX(mindspore.ops.stop_gradient(x), -1))

    def total(self, x: Any, axes: tuple[int, ...]) -> Any:
        return _SUM(x, axes)

    def replace(self, x: Any, value: float, by: float) -> Any:
        return mindspore.ops.select(x == value, mindspore.ops.ones_like(x) * by, x)

    def dropout(self, x: Any, probability: float) -> Any:
        return mindspore.ops.dropout(x, probability, training=True)

    def times(self, x: Any, factor: float) -> Any:
        if x.dtype != mindspore.float64:
            return x * factor
        return x * self.constant(np.full((1,) * x.ndim, factor), "float64")  # a Python float goes in as a float32

    # What follows is not needed, but faster than what it stands for.

    def linear(self, rows: Any, weight: Any, bias: Any) -> Any:
        y = _MATMUL_TURNED(rows, weight)
        return y if bias is None else _BIAS_ADD(y, bias)

    def scores(self, query: Any, key: Any) -> Any:
        return _BATCH_MATMUL_TURNED(query, key)

    def run(
        self, function: Any, leaves: list[Any], seeds: tuple[np.ndarray | None, np.ndarray | None]
    ) -> tuple[Any, Any, list[np.ndarray]]:
        results = function(*leaves)
        if all(seed is None for seed in seeds):
            return (*results, [])
        weights = [None if s is None else self.constant(s, dtypes.canonical(r.dtype)) for r, s in zip(results, seeds)]

        def loss(*tensors: Any) -> Any:
            terms = [
                (result * weight).sum() for result, weight in zip(function(*tensors), weights) if weight is not None
            ]
            return sum(terms[1:], terms[0])

        with believed():
            found = mindspore.grad(loss, tuple(range(len(leaves))))(*leaves)
            found = found if isinstance(found, tuple) else (found,)
            return (*results, [to_numpy(grad) for grad in found])


OPS = MindSporeOps()
