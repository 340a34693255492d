"""MegEngine's operations, for the composed formula."""

from __future__ import annotations

import contextlib
import types
from typing import Any, Iterator

import megengine
import megengine.functional
import megengine.module
import numpy as np
from megengine.autodiff import GradManager

from mhabridge import dtypes
from mhabridge.composed import Ops
from mhabridge.errors import BackendError


@contextlib.contextmanager
def explained() -> Iterator[None]:
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


class MegEngineOps(Ops):
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

    def times(self, x: Any, factor: float) -> Any:
        if self.dtype(x) == "float32":
            return x * factor
        # There is no gradient of a float16 tensor times a Python float.
        return x * self.constant(np.full((1,) * x.ndim, factor), self.dtype(x))

    def scores(self, query: Any, key: Any) -> Any:
        return megengine.functional.matmul(query, key, transpose_b=True)

    def softmax(self, scores: Any) -> Any:
        if 0 in self.shape(scores):  # its gradient cannot be taken of nothing
            return scores
        # Its own softmax does not subtract a negative maximum, and is NaN for rows of low scores.
        return megengine.functional.softmax(scores - self.largest(scores), axis=3)

    def run(
        self, function: Any, leaves: list[Any], seeds: tuple[np.ndarray | None, np.ndarray | None]
    ) -> tuple[Any, Any, list[np.ndarray]]:
        with explained():
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


class PackedOps(MegEngineOps):
    """The same with weights as the packed vector holds them, (in, out): turning them takes a tenth of a call."""

    def linear(self, rows: Any, weight: Any, bias: Any) -> Any:
        y = self.matmul(rows, weight)
        return y if bias is None else y + bias


OPS = MegEngineOps()
