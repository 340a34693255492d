"""Calls of PyTorch's own layer, as it is: what tests/test_pytorch_paths.py asks of the PyTorch that is installed, and,
as a program (JSON in, JSON out), of 1.8.1 in an environment of its own.

Works on Python 3.8 with nothing but PyTorch, from 1.8 on.
"""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from typing import Any, Iterator

import torch

FAST = "_native_multi_head_attention"


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """One call.

    Args:
        request: "layer" (the constructor's keywords) and "state" (its parameters), "training", "grad" (gradients are
            recorded), "inputs" (query, key and value; one alone is passed three times) and "call" (keywords). An array
            is {"dtype": ..., "values": nested lists}; batched inputs are (N, L, E).

    Returns:
        "output" and "weights" as nested lists and "fast" (the fast path answered), or "error" (the exception's class);
        and "warned": a mask was called deprecated.
    """
    layer = _layer(request)
    inputs = [_tensor(array) for array in request["inputs"]]
    turned = inputs[0].dim() == 3 and not getattr(layer, "batch_first", False)
    inputs = [x.transpose(0, 1) for x in inputs] if turned else inputs
    inputs = inputs * 3 if len(inputs) == 1 else inputs
    call = {name: _tensor(item) if isinstance(item, dict) else item for name, item in request["call"].items()}
    with warnings.catch_warnings(record=True) as seen, torch.set_grad_enabled(request["grad"]), _operators() as names:
        warnings.simplefilter("always")
        try:
            output, weights = layer(*inputs, **call)
        except Exception as error:  # whatever PyTorch raises is the answer
            return {"error": type(error).__name__}
    return {
        "output": (output.transpose(0, 1) if turned else output).tolist(),
        "weights": None if weights is None else weights.tolist(),
        "fast": any(FAST in name for name in names),
        "warned": any("deprecated" in str(w.message) and "mask" in str(w.message) for w in seen),
    }


def _layer(request: dict[str, Any]) -> torch.nn.MultiheadAttention:
    kwargs = dict(request["layer"])
    if not hasattr(torch.nn.MultiheadAttention(2, 1), "batch_first"):  # before 1.9
        kwargs.pop("batch_first", None)
    layer = torch.nn.MultiheadAttention(**kwargs)
    layer.load_state_dict({name: torch.tensor(values) for name, values in request["state"].items()})
    return layer.train(request["training"])


def _tensor(array: dict[str, Any]) -> torch.Tensor:
    return torch.tensor(array["values"], dtype=getattr(torch, array["dtype"]))


@contextlib.contextmanager
def _operators() -> Iterator[list[str]]:
    """The names of the operators that run; none before PyTorch 2, which has no fast path to be seen."""
    names: list[str] = []
    try:
        from torch.utils._python_dispatch import TorchDispatchMode
    except ImportError:
        yield names
        return

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    with Recorder():
        yield names


if __name__ == "__main__":
    print(json.dumps([answer(request) for request in json.load(sys.stdin)]))
