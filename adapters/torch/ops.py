"""PyTorch's operations, for the composed formula."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mhabridge import dtypes
from mhabridge.composed import Ops

from .tensors import compiling, to_numpy, to_tensor


class TorchOps(Ops):
    """PyTorch's operations, from 1.8 on."""

    framework = "PyTorch"

    def is_tensor(self, x: Any) -> bool:
        return isinstance(x, torch.Tensor)

    def dtype(self, x: torch.Tensor) -> str:
        return str(x.dtype).rpartition(".")[2]

    def casts(self) -> bool:
        try:
            return any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
        except TypeError:  # before 2.4 it takes no argument
            return bool(torch.is_autocast_enabled()) or bool(getattr(torch, "is_autocast_cpu_enabled", bool)())

    def traces(self, x: torch.Tensor) -> bool:
        if compiling():
            return True
        try:
            x.data_ptr()
        except RuntimeError:  # inside torch.func.vmap, and what torch.export works on
            return True
        return False

    def shape(self, x: torch.Tensor) -> tuple[int, ...]:
        return tuple(x.shape)  # made integers, sizes that torch.export leaves open would be fixed

    def narrow(self, x: torch.Tensor, dtype: str) -> torch.Tensor:
        limit = dtypes.LARGEST[dtype]
        if dtypes.LARGEST[self.dtype(x)] <= limit:
            return x.to(getattr(torch, dtype))
        return torch.where(torch.isneginf(x), x, x.clamp(-limit, limit)).to(getattr(torch, dtype))

    def blocked(self, x: torch.Tensor, dtype: str) -> torch.Tensor:
        zeros = torch.zeros(x.shape, dtype=getattr(torch, dtype), device=x.device)
        return zeros.masked_fill(x if x.dtype == torch.bool else x != 0, -np.inf)

    def __init__(self, device: Any = None) -> None:
        self.device = device

    def constant(self, array: np.ndarray, dtype: str) -> torch.Tensor:
        tensor = to_tensor(dtypes.round_to(array, dtype))
        return tensor if self.device is None else tensor.to(self.device)

    def numpy(self, tensor: torch.Tensor) -> np.ndarray:
        return to_numpy(tensor)

    def matmul(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.matmul(a, b)

    def transpose(self, x: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
        return x.permute(*axes)

    def reshape(self, x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        return x.reshape(shape)

    def concat(self, parts: list[torch.Tensor], axis: int) -> torch.Tensor:
        return torch.cat(parts, dim=axis)

    def broadcast(self, x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        return x.expand(shape)

    def exp(self, x: torch.Tensor) -> torch.Tensor:
        return torch.exp(x)

    def largest(self, x: torch.Tensor) -> torch.Tensor:
        if not x.shape[-1]:
            return x.new_zeros((*x.shape[:-1], 1))
        return x.detach().max(dim=-1, keepdim=True)[0]

    def total(self, x: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
        return x.sum(dim=axes, keepdim=True)

    def replace(self, x: torch.Tensor, value: float, by: float) -> torch.Tensor:
        return x.masked_fill(x == value, by)

    def dropout(self, x: torch.Tensor, probability: float) -> torch.Tensor:
        return torch.nn.functional.dropout(x, probability, training=True)

    # What follows is not needed, but faster than what it stands for; and a constant would be copied to a device.

    def zeros(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        return torch.zeros(shape, dtype=getattr(torch, dtype), device=self.device)

    def causal(self, target: int, source: int, dtype: str) -> torch.Tensor:
        return torch.full((target, source), -np.inf, dtype=getattr(torch, dtype), device=self.device).triu(1)

    def linear(self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return torch.nn.functional.linear(rows, weight, bias)

    def scores(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return torch.matmul(query, key.transpose(-2, -1))

    def softmax(self, scores: torch.Tensor) -> torch.Tensor:
        if scores.dtype in (torch.float32, torch.float64):
            return torch.softmax(scores, dim=-1)
        return super().softmax(scores)  # in half precision its gradient rounds once more than the formula's

    def run(
        self, function: Any, leaves: list[torch.Tensor], seeds: tuple[np.ndarray | None, np.ndarray | None]
    ) -> tuple[torch.Tensor, torch.Tensor, list[np.ndarray]]:
        wanted = any(seed is not None for seed in seeds)
        with torch.set_grad_enabled(wanted):
            leaves = [leaf.requires_grad_(wanted) for leaf in leaves]
            results = function(*leaves)
        if not wanted:
            return (*results, [])
        pairs = [(result, seed) for result, seed in zip(results, seeds) if seed is not None]
        grad_outputs = [self.constant(seed, str(result.dtype)[6:]) for result, seed in pairs]
        found = torch.autograd.grad([result for result, _ in pairs], leaves, grad_outputs, allow_unused=True)
        grads = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found)]
        return (*results, [to_numpy(grad) for grad in grads])


OPS = TorchOps()
